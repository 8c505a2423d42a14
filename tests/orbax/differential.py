"""Random checkpoints by Orbax, random loads, and what each load must land on every device.

Layout of the output:
    index.json                 {"cases": ["000/load-0", ..]}, counts
    000/ckpt/                  a checkpoint that Orbax wrote
    000/load-0/args.json       {"path", "args", "exit", "judge", "notes"}; path is relative to the output
    000/load-0/want/dump.json  the expected dump and its shard files (absent when exit is not 0)

The expected values are computed twice. `reference` works them out from the tree that was saved; where
Orbax can do the same load (even sharding, up to 8 devices, padding by zero, its own casts) Orbax does
it too, its shards are what is written, and both must agree wherever TensorStore's casts are defined:
a disagreement stops the run, because then the judge is wrong.
"""

import json
import pathlib

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

import globs
import orbax_io
import reference
from dump import DumpWriter
from elements import ALL, COMPLEX, FLOATS, INTEGERS, SIGNED, dtype, same
from trees import (TreeMaker, flatten, kind, partition_spec, parts, random_mesh, random_spec, spec_string)

LOADS_PER_CHECKPOINT = 4
APIS = ['v1', 'v1', 'v1', 'v0-pytree', 'v0-pytree', 'v0-standard', 'v0-manager']


def run(seed, out, count):
    out = pathlib.Path(out).resolve()
    out.mkdir(parents=True)
    totals = {'cases': [], 'leaves': 0, 'arrays_by_orbax': 0, 'arrays_by_reference': 0, 'refusals': 0}
    for number in range(count):
        # One stream per checkpoint, so that a single one can be remade: --only NUMBER.
        rng = np.random.default_rng([seed, number])
        make_checkpoint(rng, out, number, totals)
    (out / 'index.json').write_text(json.dumps({'schema': 1, 'seed': seed, **totals}, indent=1) + '\n')
    return totals


def make_checkpoint(rng, out, number, totals):
    folder = out / f'{number:03d}'
    folder.mkdir()
    api = str(rng.choice(APIS))
    tree = TreeMaker(rng, api).tree()
    saved = orbax_io.save(rng, api, tree, folder / 'ckpt')
    leaves = [Leaf(path, value) for path, value in flatten(saved.tree)]
    for load in range(LOADS_PER_CHECKPOINT):
        case = folder / f'load-{load}'
        case.mkdir()
        make_load(rng, out, saved, leaves, case, totals)
        totals['cases'].append(f'{number:03d}/load-{load}')
    if rng.random() < 0.3:
        case = folder / 'refused'
        case.mkdir()
        make_refusal(rng, out, saved, leaves, case)
        totals['cases'].append(f'{number:03d}/refused')
        totals['refusals'] += 1


class Leaf:
    """A stored leaf: its value, and for arrays the sharding that it was saved with."""

    def __init__(self, path, value):
        self.path, self.kind = path, kind(value)
        self.value = value
        self.saved_mesh = self.saved_spec = self.key_impl = None
        if self.kind == 'key':
            self.key_impl = str(jax.random.key_impl(value))
            self.value = np.asarray(jax.random.key_data(value))
        elif self.kind == 'array':
            self.value = np.asarray(value)
            sharding = getattr(value, 'sharding', None)
            if isinstance(sharding, NamedSharding):
                self.saved_mesh = list(sharding.mesh.shape.items())
                self.saved_spec = [[] if axes is None else [axes] if isinstance(axes, str) else list(axes)
                                   for axes in sharding.spec]
        if self.kind in ('array', 'key'):
            self.dtype, self.shape = self.value.dtype.name, self.value.shape


class Load:
    """One random invocation of `load`: the arguments, and per array what they mean."""

    def __init__(self, rng, saved, leaves):
        self.rng, self.leaves = rng, leaves
        self.args = list(saved.arguments)
        self.selected = list(leaves)
        self.target = {leaf.path: leaf.path for leaf in leaves}      # stored path -> target path
        self.take, self.transpose, self.shape, self.cast, self.spec = {}, {}, {}, {}, {}
        self.pad_value = 0
        self.choose_devices()
        self.choose_selection()
        structural = rng.random() < 0.35
        if structural:
            self.choose_take()
            self.choose_transpose()
        if rng.random() < 0.35:
            self.choose_shape()
        if rng.random() < 0.2:
            self.choose_rename()
        if rng.random() < 0.6:
            self.choose_cast()
        if rng.random() < 0.85:
            self.choose_spec()
        self.choose_pad_value()
        self.choose_harmless()

    @property
    def arrays(self):
        return [leaf for leaf in self.selected if leaf.kind == 'array']

    def maybe(self, probability):
        return self.rng.random() < probability

    def choose_devices(self):
        rng = self.rng
        count = int(rng.choice([1, 2, 3, 4, 6, 8, 8, 5, 7, 12, 16], p=[.12, .14, .06, .18, .1, .15, .1, .04, .04, .04, .03]))
        self.count = count
        self.args += ['--devices', f'cpu:{count}']
        self.given_mesh = self.maybe(0.75)
        if self.given_mesh:
            self.mesh = random_mesh(rng, count, count)
            self.args += ['--mesh', ','.join(f'{axis}={size}' for axis, size in self.mesh)]
        else:
            self.mesh = [('device', count)]

    def choose_selection(self):
        """--only and --skip, keeping at least one array."""
        for option, probability in (('--only', 0.2), ('--skip', 0.25)):
            if not self.maybe(probability):
                continue
            pool = self.leaves if option == '--only' else self.selected
            glob = globs.around(self.rng, pool[int(self.rng.integers(0, len(pool)))].path)
            rest = [leaf for leaf in self.selected if globs.matches(glob, leaf.path) == (option == '--only')]
            if any(leaf.kind == 'array' for leaf in rest):
                self.selected = rest
                self.args += [option, glob]

    def rule(self, paths, usable, taken, only_arrays=False):
        """A glob, and the arrays that it newly decides (first rule wins). None if it could not be used.

        `paths`: leaf -> path that the option speaks of; `usable`: may this array be decided by it.
        A glob must not decide an array that is not usable. Literal paths name arrays only; with
        `only_arrays` globs do too.
        """
        arrays = [leaf for leaf in self.arrays if usable(leaf) and leaf.path not in taken]
        if not arrays:
            return None
        pick = arrays[int(self.rng.integers(0, len(arrays)))]
        glob = globs.around(self.rng, paths(pick))
        decided = [leaf for leaf in self.arrays if globs.matches(glob, paths(leaf)) and leaf.path not in taken]
        others = [leaf for leaf in self.selected if leaf.kind != 'array' and globs.matches(glob, paths(leaf))]
        if not all(usable(leaf) for leaf in decided) or (only_arrays and others):
            glob = globs.path_string(paths(pick))
            decided = [leaf for leaf in decided if leaf is pick]
            if sum(globs.matches(glob, paths(leaf)) for leaf in self.leaves) != 1:
                return None
        return glob, decided

    def stored(self, leaf):
        return leaf.path

    def targeted(self, leaf):
        return self.target[leaf.path]

    def choose_take(self):
        for _ in range(int(self.rng.integers(0, 3))):
            rank = int(self.rng.integers(1, 4))
            chosen = self.rule(self.stored, lambda leaf: len(leaf.shape) >= rank, self.take, True)
            if not chosen:
                continue
            glob, decided = chosen
            dimension = int(self.rng.integers(0, min(len(leaf.shape) for leaf in decided)))
            shortest = min(leaf.shape[dimension] for leaf in decided)
            start = int(self.rng.integers(0, shortest))
            if self.maybe(0.5):
                what, index = f'{dimension}:{start}', start
            else:
                stop = int(self.rng.integers(start + 1, shortest + 1))
                what, index = f'{dimension}:{start}..{stop}', slice(start, stop)
            for leaf in decided:
                self.take[leaf.path] = (*(slice(None),) * dimension, index)
            self.args += ['--take', f'{glob}={what}']

    def taken(self, leaf):
        # The ellipsis keeps an array an array when its last dimension is taken.
        return leaf.value[(*self.take.get(leaf.path, ()), ...)]

    def choose_transpose(self):
        for _ in range(int(self.rng.integers(0, 3))):
            rank = int(self.rng.integers(2, 4))
            chosen = self.rule(self.stored, lambda leaf: self.taken(leaf).ndim == rank, self.transpose,
                               True)
            if not chosen:
                continue
            glob, decided = chosen
            order = [int(d) for d in self.rng.permutation(rank)]
            for leaf in decided:
                self.transpose[leaf.path] = order
            self.args += ['--transpose', f'{glob}={",".join(map(str, order))}']

    def turned(self, leaf):
        taken = self.taken(leaf)
        order = self.transpose.get(leaf.path)
        return taken if order is None else taken.transpose(order)

    def choose_shape(self):
        for _ in range(int(self.rng.integers(1, 4))):
            rank = int(self.rng.integers(1, 4))
            chosen = self.rule(self.stored, lambda leaf: self.turned(leaf).ndim == rank
                               and leaf.dtype != 'float8_e8m0fnu', self.shape)
            if not chosen:
                continue
            glob, decided = chosen
            shape = [max(0 if self.maybe(0.03) else 1, int(n * self.rng.choice([0.5, 1, 1, 1.5, 2])))
                     for n in self.turned(decided[0]).shape]
            for leaf in decided:
                self.shape[leaf.path] = tuple(shape)
            self.args += ['--shape', f'{glob}={",".join(map(str, shape))}']
        if self.shape:
            self.args += ['--pad']

    def shaped(self, leaf):
        return self.shape.get(leaf.path, self.turned(leaf).shape)

    def choose_rename(self):
        """Whole-path regular expressions over dict paths of ordinary letters."""
        for _ in range(int(self.rng.integers(1, 3))):
            simple = [leaf for leaf in self.selected if leaf.path
                      and all(isinstance(e, str) and e.replace('_', 'a').isalpha() for e in leaf.path)
                      and self.target[leaf.path] == leaf.path]
            if not simple:
                return
            pick = simple[int(self.rng.integers(0, len(simple)))]
            fresh = f'renamed{len(self.args)}'
            if len(pick.path) == 1 or self.maybe(0.5):
                regex, new = f'^{"/".join(pick.path)}$', f'{fresh}/{pick.path[-1]}.weight'
                moved = {pick.path: (fresh, f'{pick.path[-1]}.weight')}
            else:
                # The first element is renamed wherever it leads, through a group.
                regex, new = f'^{pick.path[0]}/(.*)$', f'{fresh}/$1'
                under = [leaf for leaf in self.leaves if leaf.path[:1] == pick.path[:1] and len(leaf.path) > 1]
                moved = {leaf.path: (fresh, *leaf.path[1:]) for leaf in under
                         if self.target[leaf.path] == leaf.path}
            if any(not isinstance(e, str) or not e for path in moved for e in path):
                continue        # positions of sequences: what they become is left open
            self.target.update(moved)
            self.args += ['--rename', f'{regex}={new}']

    def choose_cast(self):
        for _ in range(int(self.rng.integers(1, 4))):
            to = str(self.rng.choice(['bfloat16', 'float32', 'float16', 'int8'] if self.maybe(0.4) else ALL))
            kinds = {'@float': FLOATS, '@int': INTEGERS, '': ALL}
            suffix = str(self.rng.choice(['', '', '@float', '@int']))
            def usable(leaf):
                if leaf.dtype in COMPLEX and to == 'bool':
                    return False
                if to == 'float8_e8m0fnu' and leaf.path in self.shape:
                    return False    # what a padded zero is in a type without zero is left open
                # Whether bool is an integer and complex a float is left open too.
                return not suffix or leaf.dtype not in (*COMPLEX, 'bool')
            decided_already = dict(self.cast)
            chosen = self.rule(self.targeted, usable, decided_already)
            if not chosen:
                continue
            glob, decided = chosen
            decided = [leaf for leaf in decided if leaf.dtype in kinds[suffix]]
            if not decided:
                continue
            for leaf in decided:
                self.cast[leaf.path] = to
            self.args += ['--cast', f'{glob}{suffix}={to}']

    def dtype_of(self, leaf):
        return self.cast.get(leaf.path, leaf.dtype)

    def choose_spec(self):
        for _ in range(int(self.rng.integers(1, 5))):
            rank = int(self.rng.choice([0, 1, 2, 2, 3]))
            chosen = self.rule(self.targeted, lambda leaf: len(self.shaped(leaf)) >= rank, self.spec)
            if not chosen:
                continue
            glob, decided = chosen
            spec = random_spec(self.rng, self.mesh, min(len(self.shaped(leaf)) for leaf in decided))
            if self.maybe(0.5):
                spec = self.evened(spec, decided)
            for leaf in decided:
                self.spec[leaf.path] = spec
            self.args += ['--spec', f'{glob}={spec_string(spec)}']

    def evened(self, spec, decided):
        """`spec` without the axes that do not divide: more loads that Orbax can judge."""
        return [axes if all(self.shaped(leaf)[d] % parts(axes, self.mesh) == 0 for leaf in decided) else []
                for d, axes in enumerate(spec)]

    def choose_pad_value(self):
        types = {self.dtype_of(leaf) for leaf in self.arrays if leaf.path in self.shape}
        if not self.shape or not self.maybe(0.4):
            return
        if types <= {*SIGNED, *FLOATS} - {'int2'}:
            self.pad_value = int(self.rng.choice([1, -1, -2]))
        else:
            self.pad_value = 1
        self.args += [f'--pad-value={self.pad_value}']

    def choose_harmless(self):
        """Options that must not change a value."""
        for option in (['--threads', '2'], ['--io', 'pread'], ['--verify', 'full'], ['--verify', 'off'],
                       ['--memory', '64MiB'], ['--order', '**']):
            if self.maybe(0.06) and option[0] not in self.args:
                self.args += option
        if all(self.even(leaf) for leaf in self.arrays) and self.maybe(0.2):
            self.args += ['--even']

    def placement(self, leaf):
        """(mesh, spec): the rule's, else the saved one if it fits and no mesh was given, else replicated."""
        if leaf.path in self.spec:
            return self.mesh, self.spec[leaf.path]
        if not self.given_mesh and leaf.saved_mesh and self.saved_count(leaf) == self.count:
            return leaf.saved_mesh, leaf.saved_spec
        return self.mesh, []

    def saved_count(self, leaf):
        return int(np.prod([size for _, size in leaf.saved_mesh]))

    def even(self, leaf):
        mesh, spec = self.placement(leaf)
        return all(n % parts(axes, mesh) == 0 for n, axes in zip(self.shaped(leaf), spec))

    def ambiguous(self):
        """A saved sharding and a changed layout: which dimension it then means is left open."""
        return not self.given_mesh and any(
            leaf.path not in self.spec and leaf.saved_mesh and self.saved_count(leaf) == self.count
            and (leaf.path in self.take or leaf.path in self.transpose) for leaf in self.arrays)


def make_load(rng, out, saved, leaves, case, totals):
    load = Load(rng, saved, leaves)
    while load.ambiguous():
        load = Load(rng, saved, leaves)
    writer = DumpWriter(case / 'want')
    by_orbax = {} if len(load.arrays) == 0 else ask_orbax(saved, load)
    for leaf in load.selected:
        write_leaf(writer, load, leaf, by_orbax.get(leaf.path))
    writer.close()
    judged = len(by_orbax)
    totals['leaves'] += len(load.selected)
    totals['arrays_by_orbax'] += judged
    totals['arrays_by_reference'] += len(load.arrays) - judged
    write_args(out, case, saved, load.args, 0, f'{judged} of {len(load.arrays)} arrays by Orbax itself')


def write_args(out, case, saved, args, code, judge):
    (case / 'args.json').write_text(json.dumps({
        'path': str(saved.path.relative_to(out)), 'args': args, 'exit': code, 'judge': judge,
        'notes': saved.notes}, indent=1) + '\n')


def ask_orbax(saved, load):
    """{path: jax.Array} for the arrays of this load that Orbax can load in the same way."""
    wanted = {leaf.path: None for leaf in load.leaves if leaf.kind not in ('none', 'empty')}
    for leaf in load.arrays:
        mesh, spec = load.placement(leaf)
        orbax_can = (load.count <= len(jax.devices()) and load.even(leaf) and 0 not in load.shaped(leaf)
                     and leaf.path not in load.take and leaf.path not in load.transpose
                     and (load.pad_value == 0 or load.shaped(leaf) == leaf.shape)
                     and not (leaf.dtype in COMPLEX and load.dtype_of(leaf) == 'bool'))
        try:
            jax.dtypes.canonicalize_dtype(dtype(load.dtype_of(leaf)))
        except TypeError:
            orbax_can = False
        if load.dtype_of(leaf) in reference.NOT_IN_TENSORSTORE:
            orbax_can = False
        if orbax_can:
            sizes = [size for _, size in mesh]
            devices = np.array(jax.devices()[:load.count]).reshape(sizes)
            sharding = NamedSharding(Mesh(devices, [axis for axis, _ in mesh]), partition_spec(spec))
            wanted[leaf.path] = (load.shaped(leaf), dtype(load.dtype_of(leaf)), sharding)
    if all(want is None for want in wanted.values()):
        return {}
    return orbax_io.load(saved, wanted)


def write_leaf(writer, load, leaf, from_orbax):
    path = load.target[leaf.path]
    if leaf.kind in ('none', 'empty'):
        writer.plain(path, leaf.kind)
    elif leaf.kind == 'string':
        writer.plain(path, 'string', leaf.value)
    elif leaf.kind == 'scalar':
        writer.scalar(path, np.asarray(leaf.value).dtype.name, leaf.value)
    elif leaf.kind == 'key':
        whole = [[0, n] for n in leaf.shape]
        writer.array(path, 'uint32', leaf.shape, [(whole, leaf.value)] * load.count, kind='key',
                     key_impl=leaf.key_impl)
    else:
        write_array(writer, load, leaf, path, from_orbax)


def write_array(writer, load, leaf, path, from_orbax):
    to, shape = load.dtype_of(leaf), load.shaped(leaf)
    stored = load.turned(leaf)
    fill = np.array(load.pad_value).astype(dtype(to))
    model = reference.resize(reference.cast(stored, to), shape, fill)
    mesh, spec = load.placement(leaf)
    indices = [reference.shard_index(shape, spec, mesh, position) for position in range(load.count)]
    if from_orbax is None:
        shards = [(index, cut(model, index)) for index in indices]
    else:
        certain = reference.resize(reference.defined(leaf.value, to), shape, True)
        shards = [(index, agreed(load, leaf, cut(model, index), orbax_shard(from_orbax, position, index),
                                 cut(certain, index)))
                  for position, index in enumerate(indices)]
    writer.array(path, to, shape, shards)


def cut(array, index):
    return array[(*(slice(a, b) for a, b in index), ...)]


def orbax_shard(array, position, index):
    device = jax.devices()[position]
    shard = next(s for s in array.addressable_shards if s.device == device)
    got = [[*s.indices(n)[:2]] for s, n in zip(shard.index, array.shape)]
    assert got == index, f'JAX puts {got} at device {position}, the reference {index}'
    return np.asarray(shard.data)


def agreed(load, leaf, model, orbax, certain):
    """Orbax's shard, with the reference's elements where TensorStore's cast is undefined."""
    wrong = certain & ~same(model, orbax)
    if wrong.any():
        raise AssertionError(f'{leaf.path} {leaf.dtype} to {load.dtype_of(leaf)}: Orbax gives {orbax[wrong][:4]}, '
                             f'the reference {model[wrong][:4]} (args {load.args})')
    return np.where(certain, orbax, model)


def make_refusal(rng, out, saved, leaves, case):
    """An invocation that must exit with 2: it can be mended by its arguments."""
    arrays = [leaf for leaf in leaves if leaf.kind == 'array']
    pick = arrays[int(rng.integers(0, len(arrays)))]
    literal = globs.path_string(pick.path)
    choices = [['--spec', 'no/such/leaf=x', '--mesh', 'x=2', '--devices', 'cpu:2'],
               ['--cast', 'no/such/*=float32'],
               ['--only', 'nowhere'], ['--skip', '**/nowhere'],
               ['--devices', 'cpu:4', '--mesh', 'x=3'],
               ['--devices', 'cpu:2', '--mesh', 'x=2', '--spec', f'{literal}=' + ','.join('_' * len(pick.shape) + 'x')],
               ['--cast', f'{literal}=float33']]
    if pick.shape:
        choices += [['--devices', 'cpu:2', '--mesh', 'x=2', '--spec', f'{literal}=unknown_axis'],
                    ['--shape', f'{literal}=' + ','.join(str(n + 1) for n in pick.shape)],
                    ['--shape', f'{literal}=' + ','.join(str(n) for n in (*pick.shape, 1)), '--pad']]
    args = choices[int(rng.integers(0, len(choices)))]
    if args[0] in ('--cast', '--only', '--skip', '--shape'):
        args = args + ['--devices', 'cpu:1']
    write_args(out, case, saved, [*saved.arguments, *args], 2, 'refusal')
