"""Conversions that Touchdown made, judged by the packages that own the formats.

    <out>/index.json          {tensors: [case], orbax: [case]}
    <case>/want-state         the dump of the source (see saved.py)
    <case>/skipped.json       paths that were left out
    <case>/tensors[..]        what became of it: one file, or a directory of files
    <case>/source.safetensors written by the safetensors package; `ckpt` is the Orbax checkpoint that it became
"""

import json
import pathlib

import numpy as np
import safetensors
import safetensors.numpy
from orbax.checkpoint import v1

from dump import json_value, read_dump
from elements import bits, from_memory_form, memory_form, same
from fixtures import bit_packed
from saved import walk


def make(seed, out, count):
    """Files of random tensors, by the safetensors package."""
    for number in range(count):
        rng = np.random.default_rng([seed, number, 5])
        kinds = ['float32', 'float16', 'float64', 'int8', 'uint8', 'int16', 'int32', 'int64', 'uint64', 'bool']
        tensors = {}
        for at in range(int(rng.integers(1, 12))):
            shape = tuple(int(extent) for extent in rng.integers(1, 40, int(rng.integers(0, 4))))
            data = rng.standard_normal(shape) * 100
            tensors[f'model.layers.{at}.weight' if at % 2 else f't{at}'] = np.asarray(data).astype(rng.choice(kinds))
        folder = pathlib.Path(out) / str(number)
        folder.mkdir(parents=True)
        safetensors.numpy.save_file(tensors, folder / 'source.safetensors', metadata={'format': 'np'})
    return {'files': count}


def run(out):
    out = pathlib.Path(out)
    index = json.loads((out / 'index.json').read_text())
    return {'tensors': sum(judge_tensors(out / case) for case in index['tensors']),
            'arrays': sum(judge_orbax(out / case) for case in index['orbax'])}


def judge_tensors(case):
    """Every array, key and scalar of the source is a tensor of its name, type, shape and bytes; there are no others."""
    skipped = {tuple(path) for path in json.loads((case / 'skipped.json').read_text())}
    want = {path: leaf for path, leaf in read_dump(case / 'want-state').items()
            if path not in skipped and leaf['kind'] in ('array', 'key', 'scalar')}
    count = 0
    for place in case.glob('tensors*'):
        files = sorted(place.glob('*.safetensors')) if place.is_dir() else [place]
        found = {}
        for file in files:
            with safetensors.safe_open(file, framework='np') as opened:
                names = set(opened.keys())
            content = dict(safetensors.deserialize(file.read_bytes()))
            assert names == set(content) and not names & set(found), (file, names)
            found.update(content)
        if len(files) > 1:
            weight_map = json.loads((place / 'model.safetensors.index.json').read_text())['weight_map']
            assert set(weight_map) == set(found), (place, set(weight_map) ^ set(found))
        assert set(found) == {'.'.join(map(str, path)) for path in want}, (place, set(found), set(want))
        for path, leaf in want.items():
            got = found['.'.join(map(str, path))]
            data = bytes(got['data'])
            assert got['shape'] == leaf['shape'], (place, path, got['shape'])
            if leaf['kind'] == 'scalar':
                value = from_memory_form(data, leaf['dtype'], [])[()].item()
                value = [value.real, value.imag] if isinstance(value, complex) else json_value(value)
                assert repr(value) == repr(leaf['value']), (place, path, value)
                continue
            whole = leaf['global']
            expected = bit_packed(whole) if bits(leaf['dtype']) == 4 else memory_form(whole)
            assert data == bytes(expected), (place, path, leaf['dtype'])
        count += len(want)
    return count


def judge_orbax(case):
    """Orbax finds the tensors of the file."""
    want = safetensors.numpy.load_file(case / 'source.safetensors')
    got = {'.'.join(map(str, path)): leaf for path, leaf in walk(v1.load(case / 'ckpt'))}
    assert set(got) == set(want), (case, set(got) ^ set(want))
    for name, data in want.items():
        found = np.asarray(got[name])
        assert (found.dtype, found.shape) == (data.dtype, data.shape), (case, name, found.dtype, found.shape)
        assert same(found, data).all(), (case, name)
    return len(want)
