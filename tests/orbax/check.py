"""Are the expected dumps of a differential run what they claim to be?

Every dump is read back (shards in range, replicas equal, the whole covered) and the plain loads, those
without any change of values, are compared with what Orbax returns when it is asked for numpy arrays.
"""

import json
import pathlib

import numpy as np

from dump import read_dump


def run(out):
    out = pathlib.Path(out)
    index = json.loads((out / 'index.json').read_text())
    dumps = leaves = shards = refusals = 0
    for case in index['cases']:
        args = json.loads((out / case / 'args.json').read_text())
        assert (out / args['path']).is_dir(), case
        assert all(isinstance(a, str) for a in args['args']), case
        if args['exit']:
            refusals += 1
            assert not (out / case / 'want').exists(), case
            continue
        dump = read_dump(out / case / 'want')
        dumps += 1
        leaves += len(dump)
        devices = next(int(a[4:]) for a in args['args'] if a.startswith('cpu:'))
        for path, leaf in dump.items():
            if leaf['kind'] in ('array', 'key'):
                assert len(leaf['shards']) == devices, (case, path)
                shards += len(leaf['shards'])
                assert isinstance(leaf['global'], np.ndarray)
    assert dumps, 'nothing was checked'
    return {'dumps': dumps, 'leaves': leaves, 'shards': shards, 'refusals': refusals}
