"""Databases and arrays that Touchdown wrote, read by TensorStore.

`<out>/index.json`: {"databases": [name], "arrays": [{"database", "prefix", "driver", "metadata_key", "elements", "mask"}]}
`<out>/<database>/`: an OCDBT database; `<out>/<database>.expected`: its keys and values, each with its length (u32le)
before it; `elements` are the array's bytes in hexadecimal, compared after `mask` (for elements of fewer than eight bits).

Every database gets one more key, `appended` with the value `by TensorStore`, for Touchdown to read.
"""

import json
import os

import numpy as np
import tensorstore as ts


def run(out):
    with open(os.path.join(out, 'index.json')) as file:
        index = json.load(file)
    keys = sum(check_database(out, name) for name in index['databases'])
    for array in index['arrays']:
        check_array(out, array)
    for name in index['databases']:
        store(out, name).write(b'appended', b'by TensorStore').result()
    return {'databases': len(index['databases']), 'keys': keys, 'arrays': len(index['arrays'])}


def spec(out, name, prefix=''):
    return {'driver': 'ocdbt', 'base': f'file://{os.path.abspath(out)}/{name}/', 'path': prefix}


def store(out, name):
    return ts.KvStore.open(spec(out, name)).result()


def check_database(out, name):
    expected = {}
    with open(os.path.join(out, f'{name}.expected'), 'rb') as file:
        data = file.read()
    fields, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at:at + 4], 'little')
        fields.append(data[at + 4:at + 4 + length])
        at += 4 + length
    expected = dict(zip(fields[::2], fields[1::2]))
    kvstore = store(out, name)
    listed = sorted(kvstore.list().result())    # several nodes are listed as they arrive
    assert listed == sorted(expected), f'{name}: {len(listed)} keys are listed, not {len(expected)}'
    reads = {key: kvstore.read(key) for key in expected}
    for key, value in expected.items():
        assert reads[key].result().value == value, f'{name}: another value of {key!r}'
    return len(expected)


def check_array(out, array):
    kvstore = spec(out, array['database'], array['prefix'])
    opened = ts.open({'driver': array['driver'], 'kvstore': kvstore}).result()
    found = np.frombuffer(np.ascontiguousarray(opened.read().result()).tobytes(), np.uint8) & array['mask']
    elements = np.frombuffer(bytes.fromhex(array['elements']), np.uint8) & array['mask']
    assert np.array_equal(found, elements), f'{array["prefix"]}: other elements'
    # TensorStore's own document of such an array.
    written = store(out, array['database']).read(array['prefix'] + array['metadata_key']).result().value
    context = ts.Context()
    memory = {'driver': 'memory', 'path': 'a/'}
    metadata = json.loads(written)
    # What it decides itself, if it may.
    metadata.pop('fill_value')
    metadata.pop('chunk_key_encoding', None)
    ts.open({'driver': array['driver'], 'kvstore': memory, 'metadata': metadata}, create=True, context=context).result()
    own = ts.KvStore.open(memory, context=context).result().read(array['metadata_key']).result().value
    assert own == written, f'{array["prefix"]}: TensorStore writes\n{own}\nnot\n{written}'
