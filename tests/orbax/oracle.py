"""The judge of Touchdown's tests: the real Orbax, TensorStore, ml_dtypes and safetensors.

usage: oracle.py differential --seed N --out DIR [--count K]   random checkpoints, loads, expected dumps
       oracle.py casts --out DIR                               golden cast tables
       oracle.py fixtures --out DIR                            fixtures that the corpus lacks
       oracle.py compat --out DIR                              checkpoints that the Orbax package carries
       oracle.py check --out DIR                               are the dumps of a differential run consistent?

The same seed gives the same cases. What the outputs look like: the module of each verb.
"""

import argparse
import json
import os
import sys
import time

# Before jax is imported anywhere: eight CPU devices to shard over, and no search for accelerators.
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_ENABLE_X64'] = 'true'       # or 64-bit arrays would be cast to 32 bits unasked


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('verb', choices=['differential', 'casts', 'fixtures', 'compat', 'check'])
    parser.add_argument('--out', required=True)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--count', type=int, default=40)
    args = parser.parse_args()
    silence()
    start = time.monotonic()
    if args.verb == 'differential':
        import differential
        report = differential.run(args.seed, args.out, args.count)
        report['cases'] = len(report['cases'])
    elif args.verb == 'casts':
        import casts
        report = casts.run(args.out)
    elif args.verb == 'fixtures':
        import fixtures
        report = fixtures.run(args.out)
    elif args.verb == 'compat':
        import compat
        report = compat.run(args.out)
    else:
        import check
        report = check.run(args.out)
    print(json.dumps({**report, 'seconds': round(time.monotonic() - start, 1)}))


def silence():
    """Orbax logs and warns about ordinary things; what matters here is raised."""
    import logging
    import warnings
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')


if __name__ == '__main__':
    sys.exit(main())
