"""Small checkpoints that the corpus lacks, with their true values.

Each folder of the output holds `ckpt/` and the truth in the corpus' form: `expected.json` with
`kind` (orbax, safetensors or refused), `items` -> `leaves` with `path` [["d", key] | ["s", index], ..],
`kind`, `dtype`, `shape`, `value` of scalars and strings, `offset` and `nbytes` into `expected.bin`
(little-endian, C order; sub-byte types one byte an element). `refused` ones have `exit` instead of items.

Every array that TensorStore can read is read back through TensorStore before it is written down as true,
every tree that Orbax can restore is restored by Orbax.
"""

import json
import pathlib
import shutil
import tempfile

import jax
import ml_dtypes
import msgpack
import numpy as np
import orbax.checkpoint as v0
import safetensors
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import msgpack_utils, v1

import ocdbt
from dump import json_value
from elements import bits, dtype, memory_form, same
from trees import flatten, kind


def run(out):
    out = pathlib.Path(out).resolve()
    out.mkdir(parents=True)
    for make in (ocdbt_frames, ocdbt_transitive, ocdbt_numbered, msgpack_bare, msgpack_with_metadata,
                 zarr3_codecs, zarr2_codecs, safetensors_types, safetensors_index,
                 safetensors_directory, safetensors_sub_byte, names_with_dots, names_verbatim, names_in_names,
                 names_that_collide, name_absolute, name_dotdot):
        make(Fixture(out / make.__name__, make.__doc__))
    size = sum(f.stat().st_size for f in out.rglob('*') if f.is_file())
    return {'fixtures': len(list(out.iterdir())), 'bytes': size}


class Fixture:
    """One folder: `ckpt` to be filled, and the truth collected beside it."""

    def __init__(self, folder, description):
        folder.mkdir()
        self.folder, self.ckpt = folder, folder / 'ckpt'
        self.description = description
        self.items, self.data = {}, bytearray()

    def leaf(self, item, path, value, leaf_kind=None):
        """A leaf of `item` with the true `value`."""
        row = {'path': [['s' if isinstance(e, int) else 'd', e] for e in path], 'kind': leaf_kind or kind(value)}
        if row['kind'] in ('none', 'empty'):
            row = {**row, 'kind': 'empty', 'value': 'None' if value is None else type(value).__name__.capitalize()}
        elif row['kind'] == 'string':
            row['value'] = value
        else:
            array = np.asarray(value)
            stored = memory_form(array)
            if row['kind'] == 'scalar':
                number = array.item()
                row['value'] = [number.real, number.imag] if isinstance(number, complex) else json_value(number)
            row |= {'dtype': array.dtype.name, 'shape': list(array.shape), 'offset': len(self.data),
                    'nbytes': len(stored)}
            self.data += stored
        self.items.setdefault(item, {'leaves': []})['leaves'].append(row)

    def tree(self, item, tree):
        for path, value in flatten(tree):
            self.leaf(item, path, value)

    def write(self, kind, **more):
        body = {'name': self.folder.name, 'kind': kind, 'desc': ' '.join(self.description.split()),
                'items': self.items, **more}
        (self.folder / 'expected.json').write_text(json.dumps(body, indent=1, allow_nan=False) + '\n')
        (self.folder / 'expected.bin').write_bytes(self.data)


# OCDBT

def sharded_tree():
    """Two arrays of several chunks, small values, a string: about thirty keys."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('x', 'y'))
    place = lambda data, *spec: jax.device_put(data, NamedSharding(mesh, PartitionSpec(*spec)))
    return {
        'bias': place(np.arange(8, dtype=np.float32).astype(ml_dtypes.bfloat16), 'y'),
        'layers': [{'kernel': place(np.arange(48 + i, 96 + i, dtype=np.float32).reshape(8, 6), 'x', 'y')}
                   for i in range(2)],
        'name': 'forty-two',
        'step': 42,
    }


def saved_keys(fixture):
    """Saves `sharded_tree` with Orbax, returns its database's {key: value} and removes the database."""
    tree = sharded_tree()
    context = v1.Context()
    context.array.saving.use_compression = False
    with context:
        v1.save(fixture.ckpt, tree)
    item = fixture.ckpt / 'state'
    keys = read_database(item)
    for name in ('d', 'ocdbt.process_0'):
        shutil.rmtree(item / name)
    (item / 'manifest.ocdbt').unlink()
    fixture.tree('state', tree)
    return item, keys, tree


def read_database(folder):
    store = ts.KvStore.open({'driver': 'ocdbt', 'base': f'file://{folder}/'}).result()
    return {key: store.read(key).result().value for key in store.list().result()}


def verify_database(fixture, item, keys, tree):
    """TensorStore reads the same keys, Orbax loads the same tree."""
    assert read_database(item) == keys, f'{fixture.folder.name}: TensorStore reads other keys'
    loaded = v1.load(fixture.ckpt)
    for (path, want), (_, got) in zip(flatten(tree), flatten(loaded), strict=True):
        assert np.array_equal(np.asarray(want), np.asarray(got)), (fixture.folder.name, path)
    fixture.write('orbax')


def write_files(item, *files):
    for file in files:
        path = item / (file.base + file.relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.data)


def ocdbt_frames(fixture):
    """An OCDBT tree of height 2 whose nodes are raw, zstd frames, and zstd frames that do not state their
    content size, as older TensorStore wrote them."""
    item, keys, tree = saved_keys(fixture)
    file = ocdbt.DataFile('', 'd/00000000000000000000000000000001')
    entries = [(key, file.value(value) if len(value) > 60 else value) for key, value in sorted(keys.items())]
    forms = [ocdbt.RAW, ocdbt.ZSTD, ocdbt.ZSTD_UNKNOWN_SIZE]
    leaves = []
    for i in range(0, len(entries), 5):
        run = entries[i:i + 5]
        prefix = ocdbt.common(run[0][0], run[-1][0])
        ref = file.leaf([(key[prefix:], value) for key, value in run], forms[i // 5 % 3])
        leaves.append((run[0][0], prefix, ref))
    interiors = []
    for i in range(0, len(leaves), 3):
        group = leaves[i:i + 3]
        ref = file.interior(1, group, forms[(i // 3 + 2) % 3])
        interiors.append((group[0][0], 0, ref))
    root = file.interior(2, interiors, ocdbt.ZSTD_UNKNOWN_SIZE)
    write_files(item, file)
    (item / 'manifest.ocdbt').write_bytes(ocdbt.manifest(root, 2, ocdbt.ZSTD_UNKNOWN_SIZE))
    verify_database(fixture, item, keys, tree)


def ocdbt_transitive(fixture):
    """An OCDBT tree over directories: the root refers to a node below part/, which refers to nodes and
    values below deep/ as it sees it, that is below part/deep/."""
    item, keys, tree = saved_keys(fixture)
    entries = sorted(keys.items())
    middle = len(entries) // 2
    here = ocdbt.DataFile('', 'd/00000000000000000000000000000001')
    part = ocdbt.DataFile('', 'd/00000000000000000000000000000002')          # written below part/
    deep = ocdbt.DataFile('deep/', 'd/00000000000000000000000000000003')     # written below part/deep/
    # Deepest first. A node below part/deep/ names its own directory's files with no base.
    own = ocdbt.DataFile('', deep.relative)
    own.data = deep.data
    low = own.leaf([(key, own.value(value)) for key, value in entries[:middle]], ocdbt.RAW)
    # A leaf in part/ whose values lie in part/ and in part/deep/.
    high = part.leaf([(key, (part if i % 2 else deep).value(value)) for i, (key, value) in
                      enumerate(entries[middle:])], ocdbt.ZSTD)
    branch = part.interior(1, [(entries[0][0], 0, low.below('deep/')), (entries[middle][0], 0, high)], ocdbt.RAW)
    root = here.interior(2, [(entries[0][0], 0, branch.below('part/'))], ocdbt.RAW)
    write_files(item, here)
    write_files(item / 'part', part, deep)
    (item / 'manifest.ocdbt').write_bytes(ocdbt.manifest(root, 2, ocdbt.RAW))
    verify_database(fixture, item, keys, tree)


def ocdbt_numbered(fixture):
    """A numbered manifest: manifest.ocdbt holds only the configuration, manifest.<16 hex digits> the versions."""
    item, keys, tree = saved_keys(fixture)
    store = ts.KvStore.open({'driver': 'ocdbt', 'base': f'file://{item}/', 'config': {
        'manifest_kind': 'numbered', 'max_inline_value_bytes': 64}}).result()
    for key, value in keys.items():
        store.write(key, value).result()
    assert list(item.glob('manifest.00*')), 'no numbered manifest was written'
    verify_database(fixture, item, keys, tree)


# Legacy msgpack aggregates

def aggregate_values():
    """Everything that the file `checkpoint` can hold by itself."""
    return {
        'array': np.arange(6, dtype=np.float32).reshape(2, 3),
        'bfloat16': np.array([1.5, -2, np.inf], np.float32).astype(ml_dtypes.bfloat16),
        'chunked': np.arange(24, dtype=np.int32).reshape(2, 3, 4),
        'empty_array': np.zeros((0, 3), np.float64),
        'flag': True,
        'float': -0.1,
        'int': -2**40,
        'large': 2**63 + 5,
        'npscalar': np.float32(0.1),
        'npint': np.int8(-3),
        'text': 'ünï',
        'list': [np.arange(3, dtype=np.uint8), 7, {'deep': np.array(2.5)}],
        'complex': 1.5 - 2j,
        'tuple': (np.arange(2, dtype=np.int64), 'in a tuple', (1, 2)),
        'none': None,
        'dict_empty': {},
        'list_empty': [],
        'bools': np.array([True, False]),
    }


def packed(tree):
    """Orbax's own encoding, with a small limit so that `chunked` is cut into chunks."""
    whole = msgpack_utils.MAX_CHUNK_SIZE
    msgpack_utils.MAX_CHUNK_SIZE = 40
    try:
        small = {key: value for key, value in tree.items() if key == 'chunked'}
        cut = msgpack.unpackb(msgpack_utils.msgpack_serialize(small), ext_hook=msgpack_utils._msgpack_ext_unpack)
        assert len(cut['chunked']['chunks']) == 3
    finally:
        msgpack_utils.MAX_CHUNK_SIZE = whole
    return msgpack_utils.msgpack_serialize({**tree, **cut})


def zarr2(path, array, **metadata):
    """A zarr2 array written by TensorStore; `metadata` overrides Orbax's way of writing it."""
    store = ts.open({'driver': 'zarr', 'kvstore': f'file://{path}/', 'metadata': {
        'shape': list(array.shape), 'chunks': list(array.shape) or [], 'dtype': zarr2_dtype(array.dtype),
        'compressor': {'id': 'zstd', 'level': 1}, **metadata}}, create=True).result()
    store.write(array).result()


def zarr2_dtype(kind):
    return kind.str if not hasattr(ml_dtypes, kind.name) else kind.name


def msgpack_bare(fixture):
    """A checkpoint before _METADATA: the msgpack file `checkpoint` with every extension type, inline values
    and placeholders for zarr2 arrays beside it."""
    fixture.ckpt.mkdir()
    stored = {'stored.kernel': np.arange(20, dtype=np.float32).reshape(4, 5), 'stored.scale': np.array(3.5)}
    for name, array in stored.items():
        zarr2(fixture.ckpt / name, array)
    tree = aggregate_values()
    names = {'stored': {'kernel': 'PLACEHOLDER://stored.kernel', 'scale': 'PLACEHOLDER://stored.scale'}}
    # Orbax converted tuples to lists before it wrote, and cannot restore one: it is asked without the tuple.
    orbax_tree = {key: value for key, value in tree.items() if key != 'tuple'}
    (fixture.ckpt / 'checkpoint').write_bytes(packed({**orbax_tree, **names}))
    restored = v0.PyTreeCheckpointer().restore(fixture.ckpt)
    arrays = {'kernel': stored['stored.kernel'], 'scale': stored['stored.scale']}
    assert_restored(fixture, {**orbax_tree, 'stored': arrays}, restored)
    (fixture.ckpt / 'checkpoint').write_bytes(packed({**tree, **names}))
    fixture.tree('', tree)
    fixture.leaf('', ('stored', 'kernel'), stored['stored.kernel'])
    # Whether a 0-d array was a scalar is not told anywhere: then it is one.
    fixture.leaf('', ('stored', 'scale'), stored['stored.scale'], 'scalar')
    fixture.write('orbax')


def msgpack_with_metadata(fixture):
    """_METADATA and the msgpack file together, as Orbax 0.4 and 0.5 wrote them: entries with
    skip_deserialize take their value from the file, the others from zarr."""
    fixture.ckpt.mkdir()
    kernel = np.arange(12, dtype=np.int16).reshape(3, 4)
    zarr2(fixture.ckpt / 'kernel', kernel)
    zarr2(fixture.ckpt / 'step', np.array(7))
    aggregated = {'array': np.arange(6, dtype=np.float64).reshape(3, 2), 'number': 1.25,
                  'half': np.array([1, 2, 3], np.float16), 'none': None, 'empty': {}}
    types = {'kernel': ('np.ndarray', False), 'step': ('scalar', False), 'array': ('np.ndarray', True),
             'number': ('scalar', True), 'half': ('jax.Array', True), 'none': ('None', True), 'empty': ('Dict', True)}
    metadata = {'tree_metadata': {str((name,)): {
        'key_metadata': [{'key': name, 'key_type': 2}],
        'value_metadata': {'value_type': value_type, 'skip_deserialize': skip}}
        for name, (value_type, skip) in types.items()}, 'use_zarr3': False}
    (fixture.ckpt / '_METADATA').write_text(json.dumps(metadata))
    names = {'kernel': 'PLACEHOLDER://kernel', 'step': 'PLACEHOLDER://step'}
    (fixture.ckpt / 'checkpoint').write_bytes(msgpack_utils.msgpack_serialize({**aggregated, **names}))
    tree = {'kernel': kernel, 'step': 7, **aggregated}
    restored = v0.PyTreeCheckpointer().restore(fixture.ckpt)
    assert_restored(fixture, tree, restored)
    fixture.tree('', tree)
    fixture.write('orbax')


def assert_restored(fixture, want, got):
    got = dict(flatten(got))
    for path, value in flatten(want):
        where = (fixture.folder.name, path)
        assert path in got, where
        if kind(value) in ('none', 'empty'):
            continue
        ours, theirs = np.asarray(value), np.asarray(got[path])
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and (ours == theirs).all(), (
            where, ours, theirs)


# zarr

def ramp(name='float32', shape=(7, 10)):
    count = int(np.prod(shape, dtype=np.int64))
    return (np.arange(count) - 20).reshape(shape).astype(dtype(name))


LITTLE, BIG = ({'name': 'bytes', 'configuration': {'endian': end}} for end in ('little', 'big'))
BYTES, CRC32C = {'name': 'bytes'}, {'name': 'crc32c'}
ZSTD = {'name': 'zstd', 'configuration': {'level': 3}}


def blosc(cname, shuffle, typesize=4, clevel=5):
    return {'name': 'blosc', 'configuration': {'cname': cname, 'clevel': clevel, 'shuffle': shuffle,
                                               'typesize': typesize, 'blocksize': 0}}


def sharding(inner, codecs, index_codecs=(LITTLE, CRC32C), **more):
    return [{'name': 'sharding_indexed', 'configuration': {
        'chunk_shape': list(inner), 'codecs': list(codecs), 'index_codecs': list(index_codecs), **more}}]


def zarr3_codecs(fixture):
    """zarr3 arrays as other writers make them: codecs, byte order, transposition, sharding with several
    inner chunks, absent chunks, key encodings, edges that chunks do not divide, fill values."""
    def array(name, data, chunk, codecs, write=None, **metadata):
        """`write`: the part that is stored; the rest stays at the fill value, in absent chunks."""
        path = fixture.ckpt / name
        zero = False if data.dtype == bool else [0.0, 0.0] if data.dtype.kind == 'c' else 0
        fill = metadata.get('fill_value', zero)
        store = ts.open({'driver': 'zarr3', 'kvstore': f'file://{path}/', 'metadata': {
            'shape': list(data.shape), 'data_type': data.dtype.name,
            'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': list(chunk)}},
            'codecs': list(codecs), **metadata, 'fill_value': fill}}, create=True).result()
        if write is None:
            store.write(data).result()
        else:
            store[write].write(data[write]).result()
        record(fixture, name, store, data if write is None else None)

    f4 = ramp()
    array('plain', f4, (4, 6), [LITTLE])
    array('gzip', f4, (4, 6), [LITTLE, {'name': 'gzip', 'configuration': {'level': 5}}])
    for cname, shuffle in (('lz4', 'shuffle'), ('zstd', 'bitshuffle'), ('zlib', 'noshuffle'), ('lz4hc', 'shuffle'),
                           ('blosclz', 'bitshuffle')):
        array(f'blosc_{cname}_{shuffle}', ramp('int32', (20, 30)), (16, 16), [LITTLE, blosc(cname, shuffle)])
    array('blosc_f8', ramp('float64', (40,)), (40,), [LITTLE, blosc('lz4', 'shuffle', 8)])
    array('blosc_u1', ramp('uint8', (40,)), (16,), [BYTES, blosc('zstd', 'shuffle', 1)])
    array('blosc_stored', ramp('uint16', (9,)), (9,), [LITTLE, blosc('lz4', 'shuffle', 2, 0)])
    array('crc32c', f4, (4, 6), [LITTLE, CRC32C])
    array('zstd_crc32c', f4, (7, 10), [LITTLE, ZSTD, CRC32C])
    array('zstd_checksum', f4, (7, 10), [LITTLE, {'name': 'zstd', 'configuration': {'level': 3, 'checksum': True}}])
    array('transpose', f4, (4, 6), [{'name': 'transpose', 'configuration': {'order': [1, 0]}}, LITTLE])
    array('transpose_3d', ramp('int16', (3, 4, 5)), (2, 3, 4),
          [{'name': 'transpose', 'configuration': {'order': [2, 0, 1]}}, LITTLE, ZSTD])
    array('big_endian', ramp('int64'), (4, 6), [BIG])
    array('big_endian_c8', ramp('complex64', (5,)), (2,), [BIG])
    array('big_endian_bf16', ramp('bfloat16', (5,)), (2,), [BIG, ZSTD])
    array('sharded', f4, (4, 6), sharding((2, 3), [LITTLE, ZSTD]))
    array('sharded_start', f4, (4, 6), sharding((2, 3), [LITTLE], index_location='start'))
    array('sharded_start_crc', f4, (4, 6), sharding((2, 2), [LITTLE, ZSTD, CRC32C], index_location='start'))
    array('sharded_index_no_crc', f4, (4, 6), sharding((2, 3), [LITTLE], [LITTLE]))
    array('sharded_index_big_endian', f4, (4, 6), sharding((2, 3), [LITTLE], [BIG, CRC32C]))
    array('sharded_transposed_inside', f4, (4, 6),
          sharding((2, 3), [{'name': 'transpose', 'configuration': {'order': [1, 0]}}, BIG]))
    array('sharded_absent_inner', f4, (4, 6), sharding((2, 3), [LITTLE, ZSTD]), np.s_[2:5, 3:6], fill_value=7.5)
    array('sharded_nested', ramp('int32', (8, 8)), (8, 4),
          sharding((4, 4), sharding((2, 2), [LITTLE, ZSTD])))
    array('keys_v2', f4, (4, 6), [LITTLE], chunk_key_encoding={'name': 'v2'})
    array('keys_v2_slash', f4, (4, 6), [LITTLE],
          chunk_key_encoding={'name': 'v2', 'configuration': {'separator': '/'}})
    array('keys_default_dot', f4, (4, 6), [LITTLE],
          chunk_key_encoding={'name': 'default', 'configuration': {'separator': '.'}})
    array('missing_chunks', f4, (4, 6), [LITTLE], np.s_[3:6, 0:4], fill_value=-1.25)
    array('fill_nan', f4, (4, 6), [LITTLE], np.s_[0:3, 0:4], fill_value='NaN')
    array('fill_inf', ramp('float64', (5,)), (2,), [LITTLE], np.s_[0:2], fill_value='-Infinity')
    array('fill_hex', ramp('float32', (5,)), (2,), [LITTLE], np.s_[0:2], fill_value='0x7fc00000')
    array('fill_bf16', ramp('bfloat16', (5,)), (2,), [LITTLE], np.s_[0:2], fill_value=2.5)
    array('fill_bool', np.array([True, False, True, True]), (2,), [BYTES], np.s_[0:2], fill_value=True)
    array('fill_complex', ramp('complex64', (5,)), (2,), [LITTLE], np.s_[0:2], fill_value=[1.5, 'NaN'])
    array('fill_i8', ramp('int8', (5,)), (2,), [BYTES], np.s_[0:2], fill_value=-7)
    array('fill_u64', ramp('uint64', (5,)), (2,), [LITTLE], np.s_[0:2], fill_value=2**64 - 1)
    array('larger_chunk', ramp('int16', (3,)), (8,), [LITTLE, ZSTD])
    array('int4', ramp('int4', (5, 5)), (2, 5), [BYTES, ZSTD])
    array('zero_size', ramp('float32', (0, 3)), (1, 3), [LITTLE])
    array('scalar', np.array(2.5), (), [LITTLE])
    array('scalar_sharded', np.array(-3, np.int32), (), sharding((), [LITTLE, ZSTD]))
    fixture.write('orbax')


def zarr2_codecs(fixture):
    """zarr2 arrays as other writers make them: compressors, byte order, Fortran order, separators, fill values."""
    def array(name, data, chunks, write=None, **metadata):
        path = fixture.ckpt / name
        store = ts.open({'driver': 'zarr', 'kvstore': f'file://{path}/', 'metadata': {
            'shape': list(data.shape), 'chunks': list(chunks), 'dtype': zarr2_dtype(data.dtype),
            'compressor': None, **metadata}}, create=True).result()
        if write is None:
            store.write(data).result()
        else:
            store[write].write(data[write]).result()
        record(fixture, name, store, data if write is None else None)

    f4 = ramp()
    array('none', f4, (4, 6))
    for name, level in (('zlib', {'level': 6}), ('gzip', {'level': 1}), ('bz2', {'level': 9}), ('zstd', {'level': 5})):
        array(name, f4, (4, 6), compressor={'id': name, **level})
    for cname in ('lz4', 'zstd', 'zlib', 'lz4hc', 'blosclz'):
        for shuffle in (0, 1, 2):
            array(f'blosc_{cname}_{shuffle}', ramp('int32', (20, 30)), (20, 30),
                  compressor={'id': 'blosc', 'cname': cname, 'clevel': 5, 'shuffle': shuffle, 'blocksize': 0})
    array('fortran', f4, (4, 6), order='F', compressor={'id': 'zstd', 'level': 1})
    array('fortran_3d', ramp('int16', (3, 4, 5)), (2, 3, 4), order='F')
    array('big_endian', f4, (4, 6), dtype='>f4')
    array('big_endian_fortran', ramp('int64'), (4, 6), dtype='>i8', order='F')
    array('big_endian_c16', ramp('complex128', (5,)), (2,), dtype='>c16')
    array('slash', f4, (4, 6), dimension_separator='/')
    array('missing_zero', f4, (4, 6), np.s_[0:3, 0:4], fill_value=None)
    array('missing_fill', f4, (4, 6), np.s_[0:3, 0:4], fill_value=42.5)
    array('fill_nan', f4, (4, 6), np.s_[3:6, 4:8], fill_value='NaN')
    array('fill_inf', ramp('float64', (5,)), (2,), np.s_[0:2], fill_value='-Infinity')
    array('fill_i8', ramp('int8', (5,)), (2,), np.s_[0:2], fill_value=-7)
    array('fill_bool', np.array([True, False, True, True]), (2,), np.s_[0:2], fill_value=True)
    array('fill_complex', ramp('complex64', (5,)), (2,), np.s_[0:2], fill_value=[1.5, 'NaN'])
    array('larger_chunk', ramp('int16', (3,)), (8,), compressor={'id': 'zstd', 'level': 1})
    array('bfloat16', ramp('bfloat16'), (4, 6), compressor={'id': 'zlib', 'level': 1})
    array('fp8', ramp('float8_e4m3fn', (5, 5)), (2, 5))
    array('zero_size', ramp('float32', (0, 3)), (1, 3))
    array('scalar', np.array(2.5), ())
    fixture.write('orbax')


def record(fixture, name, store, wrote):
    """What TensorStore reads back is true; it must be what was written."""
    read = np.asarray(store.read().result())
    if read.dtype.name in ('int4', 'int2'):
        read = read.astype(np.int8).astype(read.dtype)
    if wrote is not None:
        assert same(read, wrote).all(), f'{fixture.folder.name}/{name}: TensorStore reads back other values'
    # A bare array directory does not tell scalars from 0-d arrays: those are scalars.
    fixture.leaf('', (name,), read, 'array' if read.ndim else 'scalar')


# safetensors

SAFETENSORS_NAMES = {
    'bool': 'BOOL', 'uint8': 'U8', 'int8': 'I8', 'float8_e5m2': 'F8_E5M2', 'float8_e4m3fn': 'F8_E4M3',
    'float8_e8m0fnu': 'F8_E8M0', 'float8_e4m3fnuz': 'F8_E4M3FNUZ', 'float8_e5m2fnuz': 'F8_E5M2FNUZ',
    'int16': 'I16', 'uint16': 'U16', 'float16': 'F16', 'bfloat16': 'BF16', 'int32': 'I32', 'uint32': 'U32',
    'float32': 'F32', 'complex64': 'C64', 'float64': 'F64', 'int64': 'I64', 'uint64': 'U64',
    'float4_e2m1fn': 'F4', 'float6_e2m3fn': 'F6_E2M3', 'float6_e3m2fn': 'F6_E3M2'}


def safetensors_file(path, tensors, metadata=None, align=True):
    """`tensors`: {name: array}, laid out in this order. `align` pads the header to a multiple of 8."""
    header, data = {'__metadata__': metadata} if metadata else {}, bytearray()
    for name, array in tensors.items():
        stored = bit_packed(array)
        header[name] = {'dtype': SAFETENSORS_NAMES[array.dtype.name], 'shape': list(array.shape),
                        'data_offsets': [len(data), len(data) + len(stored)]}
        data += stored
    text = json.dumps(header, ensure_ascii=False).encode()
    if align:
        text += b' ' * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, 'little') + text + data)
    try:
        with safetensors.safe_open(path, 'np') as file:
            assert set(file.keys()) == set(tensors), path
    except ImportError as e:
        raise AssertionError(f'{path}: {e}') from e


def bit_packed(array):
    """Types below one byte lie densely, the first element in the lowest bits."""
    n = bits(array.dtype.name)
    stored = memory_form(array)
    if n == 8 or array.dtype == bool or n > 8:
        return stored
    whole = sum(byte << (n * i) for i, byte in enumerate(stored))
    assert len(stored) * n % 8 == 0, 'safetensors has whole bytes only'
    return whole.to_bytes(len(stored) * n // 8, 'little')


def every_bit_pattern(name):
    """A tensor of the type with varied content: all patterns of small types, a ramp otherwise."""
    if name in ('bool', 'complex64'):
        return ramp(name, (3, 4)) if name == 'complex64' else np.array([True, False, True])
    if bits(name) <= 8:
        return np.arange(2 ** bits(name), dtype=np.uint8).view(dtype(name)).reshape(4, -1)
    return ramp(name, (3, 5))


def safetensors_types(fixture):
    """One .safetensors file: every byte-sized type, 0-d and empty tensors, odd names, metadata, a header
    that is not padded."""
    fixture.ckpt.mkdir()
    tensors = {f'type.{name}': every_bit_pattern(name) for name in SAFETENSORS_NAMES if bits(name) >= 8 or name == 'bool'}
    tensors |= {'zero.d': np.array(1.5, np.float32), 'zero.size': np.zeros((0, 4), np.int32),
                'model.layers.0/odd name "ü"': ramp('float16', (2, 3)), '': ramp('uint8', (3,))}
    safetensors_file(fixture.ckpt / 'model.safetensors', tensors, {'format': 'pt', 'note': 'ünï'}, align=False)
    for name, array in tensors.items():
        fixture.leaf('model.safetensors', (name,), array, 'array')
    fixture.write('safetensors')


def safetensors_index(fixture):
    """Two files and a Hugging Face index over them."""
    fixture.ckpt.mkdir()
    parts = [{'embed.weight': ramp('bfloat16', (8, 4)), 'layers.0.weight': ramp('float32', (4, 4))},
             {'layers.1.weight': ramp('float32', (4, 4)), 'norm.weight': ramp('float16', (4,))}]
    names = [f'model-0000{i + 1}-of-00002.safetensors' for i in range(2)]
    for name, tensors in zip(names, parts):
        safetensors_file(fixture.ckpt / name, tensors)
    (fixture.ckpt / 'model.safetensors.index.json').write_text(json.dumps({
        'metadata': {'total_size': 200}, 'weight_map': {t: name for name, part in zip(names, parts) for t in part}}))
    for tensors in parts:
        for name, array in tensors.items():
            fixture.leaf('', (name,), array, 'array')
    fixture.write('safetensors')


def safetensors_directory(fixture):
    """A directory of files without an index: together they are the checkpoint."""
    fixture.ckpt.mkdir()
    for i in range(3):
        tensors = {f'part{i}.w': ramp('int32', (i + 1, 3)), f'part{i}.b': ramp('float64', (i + 1,))}
        safetensors_file(fixture.ckpt / f'{"cab"[i]}.safetensors', tensors, {'part': str(i)})
        for name, array in tensors.items():
            fixture.leaf('', (name,), array, 'array')
    fixture.write('safetensors')


def safetensors_sub_byte(fixture):
    """4- and 6-bit floats, densely packed with the first element in the lowest bits."""
    fixture.ckpt.mkdir()
    tensors = {name: every_bit_pattern(name) for name in ('float4_e2m1fn', 'float6_e2m3fn', 'float6_e3m2fn')}
    tensors['odd_rows'] = every_bit_pattern('float4_e2m1fn').reshape(-1)[:6].reshape(2, 3)
    safetensors_file(fixture.ckpt / 'model.safetensors', tensors)
    for name, array in tensors.items():
        fixture.leaf('model.safetensors', (name,), array, 'array')
    fixture.write('safetensors')


# names

def names_with_dots(fixture):
    """Names with dots that do not collide: their storage names are told apart by the tree alone."""
    tree = {'a.b': np.arange(3), 'a': {'c': np.arange(4.0), 'd.e': np.arange(2, dtype=np.int8)}, '..': {'x': np.arange(5)},
            'v1.0': {'2.5': [np.arange(6), 3, 'text']}, '.': np.arange(7)}
    v1.save(fixture.ckpt, tree)
    assert_restored(fixture, tree, v1.load(fixture.ckpt))
    fixture.tree('state', tree)
    fixture.write('orbax')


def names_verbatim(fixture):
    """In OCDBT a name is a key and no path: absolute, climbing, empty, with doubled and trailing slashes, with
    a NUL, or equal to what another array's chunks are called. All of it is harmless and loads."""
    names = ['', '/abs', '../up', 'a//b', 'a/../b', 'nul\0', 'tr/', 'x', 'x/0', 'x/c', 'x/zarr.json', 'new\nline', 'back\\slash']
    tree = {name: np.arange(i, i + 3) for i, name in enumerate(names)}
    v1.save(fixture.ckpt, tree)
    assert_restored(fixture, tree, v1.load(fixture.ckpt))
    fixture.tree('state', tree)
    fixture.write('orbax')


def names_in_names(fixture):
    """Without OCDBT, an array whose directory is the chunk directory of another one."""
    tree = {'x': np.arange(3), 'x/c': np.arange(4.0), 'y': {'z/0': np.arange(5, dtype=np.int8)}}
    context = v1.Context()
    context.array.saving.use_ocdbt = False
    with context:
        v1.save(fixture.ckpt, tree)
    assert_restored(fixture, tree, v1.load(fixture.ckpt))
    fixture.tree('state', tree)
    fixture.write('orbax')


def names_that_collide(fixture):
    """The key a.b beside the key b below a: one storage name for two leaves, of which Orbax keeps one.
    Nobody can tell whose data it is."""
    v1.save(fixture.ckpt, {'a.b': np.arange(3), 'a': {'b': np.arange(3) + 10}, 'fine': np.arange(2)})
    fixture.write('refused', exit=3)


def name_absolute(fixture):
    """Without OCDBT, a name that is an absolute path: Orbax reads the array it points to, outside of the
    checkpoint. @OUTSIDE@ is to be replaced by the path of such an array."""
    hostile(fixture, '@OUTSIDE@')


def name_dotdot(fixture):
    """Without OCDBT, a name that climbs out of the checkpoint."""
    hostile(fixture, '../outside')
    zarr2(fixture.folder / 'outside', ramp('float32', (2, 2)))


def hostile(fixture, name):
    """A bare item with one honest array and one that lies outside."""
    fixture.ckpt.mkdir()
    zarr2(fixture.ckpt / 'honest', ramp('float32', (2, 2)))
    metadata = {'tree_metadata': {str((key,)): {
        'key_metadata': [{'key': key, 'key_type': 2}],
        'value_metadata': {'value_type': 'np.ndarray', 'skip_deserialize': False}} for key in ('honest', name)},
        'use_zarr3': False, 'use_ocdbt': False}
    (fixture.ckpt / '_METADATA').write_text(json.dumps(metadata))
    fixture.write('refused', exit=3)
