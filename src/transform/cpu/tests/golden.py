"""Writes golden.txt: for every pair of types, a digest of what TensorStore's cast driver makes of fixed patterns.

Made with tensorstore 0.1.86, ml_dtypes 0.6.0, numpy 2.4.6. golden.rs builds the same patterns and the same digests.
Types that TensorStore lacks, and float8_e8m0fnu, which it gets wrong, are cast by ml_dtypes, from or to the nearest type
that both know exactly; float64 to narrow floats is then rounded here, once, by search in the table of all values.
"""

import ml_dtypes
import numpy as np
import tensorstore as ts

NAMES = """bool int2 int4 int8 int16 int32 int64 uint2 uint4 uint8 uint16 uint32 uint64 float4_e2m1fn float6_e2m3fn
float6_e3m2fn float8_e3m4 float8_e4m3 float8_e4m3fn float8_e4m3fnuz float8_e4m3b11fnuz float8_e5m2 float8_e5m2fnuz
float8_e8m0fnu float16 bfloat16 float32 float64 complex64 complex128""".split()
MINE = {"uint2", "uint4", "float6_e2m3fn", "float6_e3m2fn", "float8_e4m3", "float8_e8m0fnu"}
COUNT = 1 << 14  # elements of the wide types; narrow ones take every value
GOLDEN = 0x9E3779B97F4A7C15
np.seterr(all="ignore")


def dtype(name):
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def bits(name):
    """Bits of an integer type, signed ones negative; else 0."""
    kind, _, width = name.partition("int")
    return (-int(width) if kind == "" else int(width)) if width else 0


def patterns(name):
    """The source elements as unsigned integers; complex ones as two columns."""
    index = np.arange(COUNT, dtype=np.uint64)
    mixed = index * np.uint64(GOLDEN)
    if name.startswith("complex"):
        return patterns("float32" if name == "complex64" else "float64").reshape(-1, 2)
    size = dtype(name).itemsize
    if size == 1:
        codes = {"bool": 2, "float4_e2m1fn": 16, "float6_e2m3fn": 64, "float6_e3m2fn": 64}.get(name, 256)
        codes = 1 << abs(bits(name)) if bits(name) else codes
        codes = np.arange(codes, dtype=np.uint8)
        shift = 8 - abs(bits(name))
        return ((codes << shift).view(np.int8) >> shift).view(np.uint8) if bits(name) < 0 else codes
    if size == 2:
        return np.arange(1 << 16, dtype=np.uint16)
    if bits(name):
        return (mixed >> (index % 64)).astype(f"u{size}")
    exponent, drop = (0x30000000, 3) if size == 4 else (0x3E00000000000000, 6)
    mixed = mixed >> np.uint64(64 - 8 * size)
    near_one = np.uint64(exponent) + (mixed >> np.uint64(drop)) + ((index & 1) << np.uint64(8 * size - 1))
    return np.where(index < COUNT // 2, mixed, near_one).astype(f"u{size}")


def cast(array, name):
    return np.array(ts.cast(ts.array(np.ascontiguousarray(array)), ts.dtype(name)).read().result())


def round_once(values, name):
    """float64 to a small float: nearest, ties to the even code, read off the table of finite values."""
    half = 1 << {"float6_e2m3fn": 5, "float6_e3m2fn": 5}.get(name, 7)
    table = np.arange(half, dtype=np.uint8).view(dtype(name)).astype(np.float64)
    table = table[np.isfinite(table)]
    middles = (table + np.append(table[1:], 2 * table[-1] - table[-2])) / 2
    codes = np.searchsorted(middles, abs(values), side="left")
    codes += (codes < len(middles)) & (abs(values) == middles[np.minimum(codes, len(middles) - 1)]) & (codes % 2 == 1)
    special = values.astype(np.float32).astype(dtype(name)).view(np.uint8)
    past = np.where(np.signbit(values), -np.inf, np.inf).astype(np.float32).astype(dtype(name)).view(np.uint8)
    codes = np.where(codes == len(table), past, codes | np.signbit(values) * half)
    return np.where(np.isnan(values), special, codes).astype(np.uint8)


def expected(source, raw, target):
    """The target elements as rows of bytes."""
    if source == target:
        return raw
    if source in ("int2", "int4"):
        array = raw.view(np.int8)
    elif source in ("uint2", "uint4"):
        array = raw
    else:
        array = np.ascontiguousarray(raw).view(dtype(source)).reshape(-1)
        array = array.astype(np.float32) if source in MINE else array
    if target not in MINE:
        out = cast(array, target)
        if target in ("int2", "int4"):
            shift = 8 + bits(target)
            return (out.view(np.uint8) << shift).view(np.int8) >> shift
        return out
    if bits(target):
        return cast(array, "int64").astype(np.uint8) & np.uint8((1 << bits(target)) - 1)
    if target != "float8_e8m0fnu" and source in ("float64", "complex128"):
        return round_once(np.real(array), target)
    return cast(array, "float32").astype(dtype(target))


def digest(source, target):
    raw = patterns(source)
    out = np.ascontiguousarray(expected(source, raw, target))
    parts = 2 if target.startswith("complex") else 1
    words = np.frombuffer(out.tobytes(), f"u{dtype(target).itemsize // parts}").reshape(-1, parts).astype(np.uint64)
    if not bits(target) and target != "bool":
        part = {"complex64": "float32", "complex128": "float64"}.get(target, target)
        values = np.frombuffer(out.tobytes(), dtype(part))
        words = np.where(np.isnan(values.astype(np.float32)).reshape(-1, parts), np.uint64(0xFFFFFFFFFFFFFFFF), words)
    weight = (2 * np.arange(words.size, dtype=np.uint64).reshape(words.shape) + 1) * np.uint64(GOLDEN)
    terms = (words + np.uint64(1)) * weight
    if bits(target) and not bits(source) and source != "bool":  # undefined in C++ if out of range
        values = np.ascontiguousarray(raw).view(dtype(source)).reshape(-1)
        values = np.trunc(np.real(values).astype(np.float64))
        past = 2.0 ** (bits(target) if bits(target) > 0 else -bits(target) - 1)
        low = 0 if bits(target) > 0 else -past
        terms[~((values >= low) & (values < past))] = 0
    return int(np.sum(terms, dtype=np.uint64))


with open("golden.txt", "w") as file:
    for source in NAMES:
        for target in NAMES:
            if not (source.startswith("complex") and target == "bool"):
                print(source, target, f"{digest(source, target):016x}", file=file)
