"""Tests and measures Touchdown on a machine with a GPU that has neither Rust nor the sources nor a network.

    python3 benches/gpu.py pack gpu.tar.gz        # where the sources are: builds, and packs what the other machine needs

    tar xf gpu.tar.gz && python3 gpu/gpu.py run   # where the GPU is

`pack` builds the load tests and the program, strips them, and packs them with the fixtures, the kernels compiled for the host and the
simulated driver: well below 64 MiB. A libc as new as the build machine's is needed where they run.

`run` takes these steps and goes on after one that fails:

  suite         the load tests on the machine's own driver and devices, the differential tests too where Python has Orbax
  sanitizer     some of them under compute-sanitizer: memcheck and initcheck (kernels here share no memory that could race)
  safetensors   a file of `--gigabytes`, less where there is no room
  uncompressed  the same as an Orbax checkpoint without compression
  zstd          the same compressed, level 3, as Orbax does it
  small         an Orbax checkpoint of 5,000 small arrays

each of the latter with `touchdown bench`, which has the rates of copies and kernels, and with loads in fresh processes, round by round
beside the rivals that Python has: Orbax onto JAX, safetensors, fastsafetensors, InstantTensor. It writes three files into `--out`, each
as it goes: `report.md`, the raw figures (`figures.json`) and what the tests printed (`log.txt`). Where time is short, `--steps
suite,zstd` takes only those, `--tests cuda,cudarc` only those binaries, and `--limit 500` ends after so many seconds, whatever is at
work then. With `--simulated` all of it runs on the simulated driver, which shows that the script works and nothing about speed: the
report says so.
"""

import argparse
import atexit
import datetime
import json
import os
import pathlib
import platform
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
TESTS = ['cuda', 'cuda_laws', 'cuda_memory', 'cuda_cli', 'differential', 'cudarc']
FEATURES = 'cli,cudarc'
PACK_BYTES_MAX = 64 << 20
STEPS = ['suite', 'sanitizer', 'safetensors', 'uncompressed', 'zstd', 'small']
SHARED_MEMORY = '/dev/shm'
# The steps whose checkpoints are made of the large file, and how they are compressed.
CONVERTED = {'uncompressed': 'none', 'zstd': 'zstd:3'}
# No command begins with less time left.
SECONDS_MIN = 5
# A load that casts bfloat16 to float32 holds nearly twice the model, and benchmarks and lanes take some.
GPU_SHARE = 0.42
# 'A few dozen' launches for 5,000 small arrays.
LAUNCHES_MAX = 48
# What each tool looks for; the tests reach every kernel and every kind of copy.
SANITIZERS = {
    'memcheck': ['--leak-check', 'full', '--report-api-errors', 'no'],
    'initcheck': [],
}
SANITIZED = ['every_cast_lands', 'meshes_of_devices', 'large_boxes', 'arrays_on_devices_are_loaded_into']


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest='verb', required=True)
    packing = verbs.add_parser('pack')
    packing.add_argument('archive', type=pathlib.Path)
    packing.add_argument('--profile', default='release', choices=['release', 'dev'], help='of the program, not of the tests')
    running = verbs.add_parser('run')
    running.add_argument('--out', type=pathlib.Path, default=pathlib.Path('gpu-report'))
    running.add_argument('--work', type=pathlib.Path, help='where checkpoints go (default: beside the report)')
    running.add_argument('--gigabytes', type=float, default=32, help='of each large checkpoint, in 10^9 bytes')
    running.add_argument('--rounds', type=int, default=5)
    running.add_argument('--limit', type=float, default=7200, help='seconds after which no command begins or goes on')
    running.add_argument('--steps', default=','.join(STEPS))
    running.add_argument('--tests', default=','.join(TESTS), help='which of the test binaries `suite` runs')
    running.add_argument('--simulated', action='store_true')
    job = verbs.add_parser('rival')
    job.add_argument('loader')
    job.add_argument('path', type=pathlib.Path)
    job.add_argument('--any-device', action='store_true')
    args = parser.parse_args()
    if args.verb == 'pack':
        pack(args.archive, args.profile)
    elif args.verb == 'rival':
        print(json.dumps(rival(args.loader, args.path, args.any_device)))
    else:
        Run(args).run()


# ---------------------------------------------------------------- packing

def pack(archive, profile):
    root = HERE.parent
    tests = built(root, ['test', '--no-run', '--features', FEATURES, *(word for name in TESTS for word in ['--test', name])])
    [program] = built(root, ['build', '--features', 'cli', '--bin', 'touchdown', '--profile', profile]).values()
    staging = root / 'target/gpu-pack'
    shutil.rmtree(staging, ignore_errors=True)
    for folder in ['bin', 'lib', 'tmp', 'tests']:
        (staging / folder).mkdir(parents=True)
    for name in TESTS:
        stripped(tests[name], staging / 'bin' / name)
    stripped(program, staging / 'bin/touchdown')
    stripped(pathlib.Path(tests['cuda']).with_name('libfakecuda.so'), staging / 'lib/libfakecuda.so')
    kernels(root, staging / 'lib/kernels.so')
    for folder in ['fixtures', 'orbax']:
        shutil.copytree(root / 'tests' / folder, staging / 'tests' / folder, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(__file__, staging / 'gpu.py')
    facts = {
        'commit': said(['git', '-C', root, 'rev-parse', 'HEAD']),
        'changed': bool(said(['git', '-C', root, 'status', '--porcelain', '--untracked-files=no'])),
        'rustc': said(['rustc', '--version']),
        'libc': ' '.join(platform.libc_ver()),
        'program': profile,
    }
    (staging / 'pack.json').write_text(json.dumps(facts, indent=1) + '\n')
    with tarfile.open(archive, 'w:gz') as tar:
        tar.add(staging, 'gpu')
    shutil.rmtree(staging)
    size = archive.stat().st_size
    if size > PACK_BYTES_MAX:
        sys.exit(f'{archive} has {size} bytes: more than {PACK_BYTES_MAX}')
    print(f'{archive}: {size / 2**20:.1f} MiB of {facts["commit"]}')


def built(root, command):
    """The executables that cargo has made, by the names of their targets."""
    command = ['cargo', *command, '--message-format', 'json-render-diagnostics']
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line['target']['name']: line['executable'] for line in lines if line.get('executable')}


def stripped(source, target):
    subprocess.run(['strip', '-o', target, source], check=True)


def kernels(root, target):
    """As the tests do it: see `kernels_of_the_host` in tests/support."""
    flags = ['-std=c++14', '-O2', '-fno-strict-aliasing', '-fPIC', '-shared', '-I', root / 'kernels']
    subprocess.run([os.environ.get('CXX', 'c++'), *flags, root / 'tests/kernels/shim.cpp', '-o', target], check=True)


def said(command):
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


# ---------------------------------------------------------------- running

class Run:
    def __init__(self, args):
        self.args = args
        self.out = args.out.absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        (args.work or self.out).mkdir(parents=True, exist_ok=True)
        self.work = pathlib.Path(tempfile.mkdtemp(prefix='work-', dir=args.work or self.out)).absolute()
        self.program = HERE / 'bin/touchdown'
        self.failed = []
        self.goals = []
        self.report = []
        self.figures = {}
        self.made = None
        self.end = time.monotonic() + args.limit
        (self.out / 'log.txt').write_text('')
        self.environment = dict(os.environ, PYTHONDONTWRITEBYTECODE='1')
        # Tests say themselves what is simulated for them.
        self.testing = self.environment | {'TOUCHDOWN_TEST_PACK': str(HERE)}
        if importable('orbax.checkpoint'):
            self.testing['TOUCHDOWN_TEST_PYTHON'] = sys.executable
        else:
            self.testing['TOUCHDOWN_SKIP_ORBAX'] = '1'
        if args.simulated:
            self.environment['TOUCHDOWN_LIBCUDA'] = str(HERE / 'lib/libfakecuda.so')
            self.environment['FAKECUDA_KERNELS'] = str(HERE / 'lib/kernels.so')
            self.environment['FAKECUDA_MEMORY'] = str(4 << 30)
        else:
            self.testing['TOUCHDOWN_TEST_GPU'] = '1'

    def run(self):
        started = datetime.datetime.now(datetime.timezone.utc)
        self.say('# Touchdown on a GPU\n')
        if self.args.simulated:
            self.say('**On the simulated driver: a rehearsal. No time or rate below says anything about a GPU.**\n')
        steps = self.args.steps.split(',')
        unknown = set(steps) - set(STEPS)
        if unknown:
            sys.exit(f'unknown steps {", ".join(sorted(unknown))}: there are {", ".join(STEPS)}')
        for step in ['machine', *steps]:
            if self.failed and step != 'machine' and 'machine' not in self.figures:
                break
            begun = time.time()
            try:
                getattr(self, step)()
            except Exception as error:  # The next step may succeed, and the report says what did not.
                self.fail(step, f'{type(error).__name__}: {error}')
            self.say(f'\n({step}: {time.time() - begun:.0f} s)\n')
        if self.goals:
            self.keep('goals', self.goals)
            reached = {'least': lambda value, bound: value >= bound, 'most': lambda value, bound: value <= bound}
            rows = [(goal, f'{value:.2f}', f'at {sense} {bound:g}', 'yes' if reached[sense](value, bound) else 'no')
                    for goal, value, sense, bound in self.goals]
            self.say('## Goals\n\n' + table(['', 'found', 'wanted', 'reached'], rows) + '\n')
        self.say('## Outcome\n')
        self.say('\n'.join(f'- FAILED {line}' for line in self.failed) or 'Everything that ran succeeded.')
        self.say(f'\nStarted {started:%Y-%m-%d %H:%M} UTC.')
        shutil.rmtree(self.work, ignore_errors=True)
        print(self.out / 'report.md')
        sys.exit(1 if self.failed else 0)

    def say(self, text):
        """A report that is written as it grows is there when the machine goes."""
        self.report.append(text)
        (self.out / 'report.md').write_text('\n'.join(self.report) + '\n')

    def fail(self, what, why):
        self.failed.append(f'{what}: {why}')
        self.say(f'**{what} failed: {why}**\n')

    def keep(self, name, figures):
        self.figures[name] = figures
        (self.out / 'figures.json').write_text(json.dumps(self.figures, indent=1) + '\n')

    def test(self, command, what):
        """Runs tests; the exit code, and what they printed, which goes to the log."""
        with tempfile.TemporaryFile() as file:
            try:
                code = self.process(command, self.testing, file, subprocess.STDOUT).returncode
            except subprocess.TimeoutExpired:
                code = 'none in time'
            file.seek(0)
            text = file.read().decode(errors='replace')
        with open(self.out / 'log.txt', 'a') as log:
            log.write(f'======== {what}: exit {code}\n{text}\n')
        return code, text

    def process(self, command, environment, stdout, stderr):
        left = self.end - time.monotonic()
        if left < SECONDS_MIN:
            raise RuntimeError('not run: the limit of time is reached')
        return subprocess.run([str(word) for word in command], stdout=stdout, stderr=stderr, stdin=subprocess.DEVNULL,
                              env=environment, timeout=left, cwd=self.work)

    def json(self, command):
        """What a command prints as JSON, and its whole time."""
        start = time.perf_counter()
        done = self.process(command, self.environment, subprocess.PIPE, subprocess.PIPE)
        process = time.perf_counter() - start
        if done.returncode != 0:
            last = [line for line in done.stderr.decode(errors='replace').splitlines() if line.strip()]
            errors = [line for line in last if line.startswith('error:')] or last[-1:] or ['no message']
            raise RuntimeError(f'`{pathlib.Path(command[0]).name} {command[1]}` ended with {done.returncode}: {errors[0]}')
        return json.loads(done.stdout.splitlines()[-1] if b'\n{' in done.stdout else done.stdout), process

    def machine(self):
        facts = json.loads((HERE / 'pack.json').read_text())
        doctor, _ = self.json([self.program, 'doctor', '--json'])
        fields = 'name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max'
        query = ['nvidia-smi', f'--query-gpu={fields}', '--format=csv,noheader']
        cards = said(query).splitlines() if shutil.which('nvidia-smi') and not self.args.simulated else []
        versions = {name: version(name) for name in ['jax', 'orbax-checkpoint', 'torch', *list(MODULES)[1:]]}
        facts |= {'doctor': doctor, 'cards': cards, 'python': versions, 'kernel': platform.release()}
        rows = [
            ('commit', facts['commit'] + (', with changes' if facts['changed'] else '')),
            ('devices', '; '.join(cards) or doctor['cuda']['detail']),
            ('processor', f'{doctor["cores"]} cores, {cpu_model()}'),
            ('memory', f'{memory_available() / 1e9:.0f} GB available'),
            ('disk', f'{shutil.disk_usage(self.work).free / 1e9:.0f} GB free'),
            ('kernel', platform.release()),
            ('python', ', '.join(f'{name} {found}' for name, found in versions.items() if found) or 'none of the rivals'),
            ('command', ' '.join(sys.argv)),
        ]
        self.say(table(['', ''], rows))
        if doctor['cuda']['state'] != 'devices':
            raise RuntimeError(f'no usable device: {doctor["cuda"]["detail"]}')
        self.keep('machine', facts)

    # ------------------------------------------------------------ correctness

    def suite(self):
        rows = []
        for name in self.args.tests.split(','):
            code, text = self.test([HERE / 'bin' / name], f'suite {name}')
            passed = sum(int(count) for count in re.findall(r'(\d+) passed', text))
            skipped = [line for line in text.splitlines() if line.startswith('skipped (')]
            wrong = re.findall(r'^test (\S+) .*FAILED', text, re.M)
            rows.append((name, passed, len(skipped), ', '.join(wrong) or ('none' if code == 0 else f'exit {code}')))
            if code != 0:
                self.fail(f'suite {name}', f'exit {code}; see log.txt')
        self.keep('suite', rows)
        self.say('## Load tests\n\n' + table(['binary', 'tests passed', 'parts skipped', 'failed'], rows))

    def sanitizer(self):
        homes = [pathlib.Path(os.environ.get('CUDA_HOME', '/usr/local/cuda')) / 'bin/compute-sanitizer']
        tool = shutil.which('compute-sanitizer') or next((str(path) for path in homes if path.exists()), None)
        self.say('## compute-sanitizer\n')
        if tool is None or self.args.simulated:
            self.say('Not run: ' + ('there is no device' if self.args.simulated else 'there is none here') + '.')
            return
        rows = []
        for kind, options in SANITIZERS.items():
            for name in ['cuda', 'cuda_memory']:
                command = [tool, '--tool', kind, '--error-exitcode', '99', *options, HERE / 'bin' / name, *SANITIZED]
                code, text = self.test(command, f'{kind} of {name}')
                summary = re.findall(r'=+ ((?:ERROR|LEAK|RACECHECK) SUMMARY.*)', text)
                passed = sum(int(count) for count in re.findall(r'(\d+) passed', text))
                rows.append((kind, name, passed, '; '.join(summary) or 'no summary'))
                if code != 0:
                    self.fail(f'{kind} of {name}', f'exit {code}; see log.txt')
        self.keep('sanitizer', rows)
        self.say(table(['tool', 'binary', 'tests passed', 'summary'], rows))

    # ------------------------------------------------------------ speed

    def safetensors(self):
        found, points = self.checkpoint('safetensors', self.model(), ['safetensors', 'fastsafetensors', 'instanttensor'])
        self.goals += [(f'{row["name"]}: share of the copy on the device', row['of_copy_on_the_device'], 'least', 0.8)
                       for device in found['devices'] for row in device['measured'][2:]]
        self.goals += against(points, {'safetensors': 1, 'fastsafetensors': 1, 'instanttensor': 1})

    def uncompressed(self):
        self.orbax('uncompressed', lambda rates: min(rates['read'], rates['copy to the device']),
                   'the slower of reading and copying to the device')

    def zstd(self):
        self.orbax('zstd', lambda rates: rates['decode, all cores'], 'decoding on all cores')

    def orbax(self, step, bound, said_bound):
        self.model()
        path, title = self.made.with_name(step), f'Orbax, {step}'
        if not path.exists():
            raise RuntimeError(f'there is no {path}: its conversion failed')
        found, points = self.checkpoint(title, path, ['orbax'])
        rates = {row['name']: row['gb_per_second'] for row in found['machine'] + found['devices'][0]['measured']}
        loaded = found['loads'][0]['gb_per_second']
        self.goals.append((f'{title}, warm engine: share of {said_bound}', loaded / bound(rates), 'least', 0.8))
        self.goals += against(points, {'orbax': 3})
        shutil.rmtree(path)

    def small(self):
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            path, leaves = pathlib.Path(folder) / 'small.safetensors', pathlib.Path(folder) / 'small'
            write_small(path)
            self.json([self.program, 'convert', path, leaves, '--to', 'orbax', '--json'])
            found, points = self.checkpoint('Orbax, 5,000 small arrays', leaves, ['orbax'])
        self.goals += [(f'5,000 small arrays, {row["name"]}: launches', row['launches'], 'most', LAUNCHES_MAX)
                       for row in found['loads']]
        self.goals += against(points, {'orbax': 3})

    def model(self):
        """The large file, and what is converted from it, made when first needed: in memory if that holds all of them."""
        if self.made is not None:
            return self.made
        shared = min(shutil.disk_usage(SHARED_MEMORY).free, memory_available() * 7 // 10)
        disk = shutil.disk_usage(self.work).free
        folder = pathlib.Path(tempfile.mkdtemp(dir=SHARED_MEMORY if shared > disk else self.work))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        wanted = int(self.args.gigabytes * 1e9)
        size = min(wanted, max(shared, disk) * 32 // 100, int(self.gpu_memory() * GPU_SHARE))
        self.made = folder / 'model.safetensors'
        arrays = write_model(self.made, size)
        self.say(f'The large file has {arrays} arrays, {self.made.stat().st_size / 1e9:.2f} GB, in {folder}: layers of bfloat16 and '
                 f'a float32 embedding, normally distributed. {wanted / 1e9:.2f} GB were wanted.\n')
        # Side by side: each of them leaves most cores idle.
        command = lambda step: [self.program, 'convert', self.made, folder / step, '--to', 'orbax', '--compression', CONVERTED[step]]
        steps = [step for step in CONVERTED if step in self.args.steps.split(',')]
        jobs = [(step, subprocess.Popen(command(step), env=self.environment, stdout=subprocess.DEVNULL)) for step in steps]
        for step, job in jobs:
            if job.wait() != 0:
                self.fail(f'conversion for {step}', f'exit {job.returncode}')
        return self.made

    def gpu_memory(self):
        if self.args.simulated:
            return 1 << 30
        free = said(['nvidia-smi', '--query-gpu=memory.free', '--format=csv,noheader,nounits', '--id=0'])
        return int(free.split()[0]) << 20

    def checkpoint(self, title, path, rivals):
        self.say(f'## {title}\n\nFiles warm.\n')
        name = re.sub(r'\W+', '-', title).strip('-').lower()
        device = ['--devices', 'cuda:0']
        found, _ = self.json([self.program, 'bench', path, *device, '--rounds', self.args.rounds, '--json'])
        self.keep(f'bench-{name}', found)
        rows = [(row['name'], seconds(row), rate(row), '') for row in found['machine']]
        for measured in found['devices']:
            size = f'{measured["bytes"] >> 20} MiB'
            rows += [(f'{row["name"]}, {size}', seconds(row), rate(row), share(row['of_copy_on_the_device']))
                     for row in measured['measured']]
        self.say(table(['machine and device', 'median', 'rate', 'of the copy on the device'], rows))
        rows = [(row['name'], seconds(row), rate(row), f'{share(row["fraction_of_limit"])} of {row["limited_by"]}')
                for row in found['loads']]
        started = found['device_startup']
        self.say('\n' + table(['load, warm engine', 'median', 'rate', 'of the limit'], rows))
        self.say(f'\nStarting: engine {found["startup"]:.3f} s, CUDA {started["cuda"]:.3f} s, pinning {started["pin"]:.3f} s.\n')
        return found, self.beside(name, path, device, rivals)

    def beside(self, name, path, device, rivals):
        """Fresh processes, round by round. The files are warm: the benchmark has read them."""
        # Without a GPU JAX has its processor to rehearse with.
        rehearsed = ['orbax'] if self.args.simulated else rivals
        here = [rival for rival in rivals if rival in rehearsed and importable(MODULES[rival])]
        loaders = {'touchdown': [self.program, 'load', path, *device, '--json']}
        any_device = ['--any-device'] if self.args.simulated else []
        script = pathlib.Path(__file__).absolute()
        loaders |= {rival: [sys.executable, script, 'rival', rival, path, *any_device] for rival in here}
        points = {loader: [] for loader in loaders}
        for _ in range(self.args.rounds):
            for loader, command in list(loaders.items()):
                try:
                    said, process = self.json(command)
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    self.fail(f'{loader} on {name}', error)
                    del loaders[loader]
                    continue
                points[loader].append({'call': said['seconds'], 'process': process})
        self.keep(f'processes-{name}', points)
        ours = middle(points, 'touchdown', 'call') if points['touchdown'] else float('nan')
        rows = []
        for loader in (loader for loader in loaders if points[loader]):
            call, process = middle(points, loader, 'call'), middle(points, loader, 'process')
            rows.append((loader, f'{call:.3f} s', f'{process:.3f} s', f'x{call / ours:.2f}'))
        self.say(table(['fresh processes', 'call', 'process', 'against touchdown'], rows))
        absent = [rival for rival in rivals if rival not in here]
        if absent:
            self.say(f'\nNot run, not here: {", ".join(absent)}.')
        self.say('')
        return points


# ---------------------------------------------------------------- checkpoints

def write_model(path, size):
    """A file like a language model's: layers of bfloat16, one float32 embedding of an eighth; how many arrays."""
    width = 4096 if size >= 4e9 else 512
    entries = {}
    at = 0

    def add(name, dtype, shape):
        nonlocal at
        end = at + shape[0] * shape[1] * (4 if dtype == 'F32' else 2)
        entries[name] = {'dtype': dtype, 'shape': shape, 'data_offsets': [at, end]}
        at = end

    add('embedding', 'F32', [max(size // 8 // (4 * width), 1), width])
    layer = 0
    while layer == 0 or at < size:
        for name, shape in [('q', [width, width]), ('k', [width, width]), ('v', [width, width]), ('o', [width, width]),
                            ('up', [width, 4 * width]), ('gate', [width, 4 * width]), ('down', [4 * width, width]),
                            ('norm_in', [width, 1]), ('norm_out', [width, 1])]:
            add(f'layers.{layer}.{name}', 'BF16', shape)
        layer += 1
    with open(path, 'wb') as file:
        write_header(file, entries)
        for entry in entries.values():
            start, end = entry['data_offsets']
            block, length = weights(entry['dtype']), end - start
            for _ in range(length // len(block)):
                file.write(block)
            file.write(block[:length % len(block)])
    return len(entries)


def write_small(path):
    entry = lambda number: {'dtype': 'F32', 'shape': [16, 16], 'data_offsets': [number << 10, (number + 1) << 10]}
    entries = {f'l{number // 50}.w{number % 50}': entry(number) for number in range(5000)}
    with open(path, 'wb') as file:
        write_header(file, entries)
        block = weights('F32')
        for number in range(5000):
            start = (number << 10) % (len(block) - 1024) & ~3
            file.write(block[start:start + 1024])


def write_header(file, entries):
    header = json.dumps(entries).encode()
    header += b' ' * (-len(header) % 8)
    file.write(struct.pack('<Q', len(header)) + header)


def weights(dtype, blocks={}):
    """16 MiB of normally distributed weights: more than a compressor looks back, so that repeating them gains nothing."""
    if dtype not in blocks:
        import random
        rng = random.Random(7)
        count = (16 << 20) // (4 if dtype == 'F32' else 2)
        try:
            import numpy as np
            values = (np.random.default_rng(7).standard_normal(count, np.float32) * np.float32(0.02)).view(np.uint32)
            blocks[dtype] = (values if dtype == 'F32' else (values >> 16).astype(np.uint16)).tobytes()
        except ImportError:
            some = [struct.pack('<f', rng.gauss(0, 0.02)) for _ in range(1 << 16)]
            blocks[dtype] = b''.join((one if dtype == 'F32' else one[2:]) for one in rng.choices(some, k=count))
    return blocks[dtype]


# ---------------------------------------------------------------- rivals

MODULES = {
    'orbax': 'orbax.checkpoint',
    'safetensors': 'safetensors.torch',
    'fastsafetensors': 'fastsafetensors',
    'instanttensor': 'instanttensor',
}


def rival(loader, path, any_device):
    """One load in this process, imports and start of the device apart; as each project's documents say, with its defaults."""
    import importlib
    os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
    importlib.import_module(MODULES[loader])
    if loader == 'orbax':
        import jax
        device = jax.devices()[0]
        if device.platform != 'gpu' and not any_device:
            sys.exit(f'error: JAX has no GPU here, only {device}')
    return {'seconds': globals()[f'load_{loader}'](path)}


def load_orbax(path):
    import jax
    from orbax.checkpoint import v1
    device = jax.devices()[0]
    jax.block_until_ready(jax.device_put(1.0, device))
    sharding = jax.sharding.SingleDeviceSharding(device)
    start = time.perf_counter()
    abstract = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    target = jax.tree.map(abstract, v1.metadata(path.absolute()).metadata)
    tree = v1.load(path.absolute(), target)
    jax.block_until_ready(tree)
    return time.perf_counter() - start


def load_safetensors(path):
    import torch
    from safetensors.torch import load_file
    torch.zeros(1, device='cuda')
    torch.cuda.synchronize()
    start = time.perf_counter()
    tree = load_file(path, device='cuda')
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * bool(tree)


def load_fastsafetensors(path):
    import torch
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup
    torch.zeros(1, device='cuda')
    torch.cuda.synchronize()
    start = time.perf_counter()
    loader = SafeTensorsFileLoader(SingleGroup(), torch.device('cuda:0'), nogds=True)
    loader.add_filenames({0: [str(path)]})
    buffers = loader.copy_files_to_device()
    tree = {name: buffers.get_tensor(name) for name in loader.get_keys()}
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * bool(tree)


def load_instanttensor(path):
    import instanttensor
    import torch
    torch.zeros(1, device='cuda')
    torch.cuda.synchronize()
    start = time.perf_counter()
    with instanttensor.safe_open([str(path)], framework='pt', device=0) as file:
        tree = {name: tensor.clone() for name, tensor in file.tensors()}
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * bool(tree)


# ---------------------------------------------------------------- facts and tables

def importable(module):
    """Whether a fresh Python imports it: some modules break the process that tries."""
    command = [sys.executable, '-c', f'import {module}']
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def version(package):
    from importlib import metadata
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def memory_available():
    for line in open('/proc/meminfo'):
        if line.startswith('MemAvailable:'):
            return int(line.split()[1]) << 10
    raise RuntimeError('/proc/meminfo does not say how much memory is available')


def cpu_model():
    models = [line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')]
    return models[0] if models else platform.machine()


def middle(points, loader, figure):
    return sorted(point[figure] for point in points[loader])[len(points[loader]) // 2]


def against(points, factors):
    """How many times as long rivals take, and how many times it should be."""
    return [(f'{loader}: its time in ours', middle(points, loader, 'call') / middle(points, 'touchdown', 'call'), 'least', factor)
            for loader, factor in factors.items() if points.get(loader) and points['touchdown']]


def seconds(row):
    return f'{row["seconds"]:.4f} s'


def rate(row):
    return f'{row["gb_per_second"]:.2f} GB/s'


def share(value):
    return f'{100 * value:.0f} %'


def table(head, rows):
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(str(cell) for cell in line) + ' |' for line in lines)


if __name__ == '__main__':
    main()
