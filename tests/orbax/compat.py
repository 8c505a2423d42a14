"""The checkpoints that the orbax-checkpoint package carries for its own tests: whole ones of several
layouts, and the same ones with files or fields removed.

Layout of the output:
    index.json             {"cases": [{"name", "path", "args", "exits", "want"}, ..]}; path is absolute
    NAME/dump.json         the expected dump for cases that may be loaded
    roots/..               step roots put together from whole ones

`exits` lists the exit codes that are right. Where 0 is among them, the dump must equal `want`; where 3 is
there too, a reader may recover the data (from a listing, or from the databases of the processes) or
refuse it. All of them hold one and the same tree.
"""

import json
import pathlib
import shutil

import numpy as np
import orbax.checkpoint as v0
from orbax.checkpoint.experimental.v1._src.testing import compatibility

from dump import DumpWriter
from trees import flatten

TREE = {'a': np.arange(8, dtype=np.int32), 'b': {'c': np.arange(1, 4, dtype=np.int32)}}


def run(out):
    out = pathlib.Path(out).resolve()
    out.mkdir(parents=True)
    source = pathlib.Path(list(compatibility.__path__)[0]) / 'checkpoints'
    cases = [case for path in sorted(source.glob('*/*/*/*')) for case in packaged(out, source, path)]
    cases += roots(out, source)
    assert len(cases) >= 40, f'only {len(cases)} checkpoints below {source}'
    (out / 'index.json').write_text(json.dumps({'schema': 1, 'cases': cases}, indent=1) + '\n')
    return {'cases': len(cases), 'must_load': sum(case['exits'] == [0] for case in cases),
            'must_fail': sum(0 not in case['exits'] for case in cases)}


def packaged(out, source, path):
    """The cases of one packaged checkpoint."""
    name = str(path.relative_to(source))
    item = path if 'direct_checkpoint' in name else path / 'state'
    damage = path.name
    if damage == 'deleted_checkpointable':
        # Only a JSON item is left: there is no tree to load.
        return [case(out, name, path, [2, 3])]
    if damage == 'missing_pytree_data_dir_d':
        return [case(out, name, path, [3])]
    if damage in ('pytree_checkpointable_missing_metadata', 'missing_pytree_data_file_manifest.ocdbt'):
        return [case(out, name, path, [0, 3])]
    assert_orbax_restores(item)
    found = [case(out, name, path, [0])]
    if damage == 'dummy_checkpointable_added':
        found.append(case(out, name + ' the dummy', path, [3], ['--item', 'dummy']))
    return found


def case(out, name, path, exits, args=()):
    want = None
    if 0 in exits:
        want = name.replace('/', '-')
        writer = DumpWriter(out / want)
        for leaf, value in flatten(TREE):
            whole = [[0, n] for n in value.shape]
            writer.array(leaf, value.dtype.name, value.shape, [(whole, value)])
        writer.close()
    return {'name': name, 'path': str(path), 'args': ['--devices', 'cpu:1', *args], 'exits': exits, 'want': want}


def assert_orbax_restores(item):
    """Orbax's own load gives the tree; as numpy arrays, so that no sharding is needed."""
    arguments = {'a': v0.RestoreArgs(restore_type=np.ndarray), 'b': {'c': v0.RestoreArgs(restore_type=np.ndarray)}}
    restored = v0.PyTreeCheckpointer().restore(item, restore_args=arguments)
    for (path, want), (_, got) in zip(flatten(TREE), flatten(restored), strict=True):
        assert got.dtype == want.dtype and (got == want).all(), (item, path, got)


def roots(out, source):
    """Step roots of one whole checkpoint, with metrics and root metadata, as a manager leaves them."""
    found = []
    for version in ('v0', 'v1'):
        whole = source / f'{version}_checkpoints/composite_checkpoint/checkpoint_metadata_present' \
                         '/pytree_checkpointable_has_metadata'
        root = out / 'roots' / version
        shutil.copytree(whole, root / 'checkpoint_0')
        (root / 'checkpoint_0/metrics').mkdir()
        (root / 'checkpoint_0/metrics/metrics').write_text('{"loss": 0.5}')
        (root / 'metadata').mkdir()
        (root / 'metadata/_ROOT_METADATA').write_text(json.dumps({'custom_metadata': {'foo': 'bar'}}))
        found.append(case(out, f'root-{version}', root, [0]))
        found.append(case(out, f'root-{version}-step', root, [0], ['--step', '0']))
        found.append(case(out, f'root-{version}-no-such-step', root, [2], ['--step', '1']))
    return found
