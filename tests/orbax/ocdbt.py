"""Just enough of an OCDBT encoder to make databases that TensorStore reads but would not write."""

import numpy as np
import tensorstore as ts

MANIFEST, NODE = 0x0CDB3A2A, 0x0CDB20DE
RAW, ZSTD, ZSTD_UNKNOWN_SIZE = 'raw', 'zstd', 'zstd without content size'


class Ref:
    """Where an encoded node or a value lies, and what a parent must say about a node."""

    def __init__(self, base, relative, offset, length, keys=0, tree_bytes=0, indirect=0):
        self.file, self.offset, self.length = (base, relative), offset, length
        self.keys, self.tree_bytes, self.indirect = keys, tree_bytes, indirect

    def below(self, base):
        """The same place, seen from a node that reaches this file through another base path."""
        return Ref(base, self.file[1], self.offset, self.length, self.keys, self.tree_bytes, self.indirect)


class DataFile:
    """A file of values and nodes; `base` and `relative` are what references to it say."""

    def __init__(self, base, relative):
        self.base, self.relative, self.data = base, relative, bytearray()

    def value(self, data):
        ref = Ref(self.base, self.relative, len(self.data), len(data))
        self.data += data
        return ref

    def leaf(self, entries, compression):
        """`entries`: sorted [(key, bytes inline or Ref)]."""
        refs = [value for _, value in entries if isinstance(value, Ref)]
        table, ids = file_table(refs)
        body = bytes([0]) + table + keys_columns([key for key, _ in entries])
        body += b''.join(uleb(v.length if isinstance(v, Ref) else len(v)) for _, v in entries)
        body += bytes(1 if isinstance(v, Ref) else 0 for _, v in entries)
        body += b''.join(uleb(ids[v.file]) for v in refs) + b''.join(uleb(v.offset) for v in refs)
        body += b''.join(v for _, v in entries if not isinstance(v, Ref))
        return self._node(body, compression, len(entries), 0, sum(ref.length for ref in refs))

    def interior(self, height, entries, compression):
        """`entries`: sorted [(key, length of the prefix that the subtree does not repeat, Ref)]."""
        refs = [ref for _, _, ref in entries]
        table, ids = file_table(refs)
        body = bytes([height]) + table + keys_columns([key for key, _, _ in entries],
                                                      [prefix for _, prefix, _ in entries])
        for column in (lambda r: ids[r.file], lambda r: r.offset, lambda r: r.length, lambda r: r.keys,
                       lambda r: r.tree_bytes, lambda r: r.indirect):
            body += b''.join(uleb(column(ref)) for ref in refs)
        return self._node(body, compression, sum(r.keys for r in refs), sum(r.tree_bytes for r in refs),
                          sum(r.indirect for r in refs))

    def _node(self, body, compression, keys, tree_bytes, indirect):
        encoded = envelope(NODE, body, compression)
        ref = self.value(encoded)
        ref.keys, ref.tree_bytes, ref.indirect = keys, tree_bytes + len(encoded), indirect
        return ref


def manifest(root, height, compression):
    """One version, generation 1, of the tree below `root`."""
    table, ids = file_table([root])
    config = bytes(range(16)) + bytes([0]) + uleb(1024) + uleb(100_000_000) + bytes([4]) + uleb(0)
    version = uleb(1) + uleb(1) + bytes([height]) + uleb(ids[root.file]) + uleb(root.offset) + uleb(root.length)
    version += uleb(root.keys) + uleb(root.tree_bytes) + uleb(root.indirect) + (1).to_bytes(8, 'little')
    return envelope(MANIFEST, config + table + version + uleb(0), compression)


def envelope(magic, body, compression):
    stored = {RAW: lambda b: b, ZSTD: zstd, ZSTD_UNKNOWN_SIZE: zstd_unknown_size}[compression](body)
    length = 4 + 8 + 1 + 1 + len(stored) + 4
    head = magic.to_bytes(4, 'big') + length.to_bytes(8, 'little') + bytes([0, 0 if compression == RAW else 1])
    return head + stored + crc32c(head + stored).to_bytes(4, 'little')


def file_table(refs):
    """(encoded table, {(base, relative): id})."""
    files = sorted({ref.file for ref in refs})
    paths = [(base + relative).encode() for base, relative in files]
    bases = [len(base.encode()) for base, _ in files]
    prefixes = [0]
    for i in range(1, len(files)):
        shared = common(paths[i - 1], paths[i])
        # Into the relative part only if the bases are the same.
        prefixes.append(shared if files[i][0] == files[i - 1][0] else min(shared, bases[i], bases[i - 1]))
    out = uleb(len(files)) + b''.join(map(uleb, prefixes[1:]))
    out += b''.join(uleb(len(path) - prefix) for path, prefix in zip(paths, prefixes))
    out += b''.join(map(uleb, bases))
    out += b''.join(path[prefix:] for path, prefix in zip(paths, prefixes))
    return (out if files else uleb(0)), {file: i for i, file in enumerate(files)}


def keys_columns(keys, subtree_prefixes=None):
    prefixes = [0] + [common(a, b) for a, b in zip(keys, keys[1:])]
    out = uleb(len(keys)) + b''.join(map(uleb, prefixes[1:]))
    out += b''.join(uleb(len(key) - prefix) for key, prefix in zip(keys, prefixes))
    if subtree_prefixes is not None:
        out += b''.join(map(uleb, subtree_prefixes))
    return out + b''.join(key[prefix:] for key, prefix in zip(keys, prefixes))


def common(a, b):
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def uleb(n):
    out = bytearray()
    while n >= 128:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def zstd(data):
    """One frame, by TensorStore: there is no zstd in Python 3.11."""
    array = ts.open({'driver': 'zarr3', 'kvstore': 'memory://', 'metadata': {
        'shape': [len(data)], 'data_type': 'uint8',
        'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [len(data)]}},
        # A fill value that no chunk consists of: else an all-zero chunk would not be stored.
        'fill_value': 0xa5,
        'codecs': [{'name': 'bytes'}, {'name': 'zstd', 'configuration': {'level': 3}}]}}, create=True).result()
    array.write(np.frombuffer(data, np.uint8)).result()
    return bytes(array.kvstore.read('c/0').result().value)


def zstd_unknown_size(data):
    """The frame of `zstd`, its header rewritten to state a window and no content size."""
    frame = zstd(data)
    descriptor = frame[4]
    size_flag, single_segment, checksum = descriptor >> 6, descriptor >> 5 & 1, descriptor >> 2 & 1
    assert descriptor & 3 == 0 and not checksum, 'an unexpected frame header'
    size_bytes = [1 if single_segment else 0, 2, 4, 8][size_flag]
    blocks = frame[5 + (0 if single_segment else 1) + size_bytes:]
    window_1mib = 10 << 3
    return frame[:4] + bytes([0, window_1mib]) + blocks


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _crc_table():
    table = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    return table


CRC_TABLE = _crc_table()
