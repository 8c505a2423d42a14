// What the host tells the kernels: src/transform/cuda/descriptor.rs has the same types, and tests/kernels.rs compares them.
#pragma once

#include "platform.cuh"

// Most dimensions of a simplified box: KERNEL_RANK_MAX in src/limits.rs.
enum : u32 { RANK_MAX = 8 };

// Element types, in the order of `DType::ALL` (src/dtype.rs).
enum DType : u32 {
    BOOL,
    INT2, INT4, INT8, INT16, INT32, INT64,
    UINT2, UINT4, UINT8, UINT16, UINT32, UINT64,
    FLOAT4_E2M1FN, FLOAT6_E2M3FN, FLOAT6_E3M2FN,
    FLOAT8_E3M4, FLOAT8_E4M3, FLOAT8_E4M3FN, FLOAT8_E4M3FNUZ, FLOAT8_E4M3B11FNUZ, FLOAT8_E5M2, FLOAT8_E5M2FNUZ,
    FLOAT8_E8M0FNU,
    FLOAT16, BFLOAT16, FLOAT32, FLOAT64,
    COMPLEX64, COMPLEX128,
};

// Bits of `Descriptor::flags`.
enum Flag : u32 {
    // The source is big-endian.
    FLAG_SWAP = 1,
    // Floats out of an integer's range wrap; without it they saturate.
    FLAG_WRAP = 2,
    // touchdown_place walks squares of the last two dimensions, not runs of the last one.
    FLAG_SQUARES = 4,
};

// One box copy. A box is an array of *units*: elements, or for some kernels words or vectors of elements. Dimension `d` runs
// over `extent[d]` units, which lie `source_stride[d]` units of `source_unit` bytes apart in the source, and
// `target_stride[d]` units of `target_unit` bytes in the target. The last dimension is the densest in the target.
struct Descriptor {
    u64 source;  // address of the first unit
    u64 target;  // address of the first unit
    u64 count;   // units of the box, the product of the extents; never 0
    u64 extent[RANK_MAX];
    u64 source_stride[RANK_MAX];
    u64 target_stride[RANK_MAX];
    u32 rank;     // 1 to RANK_MAX
    u32 counter;  // index of the tally
    u16 source_unit;  // bytes
    u16 target_unit;  // bytes
    u8 from;   // DType of the source's elements
    u8 to;     // DType of the target's elements
    u8 flags;  // Flag
    u8 unused;
};
static_assert(sizeof(Descriptor) == 232, "the host has the same layout");

// What a kernel counts, by addition: the host clears it before the first launch.
struct Tally {
    u64 lossy;    // elements that were lossy, as src/transform/cpu/cast.rs defines it
    u64 invalid;  // stored bools that were neither 0 nor 1; their results mean nothing
};
static_assert(sizeof(Tally) == 16, "the host has the same layout");
