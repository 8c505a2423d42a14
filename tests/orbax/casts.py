"""Golden cast tables: what every element type becomes in every other one.

Sources of up to 16 bits come with all their bit patterns, wider ones with edge values and random bits.
Layout of the output, all data in memory form (see `elements`):

    index.json        {"schema": 1, "pairs": [{"from", "to", "count", "source", "result", "mask",
                       "lossy_min", "lossy_max"} or {"from", "to", "source", "refused": true}, ..]}
    FROM.bin          the source elements
    FROM-TO.bin       what they become
    FROM-TO.mask      one byte an element: 1 the reference's own result (TensorStore, or ml_dtypes for the
                      types that TensorStore lacks or gets wrong), 2 the rule for what the reference leaves
                      undefined (float to integer saturates, NaN becomes 0), 0 not to be compared
                      (the references disagree among themselves)

`lossy_min` and `lossy_max` bound the number of lossy elements: an element that only one reading of the
definition calls lossy is in the second count alone.
"""

import json
import pathlib

import numpy as np

import reference
from elements import (ALL, BITS, COMPLEX, FLOATS, INTEGERS, NOT_IN_TENSORSTORE, as_float, bits, dtype,
                      memory_form, same)

RANDOM_COUNT = 3000


def run(out):
    out = pathlib.Path(out)
    out.mkdir(parents=True)
    pairs, elements = [], 0
    for source in ALL:
        array = patterns(source)
        (out / f'{source}.bin').write_bytes(memory_form(array))
        for target in ALL:
            pair = {'from': source, 'to': target, 'source': f'{source}.bin'}
            if source in COMPLEX and target == 'bool':
                pairs.append({**pair, 'refused': True})
                continue
            result, mask = judged(array, target)
            low, high = lossy_bounds(array, result, target)
            name = f'{source}-{target}'
            (out / f'{name}.bin').write_bytes(memory_form(result))
            (out / f'{name}.mask').write_bytes(mask.tobytes())
            pairs.append({**pair, 'count': array.size, 'result': f'{name}.bin', 'mask': f'{name}.mask',
                          'lossy_min': int(low.sum()), 'lossy_max': int(high.sum())})
            elements += int((mask != 0).sum())
    (out / 'index.json').write_text(json.dumps({'schema': 1, 'pairs': pairs}, indent=0) + '\n')
    return {'pairs': len(pairs), 'elements': elements}


def patterns(name):
    n = bits(name)
    if name == 'bool':
        return np.array([False, True])
    if n < 8:
        return np.arange(2**n, dtype=np.uint8).astype(np.int8).view(dtype(name))
    if n <= 16:
        return np.arange(2**n, dtype=f'u{n // 8}').view(dtype(name))
    rng = np.random.default_rng([ALL.index(name), n])
    if name in COMPLEX:
        half = 'float32' if name == 'complex64' else 'float64'
        real = patterns(half)
        out = np.empty(2 * real.size, dtype(name))
        out.real = np.concatenate([real, real])
        # Imaginary parts: none, then any.
        out.imag = np.concatenate([np.zeros_like(real), rng.permutation(real)])
        return out
    noise = rng.integers(0, 256, size=RANDOM_COUNT * n // 8, dtype=np.uint8).view(dtype(name))
    edges = integer_edges(name) if name in INTEGERS else float_edges(name, rng)
    return np.concatenate([edges, noise])


def integer_edges(name):
    low, high = reference.integer_range(name)
    values = {0, low, high}
    for power in range(64):
        for ulp in (7, 8, 9, 10, 11, 12, 23, 24, 25, 39, 53):
            # Powers of two and the halfway cases of every float's mantissa, one to either side.
            values |= {(1 << power) + d for d in (-1, 0, 1)}
            if ulp <= power:
                values |= {(1 << power) + (1 << (power - ulp)) + d for d in (-1, 0, 1)}
                values |= {(1 << power) + 3 * (1 << (power - ulp)) + d for d in (-1, 0, 1)}
    # Rounded to float64 first, this would end in another bfloat16 than rounded to float32 at once.
    values |= {(1 << 62) + (1 << 54) + (1 << 38) + 1}
    values |= {-v for v in values}
    return np.array(sorted(v for v in values if low <= v <= high), dtype(name))


def float_edges(name, rng):
    kind = dtype(name)
    values = [np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan], kind)]
    for small in FLOATS:
        if bits(small) > 16:
            continue
        finite = np.unique(patterns(small).astype(np.float64))
        finite = finite[np.isfinite(finite)]
        at = rng.choice(finite.size - 1, min(finite.size - 1, 300), replace=False)
        # Values of the small type, and the ties halfway between neighbours.
        points = np.concatenate([finite[at], (finite[at] + finite[at + 1]) / 2]).astype(kind)
        values += [points, np.nextafter(points, kind.type(np.inf)), np.nextafter(points, kind.type(-np.inf)),
                   (points.astype(np.float64) * (1 + 1e-12)).astype(kind)]
    for power in range(-160, 160, 7):
        values.append((rng.standard_normal(8) * 2.0 ** power).astype(kind))
    for integers in INTEGERS:
        low, high = reference.integer_range(integers)
        ends = np.array([low - 1, low, low + 1, high - 1, high, high + 1], np.float64).astype(kind)
        values += [ends, ends + kind.type(0.5), ends - kind.type(0.5), np.nextafter(ends, kind.type(0))]
    extremes = np.finfo(kind)
    values.append(np.array([extremes.max, -extremes.max, extremes.tiny, extremes.smallest_subnormal], kind))
    return np.concatenate(values)


def judged(array, target):
    """(elements of type `target`, mask)."""
    result = reference.cast(array, target)
    defined = reference.defined(array, target)
    source = array.dtype.name
    if 'float8_e8m0fnu' in (source, target) or source in NOT_IN_TENSORSTORE or target in NOT_IN_TENSORSTORE:
        mask = judged_by_ml_dtypes(array, result, target)
    else:
        mask = np.where(defined, 1, 2)
    return result, mask.astype(np.uint8)


def judged_by_ml_dtypes(array, result, target):
    """1 where ml_dtypes' own cast agrees, 2 where the rule replaces it, 0 where it is not to be trusted.

    It rounds float64 through float32 on the way to narrow types; one rounding is what the neighbours of
    those types do in TensorStore, so elements where the two differ are left out.
    """
    source = array.dtype.name
    if source in COMPLEX:
        if target in COMPLEX:
            return np.ones(array.shape, np.uint8)
        array = np.asarray(array.real, order='C')
    if target in INTEGERS:
        if array.dtype.name not in FLOATS:
            return np.ones(array.shape, np.uint8)
        low, high = reference.integer_range(target)
        inside = reference.defined_range(np.trunc(array.astype(np.float64)), low, high)
        return np.where(inside, 1, 2)
    try:
        theirs = array.astype(dtype(target))
    except TypeError:       # no direct cast between two of its types
        theirs = array.astype(np.float32).astype(dtype(target))
    return np.where(same(result, theirs), 1, 0)


def lossy_bounds(array, result, target):
    """(surely lossy, possibly lossy), one bool per element."""
    source = array.dtype.name
    never = np.zeros(array.shape, bool)
    if source == target:
        return never, never
    if source in COMPLEX and target in COMPLEX:
        parts = [lossy_bounds(*(np.asarray(getattr(x, part), order='C') for x in (array, result)),
                              'float32' if target == 'complex64' else 'float64') for part in ('real', 'imag')]
        return parts[0][0] | parts[1][0], parts[0][1] | parts[1][1]
    if source in COMPLEX:
        low, high = lossy_bounds(np.asarray(array.real, order='C'), result, target)
        return low | (array.imag != 0), high | True
    if target in COMPLEX:
        return lossy_bounds(array, np.asarray(result.real, order='C'), 'float32' if target == 'complex64' else 'float64')
    if source not in FLOATS:
        return integer_lossy(array, result, target)
    return float_lossy(as_float(array), result, target)


def integer_lossy(array, result, target):
    never = np.zeros(array.shape, bool)
    if array.dtype.name == 'bool':
        bad = np.isnan(as_float(result)) if target in FLOATS else never       # 0 in a type without zero
        return bad, bad
    if target == 'bool':
        return never, never
    if target in INTEGERS:
        low, high = reference.integer_range(target)
        wide = array.astype(object)
        wrapped = np.array([not low <= int(v) <= high for v in wide], bool)
        return wrapped, wrapped
    values = as_float(result)
    zero = array.astype(np.uint64 if array.dtype.name == 'uint64' else np.int64) == 0
    gone = ~np.isfinite(values) | ((values == 0) & ~zero)
    return gone, gone | saturated(reference.cast(array, 'float64'), target)


def float_lossy(values, result, target):
    finite, nan = np.isfinite(values), np.isnan(values)
    if target == 'bool':
        return np.zeros(values.shape, bool), nan
    if target in INTEGERS:
        low, high = reference.integer_range(target)
        surely = nan | ~reference.defined_range(np.trunc(values.astype(np.float64)), low, high)
        # 0.3 to 0 is truncation in range, and a nonzero that became zero.
        return surely, surely | ((np.trunc(values) == 0) & (values != 0))
    after = as_float(result)
    surely = (finite & ~np.isfinite(after)) | (finite & (values != 0) & (after == 0))
    # Infinity or NaN in a type that lacks them, and ends of range that absorb what lies beyond.
    changed = (~finite & (np.isnan(values) != np.isnan(after))) | (np.isinf(values) & ~np.isinf(after))
    return surely, surely | changed | saturated(values.astype(np.float64), target)


def saturated(values, target):
    """Beyond the largest value of a type that has no infinity and no NaN to go to, or below the least of one without zero."""
    if target == 'float8_e8m0fnu':
        return (values > 0) & (values < 2.0 ** -127)
    if target not in ('float4_e2m1fn', 'float6_e2m3fn', 'float6_e3m2fn'):
        return np.zeros(values.shape, bool)
    largest = patterns(target).astype(np.float64).max()
    return np.abs(values) > largest
