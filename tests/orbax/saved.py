"""Checkpoints that Touchdown saved, loaded by Orbax through all of its doors; and Orbax's own, to be saved again.

    <out>/index.json           {count, checkpoint, append}: which directory of a case is judged, and whether keys are added
    <out>/<case>/facts.json    {items: {name: {ocdbt, zarr3, custom, containers}}, custom, json}
    <out>/<case>/want-<item>   the dump that must come out; each leaf says its value_type and sharding too
    <out>/<case>/ckpt          the checkpoint; `again` if Orbax saved `ckpt` and Touchdown saved it again

Everything that Touchdown saves is loaded by Orbax, arrays without elements and bool scalars too. What it cannot do all the
same: v1's `metadata` of a tree with a scalar that is neither an integer nor one of numpy's floats (a bool, a bfloat16, a
complex number) is None, of Orbax's own checkpoints too.
"""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as v0
import tensorstore as ts
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1
from orbax.checkpoint._src.metadata.pytree_metadata_options import PyTreeMetadataOptions

import orbax_io
from dump import DumpWriter, json_value, read_dump
from elements import dtype, same
from save_layout import containers, odd_tree, stored, value_type, walk
from trees import TreeMaker, kind, partition_spec

RICH = PyTreeMetadataOptions(support_rich_types=True)


def run(out):
    out = pathlib.Path(out)
    index = json.loads((out / 'index.json').read_text())
    report = {'cases': index['count'], 'leaves': 0, 'arrays': 0, 'on_targets': 0}
    for number in range(index['count']):
        folder = out / str(number)
        try:
            judge(number, folder, folder / index['checkpoint'], index['append'], report)
        except Exception as error:
            raise AssertionError(f'{folder}: {error}') from error
    return report


def judge(number, folder, checkpoint, append, report):
    facts = json.loads((folder / 'facts.json').read_text())
    items = {name: (item, read_dump(folder / f'want-{name}')) for name, item in facts['items'].items()}
    checkpointables = v1.load_checkpointables(checkpoint)
    assert set(checkpointables) == set(items) | ({'config'} if facts['json'] else set()), checkpointables.keys()
    assert not facts['json'] or checkpointables['config'] == facts['json'], checkpointables['config']
    for name, (item, want) in items.items():
        directory = checkpoint / name
        compare(want, checkpointables[name])
        compare(want, v1.load(checkpoint, checkpointable_name=name))
        found = v1.metadata(checkpoint, checkpointable_name=name)
        assert (found.custom_metadata or None) == facts['custom'], found.custom_metadata
        if odd_scalars(want):
            assert found.metadata is None, found.metadata
        else:
            compare_metadata(want, found.metadata)
        compare(want, v0.PyTreeCheckpointer().restore(directory))
        compare(want, v0.StandardCheckpointer().restore(directory))
        tree = v0.PyTreeCheckpointHandler().metadata(epath.Path(directory))
        assert tree.custom_metadata == item['custom'], tree.custom_metadata
        compare_metadata(want, tree.tree)
        if item['containers'] is not None:
            restored = v0.Checkpointer(v0.PyTreeCheckpointHandler(pytree_metadata_options=RICH)).restore(directory)
            compare(want, restored)
            found = sorted(([list(map(str, path)), kind] for path, kind in containers(restored)), key=str)
            assert found == sorted(item['containers'], key=str), (found, item['containers'])
        for count in [1, 2, 4, 8] if number < 4 and len(want) < 1000 else [[1, 2, 4, 8][number % 4]]:
            target = targets(want, count)
            loaded = v1.load(checkpoint, target, checkpointable_name=name)
            compare(want, loaded, dict(walk(target)))
            report['on_targets'] += len(want)
        report['leaves'] += len(want)
        report['arrays'] += sum(open_array(directory, item, path, leaf) for path, leaf in want.items())
        if append and item['ocdbt'] and (directory / 'manifest.ocdbt').exists():
            database = ts.KvStore.open({'driver': 'ocdbt', 'base': f'file://{directory}/'}).result()
            database.write('appended', b'by TensorStore').result()


def compare(want, got, target=None):
    """Every leaf with its value, its Python type and, if it is on devices, its sharding; `target` has other shardings."""
    got = dict(walk(got))
    assert set(got) == set(want), set(got) ^ set(want)
    for path, leaf in want.items():
        found, says = got[path], leaf['value_type']
        assert kind(found) == leaf['kind'], (path, leaf['kind'], found)
        if leaf['kind'] in ('array', 'key'):
            data = stored(found)
            assert data.dtype.name == leaf['dtype'] and same(data, leaf['global']).all(), (path, leaf['dtype'], data)
            if target is not None and leaf['kind'] == 'array':
                assert found.sharding == target[path].sharding, (path, found.sharding, target[path].sharding)
                continue
            assert isinstance(found, jax.Array) == (says == 'jax.Array'), (path, says, type(found))
            if leaf.get('sharding'):
                expected = sharding(leaf['sharding'])
                # A spec may have got as many entries as there are dimensions.
                equal = found.sharding.is_equivalent_to(expected, found.ndim) and found.sharding.mesh == expected.mesh
                assert equal, (path, found.sharding, leaf['sharding'])
            if leaf['kind'] == 'key':
                assert str(jax.random.key_impl(found)) == leaf['key_impl'], (path, found)
        elif leaf['kind'] == 'scalar':
            value = found.item() if isinstance(found, np.generic) else found
            if isinstance(value, complex):
                value = [value.real, value.imag]
            assert repr(json_value(value)) == repr(leaf['value']), (path, found, leaf['value'])
        elif leaf['kind'] == 'string':
            assert found == leaf['value'], (path, found)
        else:
            assert value_type(found) == says, (path, found, says)


def compare_metadata(want, got):
    """Shapes and types without the values."""
    got = dict(walk(got))
    assert set(got) == set(want), set(got) ^ set(want)
    for path, leaf in want.items():
        if leaf['kind'] == 'array':
            found = got[path]
            assert (list(found.shape), np.dtype(found.dtype).name) == (leaf['shape'], leaf['dtype']), (path, found)


def odd_scalars(want):
    scalars = [dtype(leaf['dtype']) for leaf in want.values() if leaf['kind'] == 'scalar']
    return any(not np.issubdtype(scalar, np.integer) and not np.issubdtype(scalar, np.floating) for scalar in scalars)


def sharding(told):
    devices = np.array([jax.devices()[at] for at in told['devices']]).reshape(told['shape'])
    return NamedSharding(Mesh(devices, told['axes']), partition_spec(told['spec']))


def targets(want, count):
    """A tree of what to load, arrays over so many devices along the first dimension that they divide."""
    mesh = Mesh(np.array(jax.devices()[:count]), ['device'])

    def target(leaf):
        if leaf['kind'] == 'array':
            even = [dim for dim, extent in enumerate(leaf['shape']) if extent % count == 0]
            spec = PartitionSpec(*[None] * even[0], 'device') if even else PartitionSpec()
            return jax.ShapeDtypeStruct(leaf['shape'], dtype(leaf['dtype']), sharding=NamedSharding(mesh, spec))
        if leaf['kind'] == 'key':
            key = jax.random.wrap_key_data(leaf['global'], impl=leaf['key_impl'])
            return key
        if leaf['kind'] == 'scalar':
            return {'b': bool, 'i': int, 'u': int, 'f': float}.get(dtype(leaf['dtype']).kind, float)()
        return {'string': '', 'none': None, 'Dict': {}, 'List': [], 'Tuple': ()}[
            leaf['value_type'] if leaf['kind'] == 'empty' else leaf['kind']]
    return nested({path: target(leaf) for path, leaf in want.items()})


def nested(leaves):
    """A tree of dicts and lists."""
    if list(leaves) == [()]:
        return leaves[()]
    children = {}
    for path, leaf in leaves.items():
        children.setdefault(path[0], {})[path[1:]] = leaf
    if all(isinstance(key, int) for key in children):
        return [nested(children[at]) for at in range(len(children))]
    return {key: nested(child) for key, child in children.items()}


def open_array(directory, item, path, leaf):
    if leaf['kind'] not in ('array', 'key', 'scalar'):
        return 0
    name = '.'.join(map(str, path))
    store = {'driver': 'file', 'path': f'{directory}/{name}'}
    if item['ocdbt']:
        store = {'driver': 'ocdbt', 'base': f'file://{directory}/', 'path': name}
    array = ts.open({'driver': 'zarr3' if item['zarr3'] else 'zarr', 'kvstore': store}, open=True).result()
    assert [list(array.shape), array.dtype.name] == [leaf['shape'], leaf['dtype']], (path, array)
    if leaf['kind'] != 'scalar':
        assert same(array.read().result(), leaf['global']).all(), path
    return 1


def make(seed, out, count):
    """Every third one is a bare v0 item with rich types, the first of which has every kind of container."""
    out = pathlib.Path(out)
    for number in range(count):
        rng = np.random.default_rng([seed, number, 77])
        rich = number % 3 == 2
        maker = TreeMaker(rng, 'v0-pytree' if rich else 'v1')
        tree = odd_tree() if number == 2 else maker.tree()
        folder = out / str(number)
        folder.mkdir(parents=True)
        ocdbt = number == 2 or bool(rng.random() < 0.7) or orbax_io.has_backslash(tree)
        zarr3 = bool(rng.random() < 0.6)
        custom = {'number': number, 'ünï "q"': [1.5, None]}
        (save_rich if rich else save_v1)(folder / 'ckpt', tree, ocdbt, zarr3, custom)
        dump = DumpWriter(folder / 'want-state')
        for path, leaf in walk(tree):
            write_leaf(dump, path, leaf)
        dump.close()
        item = {'ocdbt': ocdbt, 'zarr3': zarr3, 'custom': custom if rich else None,
                'containers': [[list(map(str, path)), kind] for path, kind in containers(tree)] if rich else None}
        facts = {'items': {'state': item}, 'custom': None if rich else custom, 'json': None,
                 'devices': int(np.prod([size for _, size in maker.mesh]))}
        (folder / 'facts.json').write_text(json.dumps(facts))
    return {'cases': count}


def save_v1(path, tree, ocdbt, zarr3, custom):
    context = v1.Context()
    context.array.saving.use_ocdbt, context.array.saving.use_zarr3 = ocdbt, zarr3
    with context:
        v1.save(path, tree, custom_metadata=custom)


def save_rich(path, tree, ocdbt, zarr3, custom):
    handler = v0.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3, pytree_metadata_options=RICH)
    v0.Checkpointer(handler).save(path, args=v0.args.PyTreeSave(tree, custom_metadata=custom))


def write_leaf(dump, path, leaf):
    if kind(leaf) not in ('array', 'key', 'scalar'):
        dump.plain(path, kind(leaf), leaf if kind(leaf) == 'string' else None)
        dump.leaves[-1]['value_type'] = value_type(leaf)
        return
    data = stored(leaf)
    whole = [([[0, n] for n in data.shape], data)]
    if kind(leaf) == 'scalar':
        dump.scalar(path, data.dtype.name, data[()])
        dump.leaves[-1]['value_type'] = 'scalar'
        return
    told = {'value_type': 'np.ndarray', 'sharding': None}
    if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
        mesh = leaf.sharding.mesh
        spec = [[] if axes is None else [axes] if isinstance(axes, str) else list(axes) for axes in leaf.sharding.spec]
        told = {'value_type': 'jax.Array', 'sharding': {
            'axes': list(mesh.axis_names), 'shape': list(mesh.devices.shape), 'spec': spec,
            'devices': [device.id for device in mesh.devices.flat]}}
    if kind(leaf) == 'key':
        told.update(value_type='jax.Array', key_impl=str(jax.random.key_impl(leaf)))
    dump.array(path, data.dtype.name, data.shape, whole, kind=kind(leaf), **told)
