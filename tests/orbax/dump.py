"""Writes and reads the dump form of `touchdown load --dump`: dump.json and raw shard files."""

import json
import math
import pathlib

import numpy as np

from elements import from_memory_form, memory_form


class DumpWriter:
    """Collects leaves; `close` writes dump.json. Equal shards share one file, as replicas may."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True)
        self.leaves = []
        self.files = {}

    def array(self, path, dtype, shape, shards, kind='array', **more):
        """`shards`: one (index, array) per device in mesh order."""
        entries = []
        for position, (index, data) in enumerate(shards):
            assert list(data.shape) == [b - a for a, b in index], (path, index, data.shape)
            assert data.dtype.name == dtype, (path, data.dtype, dtype)
            entries.append({'device': position, 'index': [list(map(int, pair)) for pair in index],
                            'file': self._file(memory_form(data))})
        self.leaves.append({'path': list(path), 'kind': kind, 'dtype': dtype,
                            'shape': list(map(int, shape)), 'value': None, 'shards': entries, **more})

    def scalar(self, path, dtype, value):
        self.leaves.append({'path': list(path), 'kind': 'scalar', 'dtype': dtype, 'shape': [],
                            'value': json_value(value), 'shards': []})

    def plain(self, path, kind, value=None):
        """A string, none or empty leaf."""
        self.leaves.append({'path': list(path), 'kind': kind, 'dtype': None, 'shape': None,
                            'value': value, 'shards': []})

    def close(self):
        body = {'schema': 1, 'leaves': self.leaves}
        (self.folder / 'dump.json').write_text(json.dumps(body, indent=1, allow_nan=False) + '\n')

    def _file(self, data):
        if data not in self.files:
            name = f'{len(self.files)}.bin'
            (self.folder / name).write_bytes(data)
            self.files[data] = name
        return self.files[data]


def json_value(value):
    """JSON has no NaN and no infinities: they are spelled as strings."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        return 'NaN' if value != value else 'Infinity' if value > 0 else '-Infinity'
    return value


def read_dump(folder):
    """{path: leaf}; an array leaf gains `global`, put together from its shards. Checks consistency."""
    folder = pathlib.Path(folder)
    leaves = {}
    for leaf in json.loads((folder / 'dump.json').read_text())['leaves']:
        path = tuple(leaf['path'])
        assert path not in leaves, f'{folder}: {path} twice'
        if leaf['kind'] in ('array', 'key'):
            leaf['global'] = assemble(folder, leaf)
        leaves[path] = leaf
    return leaves


def assemble(folder, leaf):
    shape = leaf['shape']
    raw_width = None
    whole = seen = None
    for position, shard in enumerate(leaf['shards']):
        assert shard['device'] == position, (folder, leaf['path'], 'devices out of order')
        part = from_memory_form((folder / shard['file']).read_bytes(), leaf['dtype'],
                                [b - a for a, b in shard['index']])
        raw = np.frombuffer(memory_form(part), f'V{part.dtype.itemsize}').reshape(part.shape)
        if whole is None:
            raw_width = raw.dtype
            whole, seen = np.zeros(shape, raw_width), np.zeros(shape, bool)
        place = tuple(slice(a, b) for a, b in shard['index'])
        old = whole[place][seen[place]]
        assert old.tobytes() == raw[seen[place]].tobytes(), (folder, leaf['path'], 'replicas differ')
        whole[place], seen[place] = raw, True
    assert seen is not None and seen.all(), (folder, leaf['path'], 'not covered by its shards')
    return from_memory_form(whole.tobytes(), leaf['dtype'], shape)
