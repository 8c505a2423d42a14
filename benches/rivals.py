"""Loads the same checkpoints with Touchdown and with its rivals, in turns, in one run.

    cargo build --release --features cli
    target/tmp/orbax-*/bin/python benches/rivals.py make FOLDER      # the tests have made that environment
    target/tmp/orbax-*/bin/python benches/rivals.py run FOLDER --rounds 7 --out rivals.json --svg rivals.svg

`make` saves a state of 73 arrays (8 layers of bfloat16 weights and a float32 embedding, normally distributed, about 1.1 GB), by
rows over eight CPU devices, with Orbax v1 (zarr 3, zstd 3), Orbax v0 (zarr 2, zstd 1) and safetensors, has Touchdown convert it to
its own profiles, and saves 5,000 small arrays, a stack of layers in four-dimensional arrays, and states of 0.1 to 8 GB with Orbax.
What the weights are like to a compressor is in `histogram.json`: how often each exponent byte of the bfloat16 weights occurs.

Groups that say cold have the files' pages dropped before every load, and look that none is left (`fincore`).

`run` starts every loader in a process of its own, round after round. Every job ends with all arrays in memory that the loader
owns, in the stored types. `call` is the time from the call to the last array, imports and engine start-up apart; `process` is the
whole process. `check` loads everything once with all of them and compares the bytes, outside of any clock. All points are in the
output; nothing is left out but one round that warms the page cache.
"""

import argparse
import glob
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
import zlib

HERE = pathlib.Path(__file__).resolve().parent
TOUCHDOWN = os.environ.get('TOUCHDOWN', str(HERE.parent / 'target/release/touchdown'))
LAYERS, WIDTH = 8, 2048
# States of so many GB, in arrays of 32 MiB.
SIZES = [0.1, 0.5, 2, 8]

# name: (checkpoint, loader, arguments)
JOBS = {
    'orbax default, 8 devices': [
        ('touchdown', 'orbax_v1', 'touchdown', ['--devices', 'cpu:8']),
        ('orbax v1', 'orbax_v1', 'orbax_v1', []),
        ('tensorstore', 'orbax_v1', 'tensorstore', ['zarr3']),
    ],
    'orbax v0, 8 devices': [
        ('touchdown', 'orbax_v0', 'touchdown', ['--devices', 'cpu:8']),
        ('orbax v0', 'orbax_v0', 'orbax_v0', []),
        ('tensorstore', 'orbax_v0', 'tensorstore', ['zarr']),
    ],
    'saved by rows over 8, wanted by columns over 4': [
        ('touchdown', 'orbax_v1', 'touchdown',
         ['--devices', 'cpu:4', '--mesh', 'x=4', '--spec', 'layers/**=_,x', '--spec', 'embedding=_,x']),
        ('orbax v1', 'orbax_v1', 'orbax_v1_columns', []),
    ],
    'own profile against orbax default': [
        ('touchdown, gpu profile', 'own_gpu', 'touchdown', ['--devices', 'cpu:8']),
        ('touchdown, uncompressed', 'own_none', 'touchdown', ['--devices', 'cpu:8']),
        ('touchdown, uncompressed, --verify off', 'own_none', 'touchdown', ['--devices', 'cpu:8', '--verify', 'off']),
        ('orbax v1', 'orbax_v1', 'orbax_v1', []),
    ],
    'zstd 3 of ours against the same of orbax': [
        ('touchdown, inner chunks, checksums', 'own_zstd3', 'touchdown', ['--devices', 'cpu:8']),
        ('touchdown, as orbax saved it', 'orbax_v1', 'touchdown', ['--devices', 'cpu:8']),
        ('orbax v1', 'orbax_v1', 'orbax_v1', []),
    ],
    'layers stacked in 4-D arrays': [
        ('touchdown', 'stacked', 'touchdown', ['--devices', 'cpu:8']),
        ('orbax v1', 'stacked', 'orbax_v1', []),
        ('tensorstore', 'stacked', 'tensorstore', ['zarr3']),
    ],
    'safetensors': [
        ('touchdown, over 8 devices', 'model.safetensors', 'touchdown',
         ['--devices', 'cpu:8', '--spec', 'layers**=device', '--spec', 'embedding=device']),
        ('safetensors load_file', 'model.safetensors', 'safetensors', []),
        ('pread loop', 'model.safetensors', 'pread', []),
    ],
    '5,000 small leaves': [
        ('touchdown', 'small', 'touchdown', []),
        ('orbax v1', 'small', 'orbax_v1', []),
    ],
    'one layer of the 5,000 leaves': [
        ('touchdown', 'small', 'touchdown', ['--only', 'l7/**']),
    ],
    'cold: orbax default, 8 devices': [
        ('touchdown', 'orbax_v1', 'touchdown', ['--devices', 'cpu:8']),
        ('orbax v1', 'orbax_v1', 'orbax_v1', []),
        ('tensorstore', 'orbax_v1', 'tensorstore', ['zarr3']),
    ],
    'cold: safetensors': [
        ('touchdown, over 8 devices', 'model.safetensors', 'touchdown',
         ['--devices', 'cpu:8', '--spec', 'layers**=device', '--spec', 'embedding=device']),
        ('safetensors load_file', 'model.safetensors', 'safetensors', []),
        ('pread loop', 'model.safetensors', 'pread', []),
    ],
} | {
    f'{gigabytes} GB of bfloat16': [
        ('touchdown', f'size_{gigabytes}', 'touchdown', ['--devices', 'cpu:8']),
        ('orbax v1', f'size_{gigabytes}', 'orbax_v1', []),
    ]
    for gigabytes in SIZES
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('verb', choices=['make', 'check', 'run', 'job'])
    parser.add_argument('folder', type=pathlib.Path)
    parser.add_argument('rest', nargs='*')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--out', type=pathlib.Path)
    parser.add_argument('--svg', type=pathlib.Path)
    parser.add_argument('--only', help='run the groups whose name has this in it')
    args = parser.parse_args()
    if args.verb == 'make':
        make(args.folder)
    elif args.verb == 'check':
        check(args.folder)
    elif args.verb == 'job':
        job(args.folder, args.rest[0], args.rest[1:])
    else:
        run(args)


# ---------------------------------------------------------------- what is loaded

def quiet_jax():
    import logging
    import warnings
    os.environ['JAX_PLATFORMS'] = 'cpu'
    os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')


def make(folder):
    quiet_jax()
    import jax
    import ml_dtypes
    import numpy as np
    import orbax.checkpoint as v0
    import safetensors.numpy
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from orbax.checkpoint import v1

    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    tree = {'embedding': rng.standard_normal((16_384, WIDTH), np.float32) * np.float32(0.02), 'layers': []}
    for _ in range(LAYERS):
        layer = {}
        for name, shape in [('q', (WIDTH, WIDTH)), ('k', (WIDTH, WIDTH)), ('v', (WIDTH, WIDTH)), ('o', (WIDTH, WIDTH)),
                            ('up', (WIDTH, 4 * WIDTH)), ('gate', (WIDTH, 4 * WIDTH)), ('down', (4 * WIDTH, WIDTH)),
                            ('norm_in', (WIDTH, 8)), ('norm_out', (WIDTH, 8))]:
            layer[name] = (rng.standard_normal(shape, np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
        tree['layers'].append(layer)
    rows = NamedSharding(Mesh(np.array(jax.devices()), ['x']), PartitionSpec('x'))
    sharded = jax.tree.map(lambda array: jax.device_put(array, rows), tree)
    v1.save((folder / 'orbax_v1').absolute(), sharded)
    handler = v0.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False)
    v0.Checkpointer(handler).save((folder / 'orbax_v0').absolute(), args=v0.args.PyTreeSave(sharded))
    flat = {'.'.join(str(getattr(key, 'key', getattr(key, 'idx', key))) for key in path): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    safetensors.numpy.save_file(flat, folder / 'model.safetensors')
    small = {f'l{layer}': {f'w{at}': rng.standard_normal((16, 16), np.float32) for at in range(50)} for layer in range(100)}
    v1.save((folder / 'small').absolute(), small)
    counts = np.bincount((tree['layers'][0]['up'].view(np.uint16) >> 7 & 0xFF).ravel(), minlength=256)
    (folder / 'histogram.json').write_text(json.dumps({int(at): int(counts[at]) for at in np.flatnonzero(counts)}))
    stacked = {name: (rng.standard_normal((LAYERS, 16, 128, WIDTH), np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
               for name in ['q', 'k', 'v', 'o']}
    heads = NamedSharding(Mesh(np.array(jax.devices()), ['x']), PartitionSpec(None, 'x'))
    v1.save((folder / 'stacked').absolute(), jax.tree.map(lambda array: jax.device_put(array, heads), stacked))
    rows_of_32_mib = (rng.standard_normal((8192, WIDTH), np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    for gigabytes in SIZES:
        count = max(1, round(gigabytes * 1e9 / rows_of_32_mib.nbytes))
        sized = {f'w{at}': jax.device_put(rows_of_32_mib, rows) for at in range(count)}
        v1.save((folder / f'size_{gigabytes}').absolute(), sized)
    for name, compression in [('own_gpu', 'gpu'), ('own_none', 'none'), ('own_zstd3', 'zstd:3')]:
        subprocess.run([TOUCHDOWN, 'convert', folder / 'orbax_v1', folder / name, '--to', 'orbax',
                        '--compression', compression], check=True, stdout=subprocess.DEVNULL)
    print(json.dumps({'bytes': sum(leaf.nbytes for leaf in flat.values()), 'arrays': len(flat)}))


# ---------------------------------------------------------------- loaders: each returns {name: array} and how long the call took

def load_orbax_v1(path, _):
    quiet_jax()
    import jax
    from orbax.checkpoint import v1
    jax.devices()
    start = time.perf_counter()
    tree = v1.load(path.absolute())
    jax.block_until_ready(tree)
    return tree, time.perf_counter() - start


def load_orbax_v1_columns(path, _):
    quiet_jax()
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from orbax.checkpoint import v1
    columns = NamedSharding(Mesh(np.array(jax.devices()[:4]), ['x']), PartitionSpec(None, 'x'))
    start = time.perf_counter()
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=columns),
                          v1.metadata(path.absolute()).metadata)
    tree = v1.load(path.absolute(), target)
    jax.block_until_ready(tree)
    return tree, time.perf_counter() - start


def load_orbax_v0(path, _):
    quiet_jax()
    import jax
    import orbax.checkpoint as v0
    jax.devices()
    start = time.perf_counter()
    handler = v0.PyTreeCheckpointHandler()
    found = v0.Checkpointer(handler).metadata(path.absolute())
    found = getattr(found, 'item_metadata', found)
    found = getattr(found, 'tree', found)
    arguments = jax.tree.map(lambda leaf: v0.ArrayRestoreArgs(sharding=leaf.sharding.to_jax_sharding()), found)
    tree = v0.Checkpointer(handler).restore(path.absolute(), args=v0.args.PyTreeRestore(restore_args=arguments))
    jax.block_until_ready(tree)
    return tree, time.perf_counter() - start


def load_tensorstore(path, arguments):
    import tensorstore as ts
    item = path / 'state' if (path / 'state').exists() else path
    start = time.perf_counter()
    base = f'file://{item.absolute()}/'
    keys = ts.KvStore.open({'driver': 'ocdbt', 'base': base}).result().list().result()
    ends = b'/zarr.json' if arguments[0] == 'zarr3' else b'/.zarray'
    names = [key[:-len(ends)].decode() for key in keys if key.endswith(ends)]
    context = ts.Context()
    opened = [ts.open({'driver': arguments[0], 'kvstore': {'driver': 'ocdbt', 'base': base, 'path': name}},
                      open=True, context=context) for name in names]
    reads = [array.result().read() for array in opened]
    tree = {name: read.result() for name, read in zip(names, reads)}
    return tree, time.perf_counter() - start


def load_safetensors(path, _):
    import ml_dtypes  # noqa: F401
    import safetensors.numpy
    start = time.perf_counter()
    tree = safetensors.numpy.load_file(path)
    return tree, time.perf_counter() - start


def load_pread(path, _):
    """The bytes of the file in memory, and nothing else: what no loader of whole files can beat without sharing pages."""
    import numpy as np
    start = time.perf_counter()
    size = path.stat().st_size
    memory = np.empty(size, np.uint8)
    view, file, at = memoryview(memory), os.open(path, os.O_RDONLY), 0
    while at < size:
        at += os.preadv(file, [view[at:at + (8 << 20)]], at)
    return {'file': memory}, time.perf_counter() - start


def job(path, loader, arguments):
    tree, seconds = globals()[f'load_{loader}'](path, arguments)
    times = os.times()
    print(json.dumps({'call': seconds, 'cpu': times.user + times.system, 'peak_mb': peak_mb(), 'loaded': len(tree)}))


def peak_mb():
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# ---------------------------------------------------------------- running and comparing

def start(folder, checkpoint, loader, arguments):
    """One process; its figures."""
    path = folder / checkpoint
    if loader == 'touchdown':
        command = [TOUCHDOWN, 'load', path, '--json', *arguments]
    else:
        command = [sys.executable, __file__, 'job', path, loader, *arguments]
    before = os.times()
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    process = time.perf_counter() - began
    after = os.times()
    said = json.loads(done.stdout)
    return {'call': said.get('call', said.get('seconds')), 'process': process,
            'cpu': after.children_user + after.children_system - before.children_user - before.children_system,
            'bytes_read': said.get('bytes_read'), 'peak_mb': said.get('peak_mb', said.get('peak_host_bytes', 0) >> 20)}


def evict(path):
    """Drops the pages of all files from the cache, and makes sure that they are gone."""
    files = [path] if path.is_file() else [file for file in path.rglob('*') if file.is_file()]
    for file in files:
        with open(file, 'rb') as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = ['fincore', '--bytes', '--noheadings', '--output', 'RES', *map(str, files)]
    left = sum(map(int, subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.split()))
    assert left < 1 << 20, f'{left} bytes of {path} are still in the page cache'


def run(args):
    groups = {name: jobs for name, jobs in JOBS.items() if not args.only or args.only in name}
    points = {name: {job[0]: [] for job in jobs} for name, jobs in groups.items()}
    for number in range(args.rounds + 1):
        for name, jobs in groups.items():
            # Another order each time, so that nobody always comes after the same.
            for label, *rest in jobs[number % len(jobs):] + jobs[:number % len(jobs)]:
                if name.startswith('cold'):
                    evict(args.folder / rest[0])
                point = start(args.folder, *rest)
                if number > 0:
                    points[name][label].append(point)
        print(f'round {number} of {args.rounds}', file=sys.stderr)
    result = {'machine': machine(), 'versions': versions(), 'rounds': args.rounds, 'points': points}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + '\n')
    print(table(points))
    if args.svg:
        args.svg.write_text(svg(points))


def machine():
    with open('/proc/cpuinfo') as file:
        model = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), platform.machine())
    return {'cpu': model, 'cores': os.cpu_count(), 'kernel': platform.release()}


def versions():
    from importlib.metadata import version
    names = ['orbax-checkpoint', 'jax', 'tensorstore', 'safetensors', 'numpy']
    ours = subprocess.run([TOUCHDOWN, '--version'], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return {name: version(name) for name in names} | {'touchdown': ours}


def median(points, figure):
    return statistics.median(point[figure] for point in points)


def table(points):
    lines = []
    for name, loaders in points.items():
        lines.append(f'\n{name}')
        first = next(iter(loaders.values()))
        for label, found in loaders.items():
            calls = [point['call'] for point in found]
            lines.append(
                f'  {label:<40} {median(found, "call"):8.3f} s ({min(calls):.3f} to {max(calls):.3f})  '
                f'x{median(found, "call") / median(first, "call"):5.2f}   process {median(found, "process"):7.3f} s   '
                f'cpu {median(found, "cpu"):6.2f} s   peak {median(found, "peak_mb"):6.0f} MB')
    return '\n'.join(lines)


def svg(points):
    """Bars of the median calls, one block a group, each scaled to its slowest."""
    rows, y = [], 10
    for name, loaders in points.items():
        y += 26
        rows.append(f'<text x="10" y="{y}" font-weight="bold">{name}</text>')
        slowest = max(median(found, 'call') for found in loaders.values())
        for label, found in loaders.items():
            y += 20
            seconds = median(found, 'call')
            width = max(1, 420 * seconds / slowest)
            colour = '#2563eb' if label.startswith('touchdown') else '#9ca3af'
            rows.append(f'<text x="10" y="{y}">{label}</text><rect x="290" y="{y - 12}" width="{width:.0f}" height="14" '
                        f'fill="{colour}"/><text x="{296 + width:.0f}" y="{y}">{seconds:.3f} s</text>')
    rows.append(by_size(points, y + 40))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="{y + 340}" font-family="sans-serif" font-size="13">'
            f'<rect width="100%" height="100%" fill="white"/>{"".join(rows)}</svg>\n')


def by_size(points, top):
    """Lines of GB/s over the size of the state, the size on a logarithmic axis."""
    rates = {}
    for gigabytes in SIZES:
        for label, found in points.get(f'{gigabytes} GB of bfloat16', {}).items():
            rates.setdefault(label, []).append((gigabytes, gigabytes / median(found, 'call')))
    if not rates:
        return ''
    fastest = max(rate for line in rates.values() for _, rate in line)
    across = lambda gigabytes: 60 + 640 * math.log(gigabytes / SIZES[0]) / math.log(SIZES[-1] / SIZES[0])  # noqa: E731
    up = lambda rate: top + 240 - 210 * rate / fastest  # noqa: E731
    drawn = [f'<text x="10" y="{top}" font-weight="bold">GB/s by the size of the state</text>',
             f'<line x1="60" y1="{up(0)}" x2="720" y2="{up(0)}" stroke="black"/>']
    drawn += [f'<text x="{across(gigabytes) - 15:.0f}" y="{top + 260}">{gigabytes} GB</text>' for gigabytes in SIZES]
    for label, line in rates.items():
        colour = '#2563eb' if label.startswith('touchdown') else '#9ca3af'
        path = ' '.join(f'{across(gigabytes):.0f},{up(rate):.0f}' for gigabytes, rate in line)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [f'<text x="{across(gigabytes):.0f}" y="{up(rate) - 6:.0f}">{rate:.2f}</text>' for gigabytes, rate in line]
        drawn.append(f'<text x="{across(line[-1][0]) + 12:.0f}" y="{up(line[-1][1]) + 16:.0f}">{label}</text>')
    return ''.join(drawn)


def check(folder):
    """Every loader of a group has the same bytes for every array."""
    sys.path.insert(0, str(HERE.parent / 'tests/orbax'))
    import numpy as np
    from dump import read_dump
    for name, jobs in JOBS.items():
        found = {}
        for label, checkpoint, loader, arguments in jobs:
            path = folder / checkpoint
            if loader == 'pread':
                continue
            if loader == 'touchdown':
                dump = folder / 'check-dump'
                subprocess.run(['rm', '-rf', dump], check=True)
                subprocess.run([TOUCHDOWN, 'load', path, '--dump', dump, *arguments], check=True, stdout=subprocess.DEVNULL)
                sums = {'.'.join(map(str, path)): zlib.crc32(np.ascontiguousarray(leaf['global']).tobytes())
                        for path, leaf in read_dump(dump).items() if leaf['kind'] == 'array'}
                subprocess.run(['rm', '-rf', dump], check=True)
            else:
                command = [sys.executable, '-c', CHECK, str(HERE), str(path), loader, *arguments]
                sums = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            found[label] = sums
        first = next(iter(found.values()))
        assert first and all(sums == first for sums in found.values()), (name, {k: len(v) for k, v in found.items()})
        print(f'{name}: {len(first)} arrays are the same for {", ".join(found)}')


CHECK = '''
import json, pathlib, sys, zlib
sys.path.insert(0, sys.argv[1])
import rivals
import numpy as np
tree, _ = getattr(rivals, f'load_{sys.argv[3]}')(pathlib.Path(sys.argv[2]), sys.argv[4:])
def walk(node, path=()):
    if isinstance(node, dict):
        for key, child in node.items(): yield from walk(child, (*path, key))
    elif isinstance(node, (list, tuple)):
        for key, child in enumerate(node): yield from walk(child, (*path, key))
    else:
        yield '.'.join(map(str, path)), zlib.crc32(np.ascontiguousarray(np.asarray(node)).tobytes())
print(json.dumps(dict(walk(tree))))
'''


if __name__ == '__main__':
    main()
