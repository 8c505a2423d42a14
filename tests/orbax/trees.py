"""Random state trees: what Orbax saves in the differential test.

A tree is ordinary Python (dict, list, tuple, None, empties); `flatten` lists its leaves with the paths
that a reader must report, and `rebuild` makes a parallel tree, as Orbax's abstract trees need.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from elements import COMPLEX, FLOATS, INTEGERS, STORABLE, as_float, bits, dtype

# Characters that are legal in Orbax names and awkward elsewhere. No '.': Orbax joins names by dots and
# loses one of two that collide; a fixture covers dots.
ODD_NAMES = ['a b', 'q"uote', "it's", 'ünï', 'p/q', 'st*r', 'wh?t', 'back\\slash', 'x=y', 'c', '0', '10',
             '007', 'zarr.json', '.zarray', 'tab\there', '日本', 'com,ma', '{brace}', '$1', '#', 'manifest']
PLAIN_NAMES = ['kernel', 'bias', 'scale', 'params', 'layer_0', 'layer_1', 'layer_10', 'embed', 'mlp',
               'attn', 'mu', 'nu', 'step', 'w', 'count']
AXES = [['x'], ['data'], ['x', 'y'], ['data', 'model'], ['a', 'b', 'c'], ['fsdp', 'tensor', 'stage']]


def flatten(tree, path=()):
    """[(path, leaf)]; None and empty containers are leaves."""
    if isinstance(tree, dict) and tree:
        return [leaf for key, value in tree.items() for leaf in flatten(value, (*path, str(key)))]
    if isinstance(tree, (list, tuple)) and tree:
        return [leaf for i, value in enumerate(tree) for leaf in flatten(value, (*path, i))]
    return [(path, tree)]


def rebuild(tree, make, path=()):
    if isinstance(tree, dict) and tree:
        return {key: rebuild(value, make, (*path, str(key))) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)) and tree:
        return type(tree)(rebuild(value, make, (*path, i)) for i, value in enumerate(tree))
    return make(path, tree)


def kind(leaf):
    if leaf is None:
        return 'none'
    if isinstance(leaf, (dict, list, tuple)):
        return 'empty'
    if isinstance(leaf, str):
        return 'string'
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 'key'
    return 'array' if isinstance(leaf, (np.ndarray, jax.Array)) else 'scalar'


class TreeMaker:
    """`api` limits the leaf kinds to those that the saver accepts."""

    def __init__(self, rng, api):
        self.rng, self.api = rng, api
        self.mesh = random_mesh(rng, 8)

    def tree(self):
        if self.rng.random() < 0.06 and self.api != 'v0-standard':
            return self.array()
        tree = self.container(0)
        if not any(kind(leaf) == 'array' for _, leaf in flatten(tree)):
            tree = {'only': self.array(), 'rest': tree}
        return tree

    def container(self, depth):
        count = int(self.rng.integers(1, 6))
        if self.rng.random() < 0.75 or depth == 0:
            return {name: self.node(depth + 1) for name in self.names(count)}
        items = [self.node(depth + 1) for _ in range(count)]
        return items if self.rng.random() < 0.5 else tuple(items)

    def node(self, depth):
        if depth < 4 and self.rng.random() < 0.35:
            return self.container(depth)
        return self.leaf()

    def names(self, count):
        pool = PLAIN_NAMES if self.rng.random() < 0.7 else PLAIN_NAMES + ODD_NAMES
        return [str(name) for name in self.rng.choice(pool, size=count, replace=False)]

    def leaf(self):
        roll = self.rng.random()
        if roll < 0.72:
            return self.array()
        if roll < 0.86 or self.api == 'v0-standard':
            return self.scalar()
        if roll < 0.91:
            return str(self.rng.choice(['', 'hello', 'zwei\nlines', 'ünï \u2603', '"quoted" \\', '~', '[1, 2]']))
        if roll < 0.94 and self.api == 'v1':
            return self.key()
        return [None, {}, [], ()][int(self.rng.integers(0, 4))]

    def scalar(self):
        rng = self.rng
        choices = [int(rng.integers(-2**62, 2**62)), int(rng.integers(-9, 9)), 0, -1, 2**53 + 1,
                   float(rng.standard_normal()), 1.0, -0.0, 1e300, 5e-324, float('nan'), float('inf'),
                   float('-inf'), 0.1, True, False]
        if self.api.startswith('v0'):
            choices += [np.float32(0.1), np.int8(-3), np.uint16(65535), np.float16(1.5)]
        return choices[int(rng.integers(0, len(choices)))]

    def key(self):
        seed = int(self.rng.integers(0, 2**31))
        impl = str(self.rng.choice(['threefry2x32', 'rbg', 'unsafe_rbg']))
        key = jax.random.key(seed, impl=impl)
        return key if self.rng.random() < 0.5 else jax.random.split(key, 3)

    def array(self):
        if self.rng.random() < 0.35:
            return random_elements(self.rng, self.dtype(), random_shape(self.rng))
        axes, sizes = [list(x) for x in zip(*self.mesh)]
        shape, spec = random_sharded_shape(self.rng, self.mesh)
        data = random_elements(self.rng, self.dtype(), shape)
        if self.rng.random() < 0.2:
            return jax.device_put(data, SingleDeviceSharding(jax.devices()[0]))
        count = int(np.prod(sizes))
        mesh = Mesh(np.array(jax.devices()[:count]).reshape(sizes), axes)
        return jax.device_put(data, NamedSharding(mesh, partition_spec(spec)))

    def dtype(self):
        common = ['float32', 'bfloat16', 'float16', 'float64', 'int32', 'int64', 'uint8', 'bool']
        return str(self.rng.choice(common if self.rng.random() < 0.55 else STORABLE))


def random_mesh(rng, devices_max, count=None):
    """[(axis, size), ..] whose product is `count`, or a random number of devices."""
    axes = AXES[int(rng.integers(0, len(AXES)))]
    if count is None:
        count = int(rng.choice([n for n in (1, 2, 3, 4, 6, 8) if n <= devices_max]))
    sizes = []
    for _ in axes[:-1]:
        sizes.append(int(rng.choice([d for d in range(1, count + 1) if count % d == 0])))
        count //= sizes[-1]
    return list(zip(axes, [*sizes, count]))


def random_spec(rng, mesh, rank):
    """Per dimension a list of axes, none used twice; may be shorter than the rank."""
    free = [axis for axis, _ in mesh]
    rng.shuffle(free)
    spec = []
    for _ in range(int(rng.integers(min(rank, rng.integers(0, 2)), rank + 1))):
        take = min(int(rng.choice([0, 1, 1, 1, 2, 3])), len(free))
        spec.append([str(free.pop()) for _ in range(take)])
    return spec


def partition_spec(spec):
    return PartitionSpec(*[None if not axes else axes[0] if len(axes) == 1 else tuple(axes) for axes in spec])


def spec_string(spec):
    return ','.join('+'.join(axes) if axes else '_' for axes in spec)


def parts(axes, mesh):
    return int(np.prod([dict(mesh)[axis] for axis in axes], dtype=np.int64))


def random_shape(rng):
    rank = int(rng.choice([0, 1, 1, 2, 2, 2, 3, 4]))
    sizes = [1, 2, 3, 4, 5, 7, 8, 8, 12, 16] if rank < 3 else [1, 2, 3, 4, 4, 6]
    return tuple(int(n) for n in rng.choice(sizes, size=rank))


def random_sharded_shape(rng, mesh):
    """A shape and a spec that divides it evenly, as JAX demands."""
    shape = random_shape(rng)
    spec = random_spec(rng, mesh, len(shape))
    even = [n if d >= len(spec) else parts(spec[d], mesh) * (1 + n % 3) for d, n in enumerate(shape)]
    return tuple(even), spec


def random_elements(rng, name, shape):
    """Mostly numbers of ordinary size, with the awkward ones strewn in."""
    count = int(np.prod(shape, dtype=np.int64))
    if name == 'bool':
        return np.asarray(rng.random(shape) < 0.5)
    if name in INTEGERS:
        n = bits(name)
        raw = rng.integers(0, 256, size=(count, max(n // 8, 1)), dtype=np.uint8)
        if n < 8:
            return raw.astype(np.int8).reshape(shape).astype(dtype(name))
        out = raw.reshape(-1).view(dtype(name)).reshape(shape).copy()
        small = rng.random(shape) < 0.4
        out[small] = np.asarray(rng.integers(0, 100, size=shape)).astype(dtype(name))[small]
        return out
    if name in COMPLEX:
        half = 'float32' if name == 'complex64' else 'float64'
        out = np.empty(shape, dtype(name))
        out.real, out.imag = random_elements(rng, half, shape), random_elements(rng, half, shape)
        return out
    assert name in FLOATS
    out = np.asarray(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4, size=shape))
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e30, 1e-30, 65504.0, 448.0, 464.0, -1.0, 0.5])
    strewn = rng.random(shape) < 0.15
    out = np.where(strewn, rng.choice(special, size=shape), out).astype(dtype(name))
    wild = rng.random(shape) < 0.1
    width = out.dtype.itemsize
    noise = rng.integers(0, 256, size=count * width, dtype=np.uint8)
    if bits(name) < 8:
        noise &= (1 << bits(name)) - 1
    return np.where(wild, noise.view(out.dtype).reshape(shape), out)
