// Box copies with casts on a device: what src/transform/cpu does in host memory, in one launch a kernel for a whole batch.
//
// A launch runs a table of descriptors. Each box is cut into *tiles* of a fixed number of units, and `first_tile[i]` counts
// the tiles of all boxes before box `i`, so that five thousand small arrays are one launch and one large array fills the
// device. A block takes the tiles `block, block + blocks, ..`, finds each tile's box by bisection, and its threads take the
// tile's units at distances of `THREADS`, so that neighbouring threads write neighbouring addresses.
//
//     touchdown_place      any types, strides and alignment; squares of two dimensions where the box is turned
//     touchdown_cast       floats of 4, 2 and 1 bytes to each other as models use them, eight elements at a time
//     touchdown_copy       stored bytes are the wanted ones: words of 1 to 16 bytes
//     touchdown_transpose  the same, and the densest dimensions of source and target differ
//     touchdown_fill       one element into every place of a box
//
// All kernels take the same arguments:
//     table       `boxes` descriptors
//     first_tile  `boxes + 1` numbers: of the first tile of each box, and of all tiles; no box has none
//     boxes       number of boxes, at least 1
//     tallies     as many as the descriptors' counters name
// and run in any number of blocks of THREADS threads. Boxes of a launch write disjoint memory.
//
// Positions are found by dividing the number of a unit by the extents. Divisions by 64-bit numbers are slow on devices, so
// boxes of less than 2^32 units, nearly all, divide 32-bit ones. No barriers and no shared memory: see platform.cuh.

#include "convert.cuh"

// Units of a tile that one thread takes: as many loads are in flight. src/transform/cuda/batch.rs cuts tiles alike.
enum : u32 { PLACE_STEPS = 16, CAST_STEPS = 4, COPY_STEPS = 4, FILL_STEPS = 8 };

// A tile of touchdown_place over squares, in elements along each of the last two dimensions.
enum : u32 { SQUARE_SIDE = 64 };
static_assert(SQUARE_SIDE * SQUARE_SIDE == THREADS * PLACE_STEPS, "a square is a tile");

// Elements that touchdown_cast converts at a time.
enum : u32 { CAST_LANES = 8 };

// The micro-tiles of a transposed tile along each side: see touchdown_transpose.
enum : u32 { MICRO_TILES = 16 };
static_assert(MICRO_TILES * MICRO_TILES == THREADS, "a thread has a micro-tile");

// Those of a warp along the source's densest dimension, and the warps of a tile along it.
enum : u32 { WARP_ROWS = 4, WARPS_DOWN = MICRO_TILES / WARP_ROWS };

// Addresses of a unit on both sides.
struct Position {
    u64 source;
    u64 target;
};

// The box that a tile belongs to.
DEVICE u32 box_of(const u64* first_tile, u32 boxes, u64 tile) {
    u32 low = 0;
    u32 high = boxes;
    ROLLED
    while (high - low > 1) {
        const u32 middle = low + (high - low) / 2;
        if (first_tile[middle] <= tile) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// The addresses of unit `index` of the first `rank` dimensions, last dimension fastest; the other coordinates are 0.
template <typename Index>
DEVICE Position unravel(const Descriptor& box, Index index, u32 rank) {
    u64 source = 0;
    u64 target = 0;
    ROLLED
    for (u32 dim = rank; dim > 1; dim--) {
        const Index extent = static_cast<Index>(box.extent[dim - 1]);
        const Index rest = index / extent;
        const u64 at = index - rest * extent;
        source += at * box.source_stride[dim - 1];
        target += at * box.target_stride[dim - 1];
        index = rest;
    }
    if (rank > 0) {
        source += index * box.source_stride[0];
        target += index * box.target_stride[0];
    }
    return {box.source + source * box.source_unit, box.target + target * box.target_unit};
}

DEVICE Position position(const Descriptor& box, u64 index, u32 rank) {
    return box.count >> 32 == 0 ? unravel(box, static_cast<u32>(index), rank) : unravel(box, index, rank);
}

// The `size` bytes at an address, wherever it lies.
DEVICE Raw load(u64 address, u32 size) {
    const u8* bytes = reinterpret_cast<const u8*>(address);
    if ((address & (size - 1)) != 0) {
        Raw raw = {0, 0};
        ROLLED
        for (u32 at = 0; at < size && at < 8; at++) {
            raw.low |= static_cast<u64>(bytes[at]) << (8 * at);
        }
        ROLLED
        for (u32 at = 8; at < size; at++) {
            raw.high |= static_cast<u64>(bytes[at]) << (8 * (at - 8));
        }
        return raw;
    }
    switch (size) {
        case 1: return {*bytes, 0};
        case 2: return {*reinterpret_cast<const u16*>(bytes), 0};
        case 4: return {*reinterpret_cast<const u32*>(bytes), 0};
        case 8: return {*reinterpret_cast<const u64*>(bytes), 0};
        default: {
            const u64* words = reinterpret_cast<const u64*>(bytes);
            return {words[0], words[1]};
        }
    }
}

// Writes the low `size` bytes to an address, wherever it lies.
DEVICE void store(u64 address, u32 size, Raw raw) {
    u8* bytes = reinterpret_cast<u8*>(address);
    if ((address & (size - 1)) != 0) {
        ROLLED
        for (u32 at = 0; at < size && at < 8; at++) {
            bytes[at] = static_cast<u8>(raw.low >> (8 * at));
        }
        ROLLED
        for (u32 at = 8; at < size; at++) {
            bytes[at] = static_cast<u8>(raw.high >> (8 * (at - 8)));
        }
        return;
    }
    switch (size) {
        case 1: *bytes = static_cast<u8>(raw.low); break;
        case 2: *reinterpret_cast<u16*>(bytes) = static_cast<u16>(raw.low); break;
        case 4: *reinterpret_cast<u32*>(bytes) = static_cast<u32>(raw.low); break;
        case 8: *reinterpret_cast<u64*>(bytes) = raw.low; break;
        default: reinterpret_cast<u64*>(bytes)[0] = raw.low; reinterpret_cast<u64*>(bytes)[1] = raw.high; break;
    }
}

// A stored source element to a target element.
DEVICE Raw converted(const Descriptor& box, Raw element, bool* lossy, bool* invalid) {
    element = memory_form(box.from, (box.flags & FLAG_SWAP) != 0, element, invalid);
    return convert(box.from, box.to, (box.flags & FLAG_WRAP) != 0, element, lossy);
}

// Where in a box of squares a thread's element lies. Dimensions `rank - 2` (densest in the source) and `rank - 1` (densest in
// the target) are cut into squares. Of a square a warp takes 8 elements of the former by 4 of the latter at a time: both sides
// use whole 32-byte sectors of 4-byte elements, or share them with the warp's next steps.
DEVICE bool in_square(const Descriptor& box, u64 tile, u32 step, Position* at) {
    const u64 rows = box.extent[box.rank - 2];
    const u64 columns = box.extent[box.rank - 1];
    const u64 squares = (columns + SQUARE_SIDE - 1) / SQUARE_SIDE;
    const u64 bands = (rows + SQUARE_SIDE - 1) / SQUARE_SIDE;
    const u64 column_square = tile % squares;
    const u64 rest = tile / squares;
    const u32 thread = thread_index();
    const u32 patch = step * (THREADS / 32) + thread / 32;  // 8 by 16 patches of 8 by 4 elements
    const u64 row = rest % bands * SQUARE_SIDE + patch % 8 * 8 + thread % 8;
    const u64 column = column_square * SQUARE_SIDE + patch / 8 * 4 + thread % 32 / 8;
    if (row >= rows || column >= columns) {
        return false;
    }
    *at = position(box, rest / bands, box.rank - 2);
    at->source += (row * box.source_stride[box.rank - 2] + column * box.source_stride[box.rank - 1]) * box.source_unit;
    at->target += (row * box.target_stride[box.rank - 2] + column * box.target_stride[box.rank - 1]) * box.target_unit;
    return true;
}

// What a thread has counted of one box, over all tiles of it that its block takes: additions to memory are few, because those of
// a whole device to one counter come one after the other.
struct Count {
    u32 box;
    u32 lossy;
    u32 invalid;
};

// Turns to a box, which is the same for all threads of the block; `boxes`, which is none, ends.
DEVICE void turn_to(Count* count, u32 box, const Descriptor* table, u32 boxes, Tally* tallies) {
    if (count->box == box) {
        return;
    }
    if (count->box != boxes) {
        Tally* tally = &tallies[table[count->box].counter];
        add_up(&tally->lossy, count->lossy);
        add_up(&tally->invalid, count->invalid);
    }
    *count = {box, 0, 0};
}

// Any pair of types, any strides, any alignment. Units are elements; a tile is PLACE_STEPS * THREADS of them in the order of
// the target, or a square of two dimensions.
KERNEL touchdown_place(const Descriptor* table, const u64* first_tile, u32 boxes, Tally* tallies) {
    Count count = {boxes, 0, 0};
    ROLLED
    for (u64 tile = block_index(); tile < first_tile[boxes]; tile += block_count()) {
        const u32 number = box_of(first_tile, boxes, tile);
        const Descriptor& box = table[number];
        const u64 local = tile - first_tile[number];
        turn_to(&count, number, table, boxes, tallies);
        ROLLED
        for (u32 step = 0; step < PLACE_STEPS; step++) {
            Position at;
            if ((box.flags & FLAG_SQUARES) != 0) {
                if (!in_square(box, local, step, &at)) {
                    continue;
                }
            } else {
                const u64 index = (local * PLACE_STEPS + step) * THREADS + thread_index();
                if (index >= box.count) {
                    break;
                }
                at = position(box, index, box.rank);
            }
            bool is_lossy = false;
            bool is_invalid = false;
            store(at.target, box.target_unit, converted(box, load(at.source, box.source_unit), &is_lossy, &is_invalid));
            count.lossy += is_lossy;
            count.invalid += is_invalid;
        }
    }
    turn_to(&count, boxes, table, boxes, tallies);
}

// Bytes of the elements that vectors hold.
template <u32 TYPE>
struct Lanes {
    enum : u32 { SIZE = TYPE == FLOAT32 ? 4 : TYPE == FLOAT8_E4M3FN || TYPE == FLOAT8_E5M2 ? 1 : 2 };
};

// The bits of one lane of a vector, which lies in words of 4 bytes.
DEVICE u32 lane_of(const u32* words, u32 size, u32 lane) {
    return size == 4 ? words[lane] : words[lane * size / 4] >> lane * size * 8 % 32 & (size == 2 ? 0xFFFFu : 0xFFu);
}

template <u32 FROM, u32 TO>
DEVICE u32 cast_vector(Position at) {
    const u32 from_size = Lanes<FROM>::SIZE;
    const u32 to_size = Lanes<TO>::SIZE;
    u32 in[2 * from_size];
    u32 out[2 * to_size] = {};
    u32 lossy = 0;
    if (from_size == 1) {
        const Word8 word = *reinterpret_cast<const Word8*>(at.source);
        in[0] = word.part[0];
        in[1] = word.part[1];
    }
    UNROLLED
    for (u32 word = 0; word + 1 < from_size; word += 2) {
        const Word16 four = reinterpret_cast<const Word16*>(at.source)[word / 2];
        UNROLLED
        for (u32 part = 0; part < 4; part++) {
            in[2 * word + part] = four.part[part];
        }
    }
    UNROLLED
    for (u32 lane = 0; lane < CAST_LANES; lane++) {
        bool is_lossy = false;
        const Value value = decode(FROM, lane_of(in, from_size, lane));
        u32 bits;
        if (from_size == 1 && TO == BFLOAT16) {
            // It has every value of these types: its bits are the upper ones of the f32, a NaN's as encode_bfloat16 has them.
            const u32 single_bits = static_cast<u32>(value.bits);
            bits = (FROM == FLOAT8_E5M2 && is_nan(single_bits) ? single_bits | 0x00200000u : single_bits) >> 16;
        } else {
            bits = static_cast<u32>(encode(TO, value, false, &is_lossy));
        }
        out[lane * to_size / 4] |= bits << lane * to_size * 8 % 32;
        lossy += is_lossy;
    }
    if (to_size == 1) {
        *reinterpret_cast<Word8*>(at.target) = {{out[0], out[1]}};
    }
    UNROLLED
    for (u32 word = 0; word + 1 < to_size; word += 2) {
        const Word16 four = {{out[2 * word], out[2 * word + 1], out[2 * word + 2], out[2 * word + 3]}};
        reinterpret_cast<Word16*>(at.target)[word / 2] = four;
    }
    return lossy;
}

// One of the usual types of one byte to and from float32 or bfloat16.
template <u32 SMALL>
DEVICE u32 cast_small(u32 from, u32 to, Position at) {
    switch (from == SMALL ? to : from << 8) {
        case FLOAT32: return cast_vector<SMALL, FLOAT32>(at);
        case BFLOAT16: return cast_vector<SMALL, BFLOAT16>(at);
        case FLOAT32 << 8: return cast_vector<FLOAT32, SMALL>(at);
        default: return cast_vector<BFLOAT16, SMALL>(at);
    }
}

// Between float32, float16 and bfloat16, and of the usual float8 (e4m3fn, e5m2) to and from float32 and bfloat16, little-endian.
// Units are vectors of CAST_LANES elements, contiguous, and aligned to 16 bytes, those of one byte to 8; a tile is CAST_STEPS *
// THREADS of them.
KERNEL touchdown_cast(const Descriptor* table, const u64* first_tile, u32 boxes, Tally* tallies) {
    Count count = {boxes, 0, 0};
    ROLLED
    for (u64 tile = block_index(); tile < first_tile[boxes]; tile += block_count()) {
        const u32 number = box_of(first_tile, boxes, tile);
        const Descriptor& box = table[number];
        const u64 local = tile - first_tile[number];
        const u32 pair = static_cast<u32>(box.from) << 8 | box.to;
        turn_to(&count, number, table, boxes, tallies);
        const u64 first = local * CAST_STEPS * THREADS + thread_index();
        const u64 units = box.count;
        const u32 source_step = THREADS * box.source_unit;
        const u32 target_step = THREADS * box.target_unit;
        const u32 rank = box.rank;
        Position at = {0, 0};
        ROLLED
        for (u32 step = 0; step < CAST_STEPS; step++) {
            const u64 index = first + step * THREADS;
            if (index >= units) {
                break;
            }
            if (step == 0 || rank > 1) {
                at = position(box, index, rank);
            } else {
                // The vectors of a run are neighbours.
                at.source += source_step;
                at.target += target_step;
            }
            switch (pair) {
                case FLOAT32 << 8 | BFLOAT16: count.lossy += cast_vector<FLOAT32, BFLOAT16>(at); break;
                case BFLOAT16 << 8 | FLOAT32: count.lossy += cast_vector<BFLOAT16, FLOAT32>(at); break;
                case FLOAT32 << 8 | FLOAT16: count.lossy += cast_vector<FLOAT32, FLOAT16>(at); break;
                case FLOAT16 << 8 | FLOAT32: count.lossy += cast_vector<FLOAT16, FLOAT32>(at); break;
                case BFLOAT16 << 8 | FLOAT16: count.lossy += cast_vector<BFLOAT16, FLOAT16>(at); break;
                case FLOAT16 << 8 | BFLOAT16: count.lossy += cast_vector<FLOAT16, BFLOAT16>(at); break;
                default:
                    count.lossy += box.from == FLOAT8_E5M2 || box.to == FLOAT8_E5M2
                                       ? cast_small<FLOAT8_E5M2>(box.from, box.to, at)
                                       : cast_small<FLOAT8_E4M3FN>(box.from, box.to, at);
                    break;
            }
        }
    }
    turn_to(&count, boxes, table, boxes, tallies);
}

template <typename Word>
DEVICE void copy_word(Position at) {
    *reinterpret_cast<Word*>(at.target) = *reinterpret_cast<const Word*>(at.source);
}

// Bytes as they are. Units are words of 1, 2, 4, 8 or 16 bytes (`source_unit`), aligned on both sides: the largest that the
// addresses, strides and the length of a contiguous run allow, whatever the elements are. A tile is COPY_STEPS * THREADS words.
KERNEL touchdown_copy(const Descriptor* table, const u64* first_tile, u32 boxes, Tally*) {
    ROLLED
    for (u64 tile = block_index(); tile < first_tile[boxes]; tile += block_count()) {
        const u32 number = box_of(first_tile, boxes, tile);
        const Descriptor& box = table[number];
        const u64 local = tile - first_tile[number];
        ROLLED
        for (u32 step = 0; step < COPY_STEPS; step++) {
            const u64 index = (local * COPY_STEPS + step) * THREADS + thread_index();
            if (index >= box.count) {
                break;
            }
            const Position at = position(box, index, box.rank);
            switch (box.source_unit) {
                case 1: copy_word<u8>(at); break;
                case 2: copy_word<u16>(at); break;
                case 4: copy_word<u32>(at); break;
                case 8: copy_word<Word8>(at); break;
                default: copy_word<Word16>(at); break;
            }
        }
    }
}

// Turns a square of elements of SIZE bytes in registers: reads words along the source, one for each of as many columns as a word
// has elements, and writes words along the target.
template <u32 SIZE, typename Word>
DEVICE void turn(u64 source, u64 source_step, u64 target, u64 target_step) {
    const u32 side = sizeof(Word) / SIZE;
    const u32 width = SIZE < 4 ? SIZE : 4;  // bytes that are moved at a time
    Word words[side];
    UNROLLED
    for (u32 right = 0; right < side; right++) {
        words[right] = *reinterpret_cast<const Word*>(source + right * source_step);
    }
    UNROLLED
    for (u32 down = 0; down < side; down++) {
        Word word = {};
        UNROLLED
        for (u32 byte = 0; byte < sizeof(Word); byte += width) {
            const u32 from = down * SIZE + byte % SIZE;
            const u32 piece = words[byte / SIZE].part[from / 4] >> from % 4 * 8 & ~0u >> (32 - 8 * width);
            word.part[byte / 4] |= piece << byte % 4 * 8;
        }
        *reinterpret_cast<Word*>(target + down * target_step) = word;
    }
}

// Elements along each side of a micro-tile: words of 16 bytes; of single bytes, which would be as many words, words of 8.
template <u32 SIZE>
struct Micro {
    enum : u32 { SIDE = SIZE == 1 ? 8 : 16 / SIZE };
};

// A thread's part of a transposed tile, for elements of SIZE bytes.
template <u32 SIZE>
DEVICE void transpose_tile(const Descriptor& box, u32 tile) {
    const u32 side = Micro<SIZE>::SIDE;
    const u32 tile_side = MICRO_TILES * side;
    const u64 rows = box.extent[box.rank - 2];
    const u64 columns = box.extent[box.rank - 1];
    const u32 tiles = static_cast<u32>((columns + tile_side - 1) / tile_side);
    const u32 bands = static_cast<u32>((rows + tile_side - 1) / tile_side);
    const u32 rest = tile / tiles;
    const u32 outer = rest / bands;
    const u32 thread = thread_index();
    const u32 micro_row = thread % WARP_ROWS + thread / 32 % WARPS_DOWN * WARP_ROWS;
    const u32 micro_column = thread % 32 / WARP_ROWS + thread / 32 / WARPS_DOWN * (32 / WARP_ROWS);
    const u64 row = static_cast<u64>(rest - outer * bands) * tile_side + micro_row * side;
    const u64 column = static_cast<u64>(tile - rest * tiles) * tile_side + micro_column * side;
    if (row >= rows || column >= columns) {
        return;
    }
    const u64 source_step = box.source_stride[box.rank - 1] * SIZE;  // bytes to the next column
    const u64 target_step = box.target_stride[box.rank - 2] * SIZE;  // bytes to the next row
    Position at = unravel(box, outer, box.rank - 2);
    at.source += row * SIZE + column * source_step;
    at.target += row * target_step + column * SIZE;
    const u64 misaligned = at.source | at.target | source_step | target_step;
    const bool whole = row + side <= rows && column + side <= columns;
    if (SIZE > 1 && whole && misaligned % 16 == 0) {
        turn<SIZE, Word16>(at.source, source_step, at.target, target_step);
    } else if (SIZE < 8 && whole && misaligned % 8 == 0) {
        const u32 half = 8 / SIZE;
        ROLLED
        for (u32 down = 0; down < side; down += half) {
            ROLLED
            for (u32 right = 0; right < side; right += half) {
                turn<SIZE, Word8>(at.source + down * SIZE + right * source_step, source_step,
                                  at.target + down * target_step + right * SIZE, target_step);
            }
        }
    } else {
        ROLLED
        for (u64 down = 0; down < side && row + down < rows; down++) {
            ROLLED
            for (u64 right = 0; right < side && column + right < columns; right++) {
                const Raw element = load(at.source + down * SIZE + right * source_step, SIZE);
                store(at.target + down * target_step + right * SIZE, SIZE, element);
            }
        }
    }
}

// Bytes as they are, turned: dimension `rank - 2` is contiguous in the source and `rank - 1` in the target. Units are elements
// of 1 to 8 bytes (larger ones are turned by touchdown_place: they gain nothing here).
//
// A thread turns a *micro-tile* in its registers, in words of 16 bytes, or of 8 where the alignment allows no more; elements go
// by themselves at the edges of the box, and where they are not aligned to words. So no thread needs what another one has
// read, and neighbours use whole sectors of memory together. A tile is MICRO_TILES by MICRO_TILES micro-tiles, and a box has
// less than 2^32 tiles.
KERNEL touchdown_transpose(const Descriptor* table, const u64* first_tile, u32 boxes, Tally*) {
    ROLLED
    for (u64 tile = block_index(); tile < first_tile[boxes]; tile += block_count()) {
        const u32 number = box_of(first_tile, boxes, tile);
        const Descriptor& box = table[number];
        const u32 local = static_cast<u32>(tile - first_tile[number]);
        switch (box.source_unit) {
            case 1: transpose_tile<1>(box, local); break;
            case 2: transpose_tile<2>(box, local); break;
            case 4: transpose_tile<4>(box, local); break;
            default: transpose_tile<8>(box, local); break;
        }
    }
}

// One element, converted, into every place of a box. The element is stored at `source`. Units are words of the target, of one
// element or more: aligned ones hold as many copies as fit 16 bytes. A tile is FILL_STEPS * THREADS words. The first thread of
// a box counts for all of it.
KERNEL touchdown_fill(const Descriptor* table, const u64* first_tile, u32 boxes, Tally* tallies) {
    ROLLED
    for (u64 tile = block_index(); tile < first_tile[boxes]; tile += block_count()) {
        const u32 number = box_of(first_tile, boxes, tile);
        const Descriptor& box = table[number];
        const u64 local = tile - first_tile[number];
        const u32 size = size_of(box.to);
        bool lossy = false;
        bool invalid = false;
        Raw word = converted(box, load(box.source, size_of(box.from)), &lossy, &invalid);
        if (size < 8) {
            word.low &= ~0ull >> (64 - 8 * size);
            for (u32 filled = size; filled < 8; filled *= 2) {
                word.low |= word.low << (8 * filled);
            }
        }
        word.high = size < 16 ? word.low : word.high;
        ROLLED
        for (u32 step = 0; step < FILL_STEPS; step++) {
            const u64 index = (local * FILL_STEPS + step) * THREADS + thread_index();
            if (index >= box.count) {
                break;
            }
            store(position(box, index, box.rank).target, box.target_unit, word);
        }
        if (local == 0 && thread_index() == 0 && (lossy || invalid)) {
            const u64 elements = box.count * (box.target_unit / size);
            add_once(&tallies[box.counter].lossy, lossy ? elements : 0);
            add_once(&tallies[box.counter].invalid, invalid ? elements : 0);
        }
    }
}
