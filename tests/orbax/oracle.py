"""The judge of Touchdown's tests: the real Orbax, TensorStore, ml_dtypes and safetensors.

usage: oracle.py differential --seed N --out DIR [--count K]   random checkpoints, loads, expected dumps
       oracle.py casts --out DIR                               golden cast tables
       oracle.py fixtures --out DIR                            fixtures that the corpus lacks
       oracle.py compat --out DIR                              checkpoints that the Orbax package carries
       oracle.py save_formats --out DIR                        databases that Touchdown wrote: does TensorStore read them?
       oracle.py saved-make --seed N --out DIR [--count K]     checkpoints by Orbax, for Touchdown to load and save again
       oracle.py saved --out DIR                               checkpoints that Touchdown saved: does Orbax load them?
       oracle.py converted-make --seed N --out DIR [--count K] files by safetensors, for Touchdown to convert
       oracle.py converted --out DIR                           conversions that Touchdown made: are they what they were?
       oracle.py sealed-make --out DIR                         checkpoints by Orbax, for Touchdown to seal
       oracle.py sealed --out DIR                              sealed checkpoints: does Orbax load them?
       oracle.py check --out DIR                               are the dumps of a differential run consistent?
       oracle.py layout-describe --seed N --out DIR [--count K] random trees, for Touchdown to write the metadata of
       oracle.py layout-judge --seed N --out DIR [--count K]   does Orbax load them?
       oracle.py layout-reprs --out DIR                        are the quoted names those of Python?
       oracle.py layout-tensors --out DIR                      does the safetensors package load the files?
       oracle.py training-write --out DIR                      roots of steps by Orbax's managers
       oracle.py training-read --out DIR                       roots of steps: what do Orbax's managers find?
       oracle.py training-go-on --out DIR                      roots of steps: do Orbax's managers go on?
       oracle.py training-policies --out DIR                   histories: what do Orbax's policies decide?

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
    parser.add_argument('verb', choices=[
        'differential', 'casts', 'fixtures', 'compat', 'save_formats', 'saved', 'saved-make', 'converted',
        'converted-make', 'sealed', 'sealed-make', 'check', 'training-write', 'training-read', 'training-go-on', 'training-policies',
        'layout-describe', 'layout-judge', 'layout-reprs', 'layout-tensors'])
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
    elif args.verb == 'save_formats':
        import save_formats
        report = save_formats.run(args.out)
    elif args.verb == 'saved':
        import saved
        report = saved.run(args.out)
    elif args.verb == 'saved-make':
        import saved
        report = saved.make(args.seed, args.out, args.count)
    elif args.verb == 'converted':
        import converted
        report = converted.run(args.out)
    elif args.verb == 'converted-make':
        import converted
        report = converted.make(args.seed, args.out, args.count)
    elif args.verb.startswith('sealed'):
        import sealed
        report = sealed.make(args.out) if args.verb == 'sealed-make' else sealed.judge(args.out)
    elif args.verb == 'check':
        import check
        report = check.run(args.out)
    elif args.verb.startswith('training-'):
        import training
        report = {'training-write': training.write, 'training-read': training.read,
                  'training-go-on': training.go_on, 'training-policies': training.policies}[args.verb](args.out)
    else:
        import save_layout
        report = {'layout-describe': lambda: save_layout.describe(args.seed, args.out, args.count),
                  'layout-judge': lambda: save_layout.judge(args.seed, args.out, args.count),
                  'layout-reprs': lambda: save_layout.reprs(args.out),
                  'layout-tensors': lambda: save_layout.tensors(args.out)}[args.verb]()
    print(json.dumps({**report, 'seconds': round(time.monotonic() - start, 1)}))


def silence():
    """Orbax logs and warns about ordinary things; what matters here is raised."""
    import logging
    import warnings
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')


if __name__ == '__main__':
    sys.exit(main())
