"""Checkpoints of every form that Orbax saves, for Touchdown to seal; and whether Orbax still loads them.

    <out>/<case>    the checkpoint; <out>/cases.json lists the cases
"""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as v0
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1


def tree():
    """Arrays larger than what stands in a database's nodes, whole and divided, and every other kind of leaf."""
    rng = np.random.default_rng(7)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ('data', 'model'))
    on = lambda data, *spec: jax.device_put(data, NamedSharding(mesh, PartitionSpec(*spec)))
    return {
        'w': on(rng.standard_normal((64, 64)).astype('float32'), 'data', 'model'),
        'replicated': on(rng.standard_normal((40, 40)).astype('bfloat16')),
        'host': rng.integers(0, 1 << 30, (50, 30)),
        'same': on(np.zeros((64, 64), 'float32'), 'data', None),
        'step': 7, 'rate': 0.5, 'name': 'sealed', 'deep': {'list': [np.arange(400, dtype='int16')]},
    }


def make(out):
    out = pathlib.Path(out)
    cases = []
    for ocdbt in (True, False):
        for zarr3 in (True, False):
            for compressed, chunk in ((True, None), (False, None), (True, 2048)):
                context = v1.Context()
                saving = context.array.saving
                saving.use_ocdbt, saving.use_zarr3, saving.use_compression = ocdbt, zarr3, compressed
                if chunk:
                    saving.storage_options.chunk_byte_size = chunk
                name = f'v1-{ocdbt}-{zarr3}-{compressed}-{chunk}'
                with context:
                    v1.save(out / name, tree())
                cases.append({'name': name, 'item': 'state'})
            name = f'v0-{ocdbt}-{zarr3}'
            v0.PyTreeCheckpointer(use_ocdbt=ocdbt, use_zarr3=zarr3).save(out / name, tree())
            cases.append({'name': name, 'item': None})
    (out / 'cases.json').write_text(json.dumps(cases))
    return {'cases': len(cases)}


def judge(out):
    out = pathlib.Path(out)
    want = tree()
    cases = json.loads((out / 'cases.json').read_text())
    for case in cases:
        path, item = out / case['name'], case['item']
        restored = v0.PyTreeCheckpointer().restore(path / item if item else path)
        compare(case, want, restored)
        compare(case, want, v1.load(path))
        # The other way round on the mesh: parts of chunks.
        mesh = Mesh(np.array(jax.devices()), ('x',))
        turned = {'w': jax.ShapeDtypeStruct((64, 64), 'float32', sharding=NamedSharding(mesh, PartitionSpec(None, 'x')))}
        target = {**{name: leaf for name, leaf in want.items() if name != 'w'}, **turned}
        compare(case, want, v1.load(path, target))
    return {'cases': len(cases)}


def compare(case, want, got):
    want, got = jax.tree.flatten(want), jax.tree.flatten(got)
    assert len(want[0]) == len(got[0]), (case, got[1])
    for one, other in zip(want[0], got[0]):
        assert np.array_equal(np.asarray(one), np.asarray(other)), (case, one, other)
