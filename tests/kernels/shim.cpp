// The kernels compiled for the host: a launch is a loop over blocks and threads, possible because no kernel has a barrier.
// tests/kernels.rs loads this as a shared library.

#include "place.cu"

namespace {
template <typename Kernel>
void loop(Kernel kernel, u64 blocks, const Descriptor* table, const u64* first_tile, u32 boxes, Tally* tallies) {
    for (u64 block = 0; block < blocks; block++) {
        for (u32 thread = 0; thread < THREADS; thread++) {
            host_grid = {block, blocks, thread};
            kernel(table, first_tile, boxes, tallies);
        }
    }
}
}  // namespace

#define LAUNCH(name)                                                                                                  \
    extern "C" void launch_##name(u64 blocks, const Descriptor* table, const u64* first_tile, u32 boxes, Tally* tallies) { \
        loop(name, blocks, table, first_tile, boxes, tallies);                                                        \
    }
LAUNCH(touchdown_place)
LAUNCH(touchdown_cast)
LAUNCH(touchdown_copy)
LAUNCH(touchdown_transpose)
LAUNCH(touchdown_fill)

// The layout of the shared types, for the host to compare: sizes, then the offset of each field in order.
extern "C" u64 layout(u64* out) {
    const u64 facts[] = {
        sizeof(Descriptor),
        __builtin_offsetof(Descriptor, source),
        __builtin_offsetof(Descriptor, target),
        __builtin_offsetof(Descriptor, count),
        __builtin_offsetof(Descriptor, extent),
        __builtin_offsetof(Descriptor, source_stride),
        __builtin_offsetof(Descriptor, target_stride),
        __builtin_offsetof(Descriptor, rank),
        __builtin_offsetof(Descriptor, counter),
        __builtin_offsetof(Descriptor, source_unit),
        __builtin_offsetof(Descriptor, target_unit),
        __builtin_offsetof(Descriptor, from),
        __builtin_offsetof(Descriptor, to),
        __builtin_offsetof(Descriptor, flags),
        sizeof(Tally),
        __builtin_offsetof(Tally, lossy),
        __builtin_offsetof(Tally, invalid),
        RANK_MAX,
        THREADS,
        THREADS * PLACE_STEPS,
        THREADS * CAST_STEPS,
        THREADS * COPY_STEPS,
        THREADS * FILL_STEPS,
        SQUARE_SIDE,
        CAST_LANES,
        MICRO_TILES,
    };
    const u64 count = sizeof(facts) / sizeof(facts[0]);
    for (u64 at = 0; at < count; at++) {
        out[at] = facts[at];
    }
    return count;
}

// Size in bytes of an element, by its code.
extern "C" u32 element_size(u32 dtype) { return size_of(dtype); }
