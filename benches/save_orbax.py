"""Saves the state that benches/save.rs made with Orbax, and prints how long the call took.

usage: save_orbax.py FOLDER DESTINATION
"""

import json
import logging
import os
import pathlib
import resource
import sys
import time
import warnings

os.environ['JAX_PLATFORMS'] = 'cpu'
logging.disable(logging.WARNING)
warnings.simplefilter('ignore')

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from orbax.checkpoint import v1


def main():
    folder, destination = map(pathlib.Path, sys.argv[1:])
    tree = {}
    for entry in json.loads((folder / 'index.json').read_text()):
        array = np.fromfile(entry['file'], np.dtype(entry['dtype'])).reshape(entry['shape'])
        node = tree
        *parents, last = entry['name'].split('/')
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(array)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    v1.save(destination, tree)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({'seconds': round(seconds, 3), 'peak_mb_more': peak // 1024}))


main()
