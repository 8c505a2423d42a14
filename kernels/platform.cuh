// What differs between the compilers of these sources: nvcc and NVRTC for devices, a C++14 compiler for tests.
//
// No kernel here has a barrier or shared memory, so on the host a launch is two plain loops, over blocks and over threads:
// whoever compiles the sources there sets `host_grid` and calls the kernel once a thread (tests/kernels/shim.cpp does).
// Without headers: NVRTC has none.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

// Threads of a block, of every kernel.
enum : u32 { THREADS = 256 };

// What a thread moves at once where both sides are aligned to it.
struct alignas(8) Word8 {
    u32 part[2];
};
struct alignas(16) Word16 {
    u32 part[4];
};

#ifdef __CUDACC__

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(256)
// For loops over registers, and for loops whose body is long: unrolled, it would cost seconds of the driver's compiler.
#define UNROLLED _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")

DEVICE u32 thread_index() { return threadIdx.x; }
DEVICE u64 block_index() { return blockIdx.x; }
DEVICE u64 block_count() { return gridDim.x; }
DEVICE u32 leading_zeros(u64 value) { return static_cast<u32>(__clzll(static_cast<i64>(value))); }

// Single steps of IEEE 754 arithmetic on f32 bits, ties to even, subnormals kept: nothing is contracted or flushed.
DEVICE u32 multiply_add(u32 a, u32 b, u32 c) {
    return __float_as_uint(__fmaf_rn(__uint_as_float(a), __uint_as_float(b), __uint_as_float(c)));
}
DEVICE u32 multiply(u32 a, u32 b) { return __float_as_uint(__fmul_rn(__uint_as_float(a), __uint_as_float(b))); }
// Whether a magnitude is at least another; none is NaN.
DEVICE bool is_as_large(u32 a, u32 b) { return fabsf(__uint_as_float(a)) >= __uint_as_float(b); }
DEVICE bool is_nan(u32 a) { return __uint_as_float(a) != __uint_as_float(a); }

// Adds the values of all threads of the block to a counter. Every thread of a warp gets here, so that a warp adds its
// values up by shuffles and one thread makes one atomic addition, if there is anything to add.
DEVICE void add_up(u64* counter, u32 value) {
    for (i32 distance = 16; distance > 0; distance /= 2) {
        value += __shfl_down_sync(0xFFFFFFFFu, value, distance);
    }
    if ((threadIdx.x & 31) == 0 && value != 0) {
        atomicAdd(counter, static_cast<u64>(value));
    }
}

DEVICE void add_once(u64* counter, u64 value) { atomicAdd(counter, value); }

#else

#define DEVICE static inline
#define KERNEL extern "C" void
#define UNROLLED
#define ROLLED

struct HostGrid {
    u64 block;
    u64 blocks;
    u32 thread;
};
static thread_local HostGrid host_grid;

DEVICE u32 thread_index() { return host_grid.thread; }
DEVICE u64 block_index() { return host_grid.block; }
DEVICE u64 block_count() { return host_grid.blocks; }
DEVICE u32 leading_zeros(u64 value) { return value == 0 ? 64 : static_cast<u32>(__builtin_clzll(value)); }

DEVICE float single(u32 bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
DEVICE u32 bits_of(float value) {
    u32 bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}
DEVICE u32 multiply_add(u32 a, u32 b, u32 c) { return bits_of(__builtin_fmaf(single(a), single(b), single(c))); }
DEVICE u32 multiply(u32 a, u32 b) { return bits_of(single(a) * single(b)); }
DEVICE bool is_as_large(u32 a, u32 b) { return __builtin_fabsf(single(a)) >= single(b); }
DEVICE bool is_nan(u32 a) { return single(a) != single(a); }

DEVICE void add_once(u64* counter, u64 value) { __atomic_fetch_add(counter, value, __ATOMIC_RELAXED); }
DEVICE void add_up(u64* counter, u32 value) {
    if (value != 0) {
        add_once(counter, value);
    }
}

#endif
