"""Element types by name, and the one memory form that the judge and the judged share.

Memory form: little-endian, C order; types below one byte take one byte an element,
sign-extended when they are signed and zero-extended otherwise.
"""

import ml_dtypes
import numpy as np

SIGNED = ['int2', 'int4', 'int8', 'int16', 'int32', 'int64']
UNSIGNED = ['uint2', 'uint4', 'uint8', 'uint16', 'uint32', 'uint64']
INTEGERS = SIGNED + UNSIGNED
FLOAT8 = ['float8_e3m4', 'float8_e4m3fn', 'float8_e4m3fnuz', 'float8_e4m3b11fnuz',
          'float8_e5m2', 'float8_e5m2fnuz', 'float8_e8m0fnu', 'float8_e4m3']
FLOATS = ['float16', 'bfloat16', 'float32', 'float64', *FLOAT8,
          'float4_e2m1fn', 'float6_e2m3fn', 'float6_e3m2fn']
COMPLEX = ['complex64', 'complex128']
ALL = ['bool', *INTEGERS, *FLOATS, *COMPLEX]

# TensorStore has no such types: Orbax cannot store them, and ml_dtypes alone can judge casts to them.
NOT_IN_TENSORSTORE = ['uint2', 'uint4', 'float8_e4m3', 'float6_e2m3fn', 'float6_e3m2fn']
STORABLE = [name for name in ALL if name not in NOT_IN_TENSORSTORE]

BITS = {'int2': 2, 'uint2': 2, 'int4': 4, 'uint4': 4, 'float4_e2m1fn': 4,
        'float6_e2m3fn': 6, 'float6_e3m2fn': 6}


def dtype(name):
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def bits(name):
    return BITS.get(name, 1 if name == 'bool' else dtype(name).itemsize * 8)


def memory_form(array):
    """The bytes of `array` in memory form."""
    array = np.asarray(array, order='C')
    name = array.dtype.name
    if name in ('int2', 'int4'):
        # The high bits of ml_dtypes' byte are noise: move the sign up and bring it back arithmetically.
        shift = 8 - BITS[name]
        return ((array.view(np.int8) << shift).astype(np.int8) >> shift).tobytes()
    if name in BITS:
        return (array.view(np.uint8) & ((1 << BITS[name]) - 1)).tobytes()
    return array.astype(array.dtype.newbyteorder('<'), copy=False).tobytes()


def from_memory_form(data, name, shape):
    if name in ('int2', 'int4'):
        return np.frombuffer(data, np.int8).astype(dtype(name)).reshape(shape)
    return np.frombuffer(data, dtype(name)).reshape(shape)


def same(a, b):
    """Per element: equal bits, any NaN equal to any NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape, (a.dtype, a.shape, b.dtype, b.shape)
    name = a.dtype.name
    if name in COMPLEX:
        return same(np.asarray(a.real, order='C'), np.asarray(b.real, order='C')) & same(
            np.asarray(a.imag, order='C'), np.asarray(b.imag, order='C'))
    width = a.dtype.itemsize
    raw = [np.frombuffer(memory_form(x), f'<u{width}').reshape(x.shape) for x in (a, b)]
    equal = raw[0] == raw[1]
    if name in FLOATS:
        equal |= np.isnan(as_float(a)) & np.isnan(as_float(b))
    return equal


def as_float(array):
    """Small floats widened exactly, float64 left alone."""
    return array if array.dtype == np.float64 else array.astype(np.float32)
