"""Checkpoints whose metadata Touchdown writes: what to write, and whether Orbax reads it.

`describe` makes random trees and says what is in them; the test writes every file but the arrays; `judge` makes the same
trees again, adds the arrays by TensorStore under the names that the test chose, and has Orbax load all of it.

    <out>/<case>/leaves.json    describe: {ocdbt, zarr3, custom, config, containers, leaves}
    <out>/<case>/names.json     the test: the parameter name of each array, by the position of its leaf
    <out>/<case>/ckpt           the test: a v1 checkpoint without arrays
    <out>/<case>/want           judge: the dump that Touchdown must make of it
"""

import collections
import json
import pathlib
import unicodedata

import jax
import numpy as np
import orbax.checkpoint as v0
import safetensors
import safetensors.numpy
import tensorstore as ts
from jax.sharding import NamedSharding, SingleDeviceSharding
from orbax.checkpoint import v1
from orbax.checkpoint._src.metadata.pytree_metadata_options import PyTreeMetadataOptions

from dump import DumpWriter
from elements import dtype, from_memory_form, memory_form, same
from trees import TreeMaker, kind

Point = collections.namedtuple('Point', ['y', 'x', 'a'])
VALUE_TYPES = {'none': 'None', 'string': 'string', 'scalar': 'scalar', 'key': 'jax.Array'}
EMPTIES = {dict: 'Dict', list: 'List', tuple: 'Tuple'}


def make_case(seed, number):
    rng = np.random.default_rng([seed, number])
    if number == 0:
        tree = odd_tree()
    else:
        tree = TreeMaker(rng, 'v1').tree()
    ocdbt = number == 0 or bool(rng.random() < 0.6) or any('\\' in str(key) for path, _ in walk(tree) for key in path)
    return tree, {'ocdbt': ocdbt, 'zarr3': bool(rng.random() < 0.6), 'custom': {'case': number, 'ünï "q"': [1.5, None]},
                  'config': [{'lr': 1e-5, 'name': 'é'}, None, True, 2**53 + 1]}


def odd_tree():
    """Every character class that Python quotes or escapes, long sequences, every kind of container."""
    return {"it's": np.arange(3), 'q"': 1, "b'\"": {'': 2.5}, 'back\\slash': True, '\t\n\x00\x7f\xa0\xad': 'controls',
            '\u200b\u2028\ue000\U000e0001': np.float64(1), '日本😀e\u0301': [np.full(1, i) for i in range(12)], 'category': {'category': 'x'},
            'clazz': 'tuple', 'text': {'p/q': 'one', 'p': {'q': 'two'}, 'a~1b': '\ud7ff"\\'}, 'e': [None, {}, [], ()],
            't': ((np.arange(2), [7]), 'in a tuple'), 'n': Point(np.ones(2), {'deep': Point(1, 2, 3)}, None),
            '../up': np.arange(4), '/lead': np.arange(5), 'tw//ice': np.arange(6), '.': np.arange(2), 'slash/': np.arange(2), 'Z': 0, 'a': -0.0}


def walk(tree, path=()):
    """[(path, leaf)] with the names of namedtuple fields, in JAX's order."""
    if hasattr(tree, '_fields'):
        return [leaf for name, value in zip(tree._fields, tree) for leaf in walk(value, (*path, name))]
    if isinstance(tree, dict) and tree:
        return [leaf for key in sorted(tree) for leaf in walk(tree[key], (*path, key))]
    if isinstance(tree, (list, tuple)) and tree:
        return [leaf for i, value in enumerate(tree) for leaf in walk(value, (*path, i))]
    return [(path, tree)]


def containers(tree, path=()):
    """[(path, kind)] of tuples and namedtuples that are not empty."""
    if not isinstance(tree, (dict, list, tuple)) or not tree:
        return []
    if hasattr(tree, '_fields'):
        own, children = 'NamedTuple', zip(tree._fields, tree)
    else:
        own = 'Tuple' if isinstance(tree, tuple) else None
        children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [(path, own)] * bool(own) + [found for key, value in children for found in containers(value, (*path, key))]


def describe(seed, out, count):
    out = pathlib.Path(out)
    for number in range(count):
        tree, facts = make_case(seed, number)
        folder = out / str(number)
        folder.mkdir(parents=True)
        facts['containers'] = containers(tree)
        facts['leaves'] = [describe_leaf(path, leaf) for path, leaf in walk(tree)]
        (folder / 'leaves.json').write_text(json.dumps(facts))
    return {'cases': count}


def describe_leaf(path, leaf):
    told = {'path': path, 'text': leaf if isinstance(leaf, str) else None}
    told['type'] = value_type(leaf)
    if isinstance(leaf, jax.Array):
        told['write_shape'] = list(stored(leaf).shape)
        told['key_impl'] = str(jax.random.key_impl(leaf)) if kind(leaf) == 'key' else None
        told['sharding'] = describe_sharding(leaf.sharding)
    return told


def value_type(leaf):
    if kind(leaf) == 'empty':
        return EMPTIES[type(leaf)]
    return VALUE_TYPES.get(kind(leaf)) or ('jax.Array' if isinstance(leaf, jax.Array) else 'np.ndarray')


def describe_sharding(sharding):
    if isinstance(sharding, SingleDeviceSharding):
        return {'device': str(next(iter(sharding.device_set)))}
    assert isinstance(sharding, NamedSharding), sharding
    mesh, spec = sharding.mesh, sharding.spec
    axes = [[] if part is None else [part] if isinstance(part, str) else list(part) for part in spec]
    return {'axes': list(mesh.axis_names), 'shape': list(mesh.devices.shape), 'spec': axes,
            'devices': [device.id for device in mesh.devices.flat]}


def stored(leaf):
    """The array that is stored for a leaf."""
    return np.asarray(jax.random.key_data(leaf) if kind(leaf) == 'key' else leaf)


def judge(seed, out, count):
    out = pathlib.Path(out)
    leaves = 0
    for number in range(count):
        tree, facts = make_case(seed, number)
        folder = out / str(number)
        checkpoint, state = folder / 'ckpt', folder / 'ckpt/state'
        names = json.loads((folder / 'names.json').read_text())
        entries = walk(tree)
        with_data = [position for position, (_, leaf) in enumerate(entries) if kind(leaf) in ('array', 'scalar', 'key')]
        assert sorted(map(int, names)) == with_data, (number, names)
        for position in with_data:
            write_array(state, names[str(position)], stored(entries[position][1]), facts)
        check_metadata(state, [path for path, _ in entries])
        compare(number, tree, v1.load(checkpoint))
        compare(number, tree, v0.PyTreeCheckpointer().restore(state))
        loaded = v1.load_checkpointables(checkpoint)
        assert loaded['config'] == facts['config'], loaded['config']
        assert v1.metadata(checkpoint).custom_metadata == facts['custom'], v1.metadata(checkpoint)
        rich = v0.PyTreeCheckpointHandler(pytree_metadata_options=PyTreeMetadataOptions(support_rich_types=True))
        restored = v0.Checkpointer(rich).restore(state)
        compare(number, tree, restored)
        assert sorted(containers(restored), key=str) == sorted(containers(tree), key=str), (number, containers(restored))
        write_dump(folder / 'want', entries)
        leaves += len(entries)
    return {'cases': count, 'leaves': leaves}


def write_array(state, name, data, facts):
    store = {'driver': 'file', 'path': f'{state}/{name}'}
    if facts['ocdbt']:
        store = {'driver': 'ocdbt', 'base': f'file://{state}/', 'path': name}
    spec = {'driver': 'zarr3' if facts['zarr3'] else 'zarr', 'kvstore': store, 'store_data_equal_to_fill_value': True}
    array = ts.open(spec, create=True, dtype=data.dtype, shape=data.shape).result()
    array.write(data).result()


def check_metadata(state, paths):
    """The names of the members are what Python's repr says, in JAX's order."""
    text = (state / '_METADATA').read_text()
    metadata = json.loads(text)
    assert text == json.dumps(metadata), 'not in the form of json.dumps'
    assert list(metadata['tree_metadata']) == [repr(tuple(map(str, path))) for path in paths]


def compare(number, want, got):
    """Every leaf is equal and where it was; what containers became is looked at elsewhere."""
    want, got = dict(walk(want)), dict(walk(got))
    assert set(want) == set(got), (number, set(want) ^ set(got))
    for path, leaf in want.items():
        found = got[path]
        assert kind(leaf) == kind(found), (number, path, leaf, found)
        if kind(leaf) in ('array', 'key'):
            assert same(stored(leaf), stored(found)).all(), (number, path)
            assert isinstance(leaf, jax.Array) == isinstance(found, jax.Array), (number, path, type(found))
            if isinstance(leaf, jax.Array):
                assert leaf.sharding == found.sharding, (number, path, leaf.sharding, found.sharding)
            if kind(leaf) == 'key':
                assert jax.random.key_impl(leaf) == jax.random.key_impl(found), (number, path)
        elif kind(leaf) == 'scalar':
            # A numpy scalar is stored as an array without dimensions and comes back as the number in it.
            assert repr(stored(leaf)[()]) == repr(stored(found)[()]), (number, path, leaf, found)
        else:
            assert leaf == found and type(leaf) is type(found), (number, path, leaf, found)


def write_dump(folder, entries):
    dump = DumpWriter(folder)
    for path, leaf in entries:
        data = stored(leaf) if kind(leaf) in ('array', 'key', 'scalar') else None
        whole = [([[0, n] for n in data.shape], data)] if data is not None else None
        if kind(leaf) == 'array':
            dump.array(path, data.dtype.name, data.shape, whole)
        elif kind(leaf) == 'key':
            dump.array(path, data.dtype.name, data.shape, whole, kind='key', key_impl=str(jax.random.key_impl(leaf)))
        elif kind(leaf) == 'scalar':
            dump.scalar(path, data.dtype.name, data[()])
        else:
            dump.plain(path, kind(leaf), leaf if kind(leaf) == 'string' else None)
    dump.close()


def reprs(out):
    """`reprs.json`: {code point: member name of the path (char,)}, against Python, for characters that it knows."""
    told = json.loads((pathlib.Path(out) / 'reprs.json').read_text())
    assert len(told) == 0x110000 - 0x800, len(told)
    differing = [code for code, text in told.items() if text != repr((chr(int(code)),))]
    known = [code for code in differing if unicodedata.category(chr(int(code))) != 'Cn']
    assert not known, known[:20]
    return {'characters': len(told), 'unknown_to_this_python': len(differing)}


def tensors(out):
    """`tensors.json`: [{file, header, tensors: [{name, tag, dtype, shape, bytes}]}], read by the safetensors package."""
    out = pathlib.Path(out)
    count = 0
    for file in json.loads((out / 'tensors.json').read_text()):
        path = out / file['file']
        content = path.read_bytes()
        found = dict(safetensors.deserialize(content))
        assert set(found) == {tensor['name'] for tensor in file['tensors']}
        by_numpy = {}
        for tensor in file['tensors']:
            got, name = found[tensor['name']], tensor['name']
            raw = bytes(tensor['bytes'])
            assert (got['dtype'], got['shape'], bytes(got['data'])) == (tensor['tag'], tensor['shape'], raw), (name, got['dtype'])
            if tensor['tag'] in safetensors.numpy._TYPES:
                by_numpy[name] = from_memory_form(raw, tensor['dtype'], tensor['shape'])
            count += 1
        if len(by_numpy) < len(found):
            with safetensors.safe_open(path, framework='np') as opened:
                assert opened.metadata() == file['metadata'], opened.metadata()
                loaded = {name: opened.get_tensor(name) for name in by_numpy}
        else:
            loaded = safetensors.numpy.load_file(path)
            # The reference's own file has the same header, but for its padding.
            ours = content[8:8 + int.from_bytes(content[:8], 'little')]
            theirs = safetensors.numpy.save(by_numpy, file['metadata'])
            length = int.from_bytes(theirs[:8], 'little')
            assert ours.rstrip(b' ') == theirs[8:8 + length].rstrip(b' '), (ours, theirs[:8 + length])
            assert content[8 + len(ours):] == theirs[8 + length:]
        for name, data in by_numpy.items():
            assert loaded[name].dtype == dtype(data.dtype.name) and memory_form(loaded[name]) == memory_form(data), name
    return {'tensors': count}
