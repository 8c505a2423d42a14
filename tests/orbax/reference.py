"""What a cast and a sharding must give, computed without Orbax's loader.

Casts are asked of TensorStore's cast driver, which is what Orbax loads through. Three things are not
left to it: float to integer outside the target's range (undefined behaviour in TensorStore; here it
saturates and NaN becomes 0), anything from or to float8_e8m0fnu (TensorStore is wrong, ml_dtypes is
right), and the types that TensorStore lacks (ml_dtypes).
"""

import warnings

import numpy as np
import tensorstore as ts

from elements import COMPLEX, FLOATS, INTEGERS, NOT_IN_TENSORSTORE, BITS, bits, dtype

# numpy warns about overflow in casts, which is exactly what is being asked for here.
warnings.simplefilter('ignore', RuntimeWarning)
warnings.simplefilter('ignore', np.exceptions.ComplexWarning)


def cast(array, to):
    """`array` as elements of type `to`, by the rules of the module."""
    source = array.dtype.name
    if source == to:
        return array
    if source in COMPLEX and to not in COMPLEX:
        if to == 'bool':
            raise ValueError('complex to bool is refused')
        return cast(np.asarray(array.real, order='C'), to)
    if source in ('uint2', 'uint4'):
        return cast((array.view(np.uint8) & ((1 << BITS[source]) - 1)), to)
    if source == 'float8_e8m0fnu' or source in NOT_IN_TENSORSTORE:
        return cast(array.astype(np.float32), to)       # exact: these are all narrower than float32
    if to in INTEGERS:
        return float_to_integer(array, to) if source in FLOATS else integer_to_integer(array, to)
    if to == 'float8_e8m0fnu':
        return tensorstore_cast(array, 'float32').astype(dtype(to))
    if to in NOT_IN_TENSORSTORE:
        return round_to_odd_float32(array).astype(dtype(to))
    return tensorstore_cast(array, to)


def defined(array, to):
    """Where TensorStore's own cast of `array` to `to` means something."""
    source = array.dtype.name
    if source == to:
        return np.ones(array.shape, bool)
    if 'float8_e8m0fnu' in (source, to) or source in NOT_IN_TENSORSTORE or to in NOT_IN_TENSORSTORE:
        return np.zeros(array.shape, bool)
    if source in COMPLEX and to in INTEGERS:
        return defined(np.asarray(array.real, order='C'), to)
    if source in FLOATS and to in INTEGERS:
        low, high = integer_range(to)
        whole = np.trunc(array.astype(np.float64))
        # `high + 1` is a power of two and so exact in float64; `high` itself need not be.
        return (whole >= float(low)) & (whole < float(high + 1))
    return np.ones(array.shape, bool)


def tensorstore_cast(array, to):
    if array.dtype.name == to:
        return array
    return ts.cast(ts.array(np.asarray(array, order='C')), ts.dtype(to)).read().result()


def integer_range(name):
    n = bits(name)
    return (0, 2**n - 1) if name.startswith('u') else (-2**(n - 1), 2**(n - 1) - 1)


def float_to_integer(array, to):
    low, high = integer_range(to)
    whole = np.trunc(array.astype(np.float64))
    inside = defined_range(whole, low, high)
    if to in NOT_IN_TENSORSTORE:
        exact = np.where(inside, whole, 0).astype(np.uint8)
    elif array.dtype.name in NOT_IN_TENSORSTORE:
        raise AssertionError('widen first')
    else:
        exact = tensorstore_cast(np.where(inside, array, array.dtype.type(0)).astype(array.dtype), to)
    return pick(exact, inside, np.where(whole > 0, 1, 0), low, high, np.isnan(whole), to)


def defined_range(whole, low, high):
    return (whole >= float(low)) & (whole < float(high + 1))


def pick(exact, inside, positive, low, high, nan, to):
    """`exact` inside the range, the nearer end outside, 0 for NaN."""
    wide = exact.astype(np.uint64 if to == 'uint64' else np.int64)
    ends = np.where(positive == 1, np.array(high, wide.dtype), np.array(low, wide.dtype))
    out = np.where(inside, wide, np.where(nan, np.array(0, wide.dtype), ends))
    return out.astype(dtype(to))


def integer_to_integer(array, to):
    if to in NOT_IN_TENSORSTORE:
        return (tensorstore_cast(array, 'uint8') & ((1 << BITS[to]) - 1)).astype(dtype(to))
    return tensorstore_cast(array, to)


def round_to_odd_float32(array):
    """To float32 so that a second rounding to a narrow type equals one direct rounding."""
    if array.dtype.name in FLOATS and array.dtype.name != 'float64':
        return tensorstore_cast(array, 'float32')
    wide = tensorstore_cast(array, 'float64')
    near = wide.astype(np.float32)
    back = near.astype(np.float64)
    raw = near.view(np.uint32).copy()
    finite = np.isfinite(near) & np.isfinite(wide)
    inexact = finite & (back != wide)
    away = inexact & (np.abs(back) > np.abs(wide))
    raw[away] -= 1                      # step towards zero: magnitudes are ordered as integers
    raw[inexact] |= 1
    overflow = np.isinf(near) & np.isfinite(wide)
    raw[overflow] = (raw[overflow] & 0x8000_0000) | 0x7F7F_FFFF
    return raw.view(np.float32).reshape(wide.shape)


def resize(array, shape, fill):
    """Low indices kept, the high end cut off or filled."""
    out = np.full(shape, fill, array.dtype)
    kept = (*(slice(0, min(a, b)) for a, b in zip(array.shape, shape)), ...)
    out[kept] = array[kept]
    return out


def shard_index(shape, spec, mesh, position):
    """[[start, stop], ..] of the part that the device at `position` holds.

    `mesh` is [(axis, size), ..], row-major over the devices; `spec` has per dimension a list of axes,
    major first. Dimension n over k parts gives part i the range [i*ceil(n/k), (i+1)*ceil(n/k)) cut at n.
    """
    coordinate, rest = {}, position
    for axis, size in reversed(mesh):
        coordinate[axis] = rest % size
        rest //= size
    sizes = dict(mesh)
    index = []
    for dimension, n in enumerate(shape):
        part, parts = 0, 1
        for axis in (spec[dimension] if dimension < len(spec) else []):
            part = part * sizes[axis] + coordinate[axis]
            parts *= sizes[axis]
        step = -(-n // parts)
        index.append([min(part * step, n), min((part + 1) * step, n)])
    return index
