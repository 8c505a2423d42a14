// One element of any type to any other, bit for bit as src/transform/cpu defines it, with integer arithmetic only: the
// results depend neither on the device's generation, nor on rounding modes, flushing or contraction.
//
// Thirty types make nine hundred pairs. As on the processor an element travels through a *value* that holds it exactly: the
// bits of an f32, the bits of an f64, or an integer. Narrow floats decode to f32 bits; encoding to them starts from f64 bits,
// to which f32 bits widen exactly. Where the rules want two roundings (f64 to float16 goes through f32), the first one is made
// by going through `to_single`. The types are the same for all threads of a block, so the switches do not diverge.
#pragma once

#include "descriptor.cuh"

// The bits of an element: `high` is used by complex128 alone, whose imaginary part it is.
struct Raw {
    u64 low;
    u64 high;
};

enum Kind : u32 { SINGLE, DOUBLE, SIGNED, UNSIGNED };

struct Value {
    Kind kind;
    u64 bits;
};

// What the codes above the finite range mean: as in src/transform/cpu/float.rs.
enum Specials : u32 { IEEE, FN, FNUZ, FINITE };

struct Format {
    u32 exponent_bits;
    u32 mantissa_bits;
    i32 bias;
    Specials specials;
};

enum : u32 { F32_INFINITY = 0x7F800000u };
enum : u64 { F64_INFINITY = 0x7FF0000000000000ull, F64_HIDDEN = 1ull << 52 };

DEVICE u32 size_of(u32 dtype) {
    switch (dtype) {
        case INT16: case UINT16: case FLOAT16: case BFLOAT16: return 2;
        case INT32: case UINT32: case FLOAT32: return 4;
        case INT64: case UINT64: case FLOAT64: case COMPLEX64: return 8;
        case COMPLEX128: return 16;
        default: return 1;
    }
}

DEVICE bool is_complex(u32 dtype) { return dtype == COMPLEX64 || dtype == COMPLEX128; }

DEVICE Format format_of(u32 dtype) {
    switch (dtype) {
        case FLOAT4_E2M1FN: return {2, 1, 1, FINITE};
        case FLOAT6_E2M3FN: return {2, 3, 1, FINITE};
        case FLOAT6_E3M2FN: return {3, 2, 3, FINITE};
        case FLOAT8_E3M4: return {3, 4, 3, IEEE};
        case FLOAT8_E4M3: return {4, 3, 7, IEEE};
        case FLOAT8_E4M3FN: return {4, 3, 7, FN};
        case FLOAT8_E4M3FNUZ: return {4, 3, 8, FNUZ};
        case FLOAT8_E4M3B11FNUZ: return {4, 3, 11, FNUZ};
        case FLOAT8_E5M2: return {5, 2, 15, IEEE};
        case FLOAT8_E5M2FNUZ: return {5, 2, 16, FNUZ};
        default: return {5, 10, 15, IEEE};  // float16
    }
}

// Bits and signedness of an integer type.
DEVICE u32 integer_bits(u32 dtype) {
    switch (dtype) {
        case INT2: case UINT2: return 2;
        case INT4: case UINT4: return 4;
        case INT8: case UINT8: return 8;
        case INT16: case UINT16: return 16;
        case INT32: case UINT32: return 32;
        default: return 64;
    }
}

DEVICE bool is_signed(u32 dtype) { return dtype >= INT2 && dtype <= INT64; }

// value / 2^shift to the nearest integer, ties to even; 1 <= shift <= 63.
DEVICE u64 round_shift(u64 value, u32 shift) {
    const u64 whole = value >> shift;
    const u64 rest = value & ((1ull << shift) - 1);
    const u64 half = 1ull << (shift - 1);
    return whole + (rest > half || (rest == half && (whole & 1) != 0) ? 1 : 0);
}

// The low bits, sign-extended.
DEVICE u64 sign_extend(u64 bits, u32 width) {
    return static_cast<u64>(static_cast<i64>(bits << (64 - width)) >> (64 - width));
}

// f32 bits to f64 bits, exactly; NaN becomes quiet.
DEVICE u64 widen(u32 bits) {
    const u64 sign = static_cast<u64>(bits >> 31) << 63;
    const u32 magnitude = bits & 0x7FFFFFFFu;
    if (magnitude >= F32_INFINITY) {
        const u64 payload = static_cast<u64>(magnitude & 0x7FFFFFu) << 29;
        return sign | F64_INFINITY | payload | (payload != 0 ? 1ull << 51 : 0);
    }
    if (magnitude >= 1u << 23) {
        return sign | ((static_cast<u64>(magnitude) << 29) + (static_cast<u64>(1023 - 127) << 52));
    }
    if (magnitude == 0) {
        return sign;
    }
    const u32 top = 63 - leading_zeros(magnitude);  // the value is magnitude * 2^-149
    return sign | ((static_cast<u64>(top + 1023 - 149 - 1) << 52) + (static_cast<u64>(magnitude) << (52 - top)));
}

// f64 bits to the code of the nearest value of the format, ties to even. Adds to `lossy` whether a finite value overflowed
// or a nonzero one vanished.
DEVICE u64 encode_float(u64 bits, Format format, bool* lossy) {
    const u32 kept = format.mantissa_bits;
    const u64 sign = 1ull << (format.exponent_bits + kept);
    u64 max, overflow, nan;
    switch (format.specials) {
        case IEEE: overflow = sign - (1ull << kept); max = overflow - 1; nan = overflow | 1ull << (kept - 1); break;
        case FN: overflow = sign - 1; max = sign - 2; nan = sign - 1; break;
        case FNUZ: overflow = sign; max = sign - 1; nan = sign; break;
        default: overflow = sign - 1; max = sign - 1; nan = sign; break;
    }
    const u64 magnitude = bits & ~(1ull << 63);
    u64 code;
    if (magnitude >= F64_INFINITY) {
        code = magnitude > F64_INFINITY ? nan : overflow;
        *lossy |= format.specials == FINITE;
    } else {
        const i32 exponent = static_cast<i32>(magnitude >> 52);
        const i32 rebased = exponent - 1023 + format.bias;
        if (rebased >= 1) {
            code = round_shift(magnitude - (static_cast<u64>(1023 - format.bias) << 52), 52 - kept);
        } else {
            // A subnormal of the target. Below half of the smallest one (subnormal f64 are all far below) it is zero.
            const i32 shift = 52 - static_cast<i32>(kept) + 1 - rebased;
            const u64 significand = (magnitude & (F64_HIDDEN - 1)) | F64_HIDDEN;
            code = exponent == 0 || shift > 54 ? 0 : round_shift(significand, static_cast<u32>(shift));
        }
        *lossy |= code > max || (code == 0 && magnitude != 0);
        code = code > max ? overflow : code;
    }
    const bool signless = format.specials == FNUZ && (code == 0 || code == sign);
    return bits >> 63 && !signless ? code ^ sign : code;
}

// f32 bits to the code of the nearest value of a format of at most 10 mantissa bits: as encode_float, in 32 bits.
//
// Adding a power of two whose last place is that of the wanted code rounds a magnitude to it; taking it away again is exact, and
// so is the multiplication that moves the exponent to the format's bias: subnormals of the format are those of f32 then, and
// the upper bits are the code.
DEVICE u32 encode_narrow(u32 bits, Format format, bool* lossy) {
    const u32 kept = format.mantissa_bits;
    const u32 bias = static_cast<u32>(format.bias);
    const u32 sign = 1u << (format.exponent_bits + kept);
    u32 max, overflow, nan;
    switch (format.specials) {
        case IEEE: overflow = sign - (1u << kept); max = overflow - 1; nan = overflow | 1u << (kept - 1); break;
        case FN: overflow = sign - 1; max = sign - 2; nan = sign - 1; break;
        case FNUZ: overflow = sign; max = sign - 1; nan = sign; break;
        default: overflow = sign - 1; max = sign - 1; nan = sign; break;
    }
    const u32 magnitude = bits & 0x7FFFFFFFu;
    const u32 beyond = (127 + (1u << format.exponent_bits) - bias) << 23;  // larger than what any code stands for
    const u32 bounded = magnitude < beyond ? magnitude : beyond;
    const u32 smallest_normal = (128 - bias) << 23;
    const u32 exponent = bounded & F32_INFINITY;
    const u32 first = exponent > smallest_normal ? exponent : smallest_normal;  // the power of two that rounding goes by
    const u32 places = (127 + 23 - kept) << 23;
    const u32 rounded = multiply_add(first, places ^ 1u << 31, multiply_add(first, places, bounded));
    u32 code = multiply(rounded, bias << 23) >> (23 - kept);
    const u32 vanishing = (127 - bias - kept) << 23;  // half of the smallest value: it and what is smaller become zero
    *lossy |= (code > max && magnitude < F32_INFINITY) || magnitude - 1 < vanishing;
    // What is larger than the largest code is the one that says so, or that code itself.
    code = code < overflow ? code : overflow;
    if (nan != overflow && magnitude > F32_INFINITY) {
        code = nan;
    }
    *lossy |= format.specials == FINITE && magnitude >= F32_INFINITY;
    const bool signless = format.specials == FNUZ && (code == 0 || code == sign);
    const u32 sign_of = bits >> (31 - format.exponent_bits - kept) & sign;
    return signless ? code : code ^ sign_of;
}

// f64 bits to f32 bits. A NaN keeps the high bits of its payload and becomes quiet.
DEVICE u32 narrow(u64 bits, bool* lossy) {
    if ((bits & ~(1ull << 63)) > F64_INFINITY) {
        const u32 payload = static_cast<u32>(bits >> 29) & 0x7FFFFFu;
        return static_cast<u32>(bits >> 63) << 31 | F32_INFINITY | 1u << 22 | payload;
    }
    return static_cast<u32>(encode_float(bits, Format{8, 23, 127, IEEE}, lossy));
}

// The bits of the nearest float of an integer, ties to even, in a type of this many mantissa bits and this bias.
DEVICE u64 round_integer(Value value, u32 kept, u32 bias, u32 sign_bit) {
    const bool negative = value.kind == SIGNED && value.bits >> 63;
    const u64 magnitude = negative ? 0 - value.bits : value.bits;
    if (magnitude == 0) {
        return 0;
    }
    const u32 top = 63 - leading_zeros(magnitude);
    const u64 mantissa = top <= kept ? magnitude << (kept - top) : round_shift(magnitude, top - kept);
    return (static_cast<u64>(top + bias - 1) << kept) + mantissa + (static_cast<u64>(negative) << sign_bit);
}

// The value as f32 bits, rounded once.
DEVICE u32 to_single(Value value, bool* lossy) {
    switch (value.kind) {
        case SINGLE: return static_cast<u32>(value.bits);
        case DOUBLE: return narrow(value.bits, lossy);
        default: return static_cast<u32>(round_integer(value, 23, 127, 31));
    }
}

// The upper half of f32, rounded; a NaN keeps its payload and one more bit, as in src/transform/cpu/float.rs.
DEVICE u64 encode_bfloat16(u32 bits, bool* lossy) {
    const u32 magnitude = bits & 0x7FFFFFFFu;
    const u32 rounded = bits + 0x7FFFu + (bits >> 16 & 1);
    const u32 code = magnitude > F32_INFINITY ? bits | 0x00200000u : rounded;
    *lossy |= (magnitude >= 0x7F7F8000u && magnitude < F32_INFINITY) || (magnitude != 0 && magnitude <= 0x8000u);
    return code >> 16;
}

// The nearest power of two, ties upwards; src/transform/cpu/float.rs has the argument for each constant.
DEVICE u64 encode_e8m0(u32 bits, bool* lossy) {
    const u32 half = 1u << 22;
    const u32 code = bits < 1u << 23 ? static_cast<u32>(bits > half) : (bits + half) >> 23;
    const bool refused = bits == 0 || bits >= F32_INFINITY - half;
    *lossy |= (bits & 0x7FFFFFFFu) < F32_INFINITY && (refused || bits < half / 4 * 3);
    return refused ? 0xFF : code & 0xFF;
}

// A narrow float's code to f32 bits, exactly. Bits above the format are ignored. Sign and code, moved to where an f32 has them, are
// an f32 whose exponent is off by the difference of the biases, which a multiplication by a power of two puts right, also of
// subnormals.
DEVICE u32 decode_float(u32 code, Format format) {
    const u32 kept = format.mantissa_bits;
    const u32 bits = format.exponent_bits + kept;
    const u32 sign = 1u << bits;
    const u32 spread = static_cast<u32>(static_cast<i32>(code << (31 - bits)) >> (8 - format.exponent_bits));
    const u32 moved = spread & (1u << 31 | (sign - 1) << (23 - kept));
    const u32 value = multiply(moved, static_cast<u32>(254 - format.bias) << 23);
    if (format.specials == FNUZ) {
        return moved == 1u << 31 ? 1u << 31 | F32_INFINITY | 1u << 22 : value;
    }
    const u32 special = format.specials == IEEE ? sign - (1u << kept) : format.specials == FN ? sign - 1 : sign;
    const u32 from = (special << (23 - kept)) + (static_cast<u32>(127 - format.bias) << 23);
    // Of a normal value the multiplication has left the mantissa as it was.
    return is_as_large(value, from) ? value | F32_INFINITY : value;
}

// The value of a real element in memory form.
DEVICE Value decode(u32 dtype, u64 bits) {
    switch (dtype) {
        case BOOL: return {SIGNED, static_cast<u64>((bits & 0xFF) != 0)};
        case INT2: case INT4: case INT8: case INT16: case INT32: case INT64:
            return {SIGNED, sign_extend(bits, integer_bits(dtype))};
        case UINT2: case UINT4: case UINT8: case UINT16: case UINT32: case UINT64:
            return {UNSIGNED, bits & (~0ull >> (64 - integer_bits(dtype)))};
        case FLOAT8_E8M0FNU: {
            const u32 code = static_cast<u32>(bits & 0xFF);
            return {SINGLE, code == 0 ? 1u << 22 : code == 0xFF ? 0x7FC00000u : code << 23};
        }
        case BFLOAT16: return {SINGLE, (bits & 0xFFFF) << 16};
        case FLOAT32: return {SINGLE, bits & 0xFFFFFFFFu};
        case FLOAT64: return {DOUBLE, bits};
        default: return {SINGLE, decode_float(static_cast<u32>(bits), format_of(dtype))};
    }
}

// Truncation to an integer of this width; out of range modulo 2^width if `wrap`, else saturated; NaN is 0.
DEVICE u64 integer_from_double(u64 bits, u32 width, bool has_sign, bool wrap, bool* lossy) {
    const u64 max = ~0ull >> (64 - width) >> (has_sign ? 1 : 0);
    const bool negative = bits >> 63;
    const u64 magnitude = bits & ~(1ull << 63);
    const i32 exponent = static_cast<i32>(magnitude >> 52) - 1023;  // the value is significand * 2^(exponent - 52)
    const u64 significand = (magnitude & (F64_HIDDEN - 1)) | F64_HIDDEN;
    if (magnitude > F64_INFINITY) {
        *lossy = true;
        return 0;
    }
    if (exponent < 0) {
        *lossy |= magnitude != 0;
        return 0;
    }
    u64 whole = 0;  // modulo 2^64
    if (exponent <= 52) {
        whole = significand >> (52 - exponent);
    } else if (exponent < 52 + 64) {
        whole = significand << (exponent - 52);
    }
    const u64 limit = negative ? (has_sign ? max + 1 : 0) : max;
    if (exponent < 64 && whole <= limit) {
        return negative ? 0 - whole : whole;
    }
    *lossy = true;
    if (wrap) {
        const u64 cut = negative ? 0 - whole : whole;
        return has_sign ? sign_extend(cut, width) : cut & max;
    }
    return negative ? 0 - limit : limit;
}

// A value to the bits of an integer type, wider ones sign-extended.
DEVICE u64 encode_integer(u32 dtype, Value value, bool wrap, bool* lossy) {
    const u32 width = integer_bits(dtype);
    const bool has_sign = is_signed(dtype);
    if (value.kind == SINGLE || value.kind == DOUBLE) {
        const u64 bits = value.kind == SINGLE ? widen(static_cast<u32>(value.bits)) : value.bits;
        return integer_from_double(bits, width, has_sign, wrap, lossy);
    }
    const u64 cut = has_sign ? sign_extend(value.bits, width) : value.bits & (~0ull >> (64 - width));
    // In range if nothing was cut off and both read the top bit alike.
    const bool negative_before = value.kind == SIGNED && value.bits >> 63;
    const bool negative_after = has_sign && cut >> 63;
    *lossy |= cut != value.bits || negative_before != negative_after;
    return cut;
}

// A value to the bits of a real element, or of the part of a complex one.
DEVICE u64 encode(u32 dtype, Value value, bool wrap, bool* lossy) {
    switch (dtype) {
        case BOOL:
            switch (value.kind) {
                case SINGLE: return (value.bits & 0x7FFFFFFFu) != 0;
                case DOUBLE: return value.bits << 1 != 0;
                default: return value.bits != 0;
            }
        case INT2: case INT4: case INT8: case INT16: case INT32: case INT64:
        case UINT2: case UINT4: case UINT8: case UINT16: case UINT32: case UINT64:
            return encode_integer(dtype, value, wrap, lossy);
        case FLOAT64:
            switch (value.kind) {
                case SINGLE: return widen(static_cast<u32>(value.bits));
                case DOUBLE: return value.bits;
                default: return round_integer(value, 52, 1023, 63);
            }
        case FLOAT32: return to_single(value, lossy);
        case BFLOAT16: return encode_bfloat16(to_single(value, lossy), lossy);
        case FLOAT8_E8M0FNU: return encode_e8m0(to_single(value, lossy), lossy);
        default: {
            if (value.kind == DOUBLE && dtype != FLOAT16) {
                return encode_float(value.bits, format_of(dtype), lossy);
            }
            return encode_narrow(to_single(value, lossy), format_of(dtype), lossy);
        }
    }
}

// An element in memory form to one of another type. Adds to `lossy` whether anything was lost, once for both parts of a
// complex element.
DEVICE Raw convert(u32 from, u32 to, bool wrap, Raw element, bool* lossy) {
    if (from == to) {
        return element;
    }
    const u32 from_part = from == COMPLEX64 ? FLOAT32 : from == COMPLEX128 ? FLOAT64 : from;
    const u32 to_part = to == COMPLEX64 ? FLOAT32 : to == COMPLEX128 ? FLOAT64 : to;
    const u64 real = from == COMPLEX64 ? element.low & 0xFFFFFFFFu : element.low;
    const u64 imaginary = from == COMPLEX64 ? element.low >> 32 : element.high;
    const bool both = is_complex(from) && is_complex(to);
    if (is_complex(from) && !both) {
        *lossy |= from == COMPLEX64 ? (imaginary & 0x7FFFFFFFu) != 0 : imaginary << 1 != 0;
    }
    Raw result = {encode(to_part, decode(from_part, real), wrap, lossy), 0};
    if (both) {
        // One of the parts is a float32 and the other type's a float64: nothing else is cast part by part.
        result.high = from == COMPLEX64 ? widen(static_cast<u32>(imaginary)) : narrow(imaginary, lossy);
    }
    if (to == COMPLEX64) {
        return {result.low | result.high << 32, 0};
    }
    return result;
}

DEVICE u64 swap_halves(u64 value, u32 bits, u64 mask) { return (value & mask) << bits | (value >> bits & mask); }

// Reverses the bytes of each unit of `size` bytes.
DEVICE u64 swap_bytes(u64 value, u32 size) {
    value = size >= 2 ? swap_halves(value, 8, 0x00FF00FF00FF00FFull) : value;
    value = size >= 4 ? swap_halves(value, 16, 0x0000FFFF0000FFFFull) : value;
    return size >= 8 ? swap_halves(value, 32, 0x00000000FFFFFFFFull) : value;
}

// A stored element in memory form: little-endian, bits above a sub-byte element as `DType` defines them. Adds to `invalid`
// whether it is a bool that is neither 0 nor 1.
DEVICE Raw memory_form(u32 dtype, bool swap, Raw element, bool* invalid) {
    if (swap) {
        const u32 size = dtype == COMPLEX64 ? 4 : dtype == COMPLEX128 ? 8 : size_of(dtype);
        element.low = swap_bytes(element.low, size);
        element.high = swap_bytes(element.high, size);
    }
    switch (dtype) {
        case BOOL: *invalid |= element.low > 1; break;
        case INT2: element.low = sign_extend(element.low, 2) & 0xFF; break;
        case INT4: element.low = sign_extend(element.low, 4) & 0xFF; break;
        case UINT2: element.low &= 0x03; break;
        case UINT4: case FLOAT4_E2M1FN: element.low &= 0x0F; break;
        case FLOAT6_E2M3FN: case FLOAT6_E3M2FN: element.low &= 0x3F; break;
        default: break;
    }
    return element;
}
