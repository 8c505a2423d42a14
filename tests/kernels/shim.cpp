// The kernels compiled for the host: a launch is a loop over blocks and threads, possible because no kernel has a barrier.
// tests/kernels.rs and the simulated driver (tests/fakecuda) load this as a shared library.

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

// What a launch touches, for the simulated driver to check before it runs: the tables themselves, then the boxes in them.
using Report = void (*)(void* who, u64 address, u64 bytes, u32 writes);

extern "C" void table_spans(const Descriptor* table, const u64* first_tile, u32 boxes, Tally*, Report report, void* who) {
    report(who, reinterpret_cast<u64>(table), boxes * sizeof(Descriptor), 0);
    report(who, reinterpret_cast<u64>(first_tile), (boxes + 1) * sizeof(u64), 0);
}

extern "C" void box_spans(const Descriptor* table, const u64*, u32 boxes, Tally* tallies, Report report, void* who) {
    for (u32 at = 0; at < boxes; at++) {
        const Descriptor& box = table[at];
        if (box.rank == 0 || box.rank > RANK_MAX) {
            report(who, 0, 1, 1);  // no box: the table has not arrived
            return;
        }
        u64 source = 1, target = 1;
        for (u32 dim = 0; dim < box.rank; dim++) {
            source += (box.extent[dim] - 1) * box.source_stride[dim];
            target += (box.extent[dim] - 1) * box.target_stride[dim];
        }
        report(who, box.source, source * box.source_unit, 0);
        report(who, box.target, target * box.target_unit, 1);
        report(who, reinterpret_cast<u64>(tallies + box.counter), sizeof(Tally), 1);
    }
}

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
