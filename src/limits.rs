//! Every bound of the library, by name, with its reason.
//!
//! A bound belongs here when it limits what a file, a caller or a machine can make the library do:
//! memory, recursion, counts, sizes. The defaults of tunable options stand here too.

/// Most dimensions an array may have. TensorStore, the reference reader, stops at 32.
pub const RANK_MAX: usize = 32;

/// Most dimensions of an array in zarr v3 that is saved: TensorStore gives the index of a shard one more, and stops at 32.
pub const SHARDED_RANK_MAX: usize = RANK_MAX - 1;

/// Most dimensions of a box that a kernel copies, after simplification. A view adds at most a few to the dimensions of its
/// array, and neighbours that lie on end are one; `kernels/descriptor.cuh` has the same number.
pub const KERNEL_RANK_MAX: usize = 8;

/// Longest path of a file inside a checkpoint, in bytes: Linux's `PATH_MAX`.
pub const PATH_BYTES_MAX: usize = 4096;

/// Most elements of a key path (nesting depth of a tree).
pub const KEY_PATH_DEPTH_MAX: usize = 256;

/// Most leaves of one tree. Real checkpoints reach 10^5.
pub const LEAVES_MAX: usize = 1 << 19;

/// Largest metadata file that is read whole (`_METADATA`, `_sharding`, `_strings.json`, manifests, indexes).
/// 100,000 leaves need about 30 MB of `_METADATA`.
pub const METADATA_FILE_BYTES_MAX: u64 = 1 << 30;

/// Largest legacy msgpack file `checkpoint`: it may hold whole arrays.
pub const MSGPACK_FILE_BYTES_MAX: u64 = 16 << 30;

/// Most values in one legacy msgpack file. A value takes at least one byte there and about 64 bytes decoded.
pub const MSGPACK_NODES_MAX: usize = 1 << 20;

/// Most directories listed to find out what a directory is. Step roots have thousands of steps; a home directory or a
/// bare item of very old releases has more children than need be looked at.
pub const PROBED_DIRS_MAX: usize = 65_536;

/// Deepest nesting of a msgpack or JSON document. Bounds recursion in the parsers (1 KiB of stack a level).
pub const NESTING_MAX: usize = 256;

/// Deepest nesting of a JSON document that is written: what `serde_json` reads again.
pub const JSON_DEPTH_MAX: usize = 127;

/// Longest parameter name that is saved in a database. Its keys add the position of a chunk, 20 digits and a separator for
/// each of 32 dimensions, to it.
pub const PARAM_NAME_BYTES_MAX: usize = 64_000;

/// Longest name of one file or directory: Linux's `NAME_MAX`.
pub const FILE_NAME_BYTES_MAX: usize = 255;

/// Largest encoded OCDBT manifest or node. Orbax asks for nodes of at most 10^8 decoded bytes.
pub const OCDBT_NODE_ENCODED_MAX: u64 = 256 << 20;

/// Largest decoded OCDBT manifest or node body: what Orbax asks for, with room.
pub const OCDBT_NODE_DECODED_MAX: u64 = 256 << 20;

/// Deepest B+tree. With two entries a node, 2^40 keys need 40 levels.
pub const OCDBT_HEIGHT_MAX: u8 = 64;

/// Longest key and longest path in an OCDBT database (the format's own limits).
pub const OCDBT_KEY_BYTES_MAX: u64 = 65_535;

/// Most entries of one node (the format's own limit).
pub const OCDBT_NODE_ENTRIES_MAX: u64 = 1 << 20;

/// Longest inline value (the format's own limit).
pub const OCDBT_INLINE_BYTES_MAX: u64 = 1 << 20;

/// Decoded size at which a written node is split. TensorStore's default: small enough to be read in one go, and most
/// checkpoints (up to about 75,000 chunks) still are a single node.
pub const OCDBT_NODE_BYTES_DEFAULT: u32 = 8 << 20;

/// Longest value that a written database should hold inline: what Orbax asks for; `zarr.json` is shorter.
pub const OCDBT_INLINE_BYTES_DEFAULT: u32 = 1024;

/// Most keys of one database. 100,000 leaves over 64 devices make 6.4 million.
pub const OCDBT_KEYS_MAX: usize = 64_000_000;

/// Most nodes read in one scan: bounds a tree whose references meet again and again.
pub const OCDBT_NODES_MAX: usize = 4_000_000;

/// Most bytes that the nodes of one scan may have, as stored and as decoded, together. 64 million keys of 100 bytes fit.
pub const OCDBT_TREE_BYTES_MAX: u64 = 8 << 30;

/// Of that, what is allowed for each byte that the nodes really have: it bounds what a few compressed or repeated nodes can be
/// blown up to.
pub const OCDBT_TREE_GROWTH_MAX: u64 = 64;

/// And what is allowed without any.
pub const OCDBT_TREE_BYTES_FREE: u64 = 64 << 20;

/// Largest `zarr.json` or `.zarray`.
pub const ZARR_JSON_BYTES_MAX: u64 = 1 << 20;

/// Most chunks (and inner chunks) that one array may have within the wanted region.
pub const CHUNKS_MAX: u64 = 1 << 26;

/// Most inner chunks of one zarr shard: bounds its index to 1 GiB.
pub const INNER_CHUNKS_MAX: u64 = 1 << 26;

/// Deepest nesting of zarr shards inside shards. Real arrays have one level.
pub const SHARDING_DEPTH_MAX: usize = 4;

/// Most codecs of one chain. Real chains have one to three.
pub const CODEC_CHAIN_MAX: usize = 16;

/// Lowest (fastest) level of zstd, libzstd's own limit.
pub const ZSTD_LEVEL_MIN: i32 = -131_072;

/// Highest level of zstd, libzstd's own limit.
pub const ZSTD_LEVEL_MAX: i32 = 22;

/// Largest window of a zstd frame, as a power of two: 128 MiB, where the reference decoder stops by default.
pub const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// Fewest bytes that the Huffman-coded blocks of a zstd frame decode to, on average, for it to be decoded without libzstd: below
/// it tables and the ends of streams cost what the streams save.
pub const HUFFMAN_BLOCK_BYTES_MIN: usize = 16 << 10;

/// Fewest literals for each sequence of a zstd block, on average, for its frame to be decoded without libzstd: only the literals
/// are decoded faster.
pub const HUFFMAN_LITERALS_PER_SEQUENCE_MIN: usize = 32;

/// From how many decoded bytes on a zstd frame is decoded by several threads: smaller frames are many, so that each thread has
/// one of its own.
pub const HUFFMAN_SHARED_BYTES_MIN: usize = 8 << 20;

/// Most sequences of a zstd frame that is decoded by several threads, which keep all of them, 12 bytes each.
pub const HUFFMAN_SHARED_SEQUENCES_MAX: usize = 1 << 17;

/// Largest zstd window that a load under any budget decodes with: what levels up to 19 ask for.
pub const ZSTD_WINDOW_BYTES_MIN: u64 = 8 << 20;

/// A budget allows zstd windows of this part of itself: 32 MiB of the default 256 MiB, enough for level 20.
pub const WINDOWS_PER_BUDGET: u64 = 8;

/// Largest safetensors header, the reference implementation's own limit.
pub const SAFETENSORS_HEADER_BYTES_MAX: u64 = 100_000_000;

/// Where the data of a new safetensors file begin: a page, also what direct reads and writes ask for.
pub const SAFETENSORS_DATA_ALIGN: u64 = 4096;

/// Default of the bytes of tensors in one of several safetensors files that are written: Hugging Face's own.
pub const TENSOR_FILE_BYTES_DEFAULT: u64 = 5_000_000_000;

/// Most places that are tried to cut an array for a conversion; one that has none among them goes through a scratch file. Grids
/// of source and destination whose common multiple is further away are as good as none.
pub const CUTS_TRIED_MAX: usize = 1 << 16;

/// Most numbers that are tried to divide an extent by when an array is divided into chunks: enough to find all divisors of
/// extents up to 2^40.
pub const DIVISORS_TRIED_MAX: u64 = 1 << 20;

/// Most files of a source whose sizes and times are compared before an interrupted conversion is gone on with.
pub const RESUME_FILES_MAX: usize = 1 << 20;

/// Most bytes by which chunks of a given shape may be larger than their array before they are refused, unless the array is
/// nearly as large: padding is encoded like elements.
pub const CHUNK_PADDING_BYTES_MAX: u64 = 256 << 20;

/// Chunks of a given shape may always hold this many times what their array does: every dimension's last one is padded.
pub const CHUNK_PADDING_FACTOR: u64 = 4;

/// Largest journal of a conversion that is read: about 100 bytes a chunk.
pub const JOURNAL_BYTES_MAX: u64 = 4 << 30;

/// Most files of one sharded safetensors model.
pub const SAFETENSORS_FILES_MAX: usize = 65_536;

/// First read of a safetensors file: holds the length and nearly every header, so that one read a file is enough.
pub const SAFETENSORS_HEAD_BYTES: u64 = 128 << 10;

/// Most entries listed in one directory of a checkpoint.
pub const DIR_ENTRIES_MAX: usize = 4_000_000;

/// Most devices of one mesh.
pub const DEVICES_MAX: u64 = 1 << 20;

/// Largest array, in bytes of its target dtype: offsets must stay within `i64`.
pub const ARRAY_BYTES_MAX: u64 = 1 << 60;

/// Most chunks, inner chunks and ranges of a plan that no budget counts: those of `verify`, `seal` and conversions. Each takes up to
/// 1,300 bytes.
pub const UNCOUNTED_UNITS_MAX: u64 = 1 << 21;

/// Default of the staging memory beyond the results of a load, in bytes.
pub const STAGING_BYTES_DEFAULT: u64 = 256 << 20;

/// Size of one staging slot: a read, a slab of decoded bytes. 4 MiB is where reads and copies reach full speed; the rest is for
/// a checksum, an index or what incompressible bytes grow by, so that an inner chunk of 4 MiB is one read.
pub const SLOT_BYTES: usize = (4 << 20) + (64 << 10);

/// Fewest staging slots with which a load runs: one being read, one being decoded from, one decoded into.
pub const SLOTS_MIN: usize = 3;

/// Default gap under which two neighbouring reads are merged: about latency times bandwidth of a local disk
/// (100 us x 7 GB/s = 0.7 MB).
pub const MERGE_GAP_BYTES_DEFAULT: u64 = 512 << 10;

/// Most separate byte ranges that one chunk's partial read may be cut into before the gap is widened.
pub const RANGES_PER_CHUNK_MAX: u64 = 1 << 16;

/// Threads that issue positioned reads, at least: four saturate a local disk. By default there are half as many as workers: a
/// thread copies 6 GB/s out of the page cache, so that a machine of many cores needs as many for one GPU's bus.
pub const READER_THREADS_MIN: usize = 4;

/// Room in a slot beside its bytes, in bytes: a direct read takes the whole blocks at both ends.
pub const SLOT_SLACK_BYTES: u64 = 2 * ALIGN_BYTES;

/// Smaller files are read through the page cache: asking where they are would cost more than it gives.
pub const DIRECT_FILE_BYTES_MIN: u64 = 1 << 20;

/// Slots that a ring's kernel side knows at most: what is locked for it is not locked again for every read.
pub const URING_BUFFERS_MAX: u32 = 512;

/// Files that a ring's kernel side knows at once.
pub const URING_FILES_MAX: u32 = 64;

/// Reads that io_uring has in flight at most. 16 to 32 reads of 1 to 4 MiB fill a local disk's queue.
pub const URING_DEPTH: usize = 32;

/// Most bytes of one io_uring request; the rest of a longer read follows. The length is 32 bits wide there, and the kernel
/// reads at most 2 GiB less a page at once.
pub const URING_REQUEST_BYTES_MAX: usize = 1 << 30;

/// How often a read that the kernel has no resources for (`EAGAIN`) is tried again before that is its result.
pub const URING_AGAIN_MAX: u32 = 64;

/// How many nearest names an error lists.
pub const NEAREST_NAMES_MAX: usize = 3;

/// How many lines of one kind an error lists before it counts the rest.
pub const ERROR_LINES_MAX: usize = 50;

/// Largest `metrics` file of a step.
pub const METRICS_BYTES_MAX: u64 = 16 << 20;

/// Most virtual devices that one argument may ask for.
pub const CPU_DEVICES_MAX: u32 = 65_536;

/// Most workers that one may ask for.
pub const WORKERS_MAX: usize = 4096;

/// Most rows without elements that are printed.
pub const CAT_EMPTY_ROWS_MAX: u64 = 1 << 20;

/// Kinds of arrays drawn; a picture of more is no longer looked at.
pub const SVG_ARRAYS_MAX: usize = 200;

/// Devices drawn in a mesh.
pub const SVG_DEVICES_MAX: usize = 1024;

/// Holders shown in one part.
pub const SVG_STRIPES_MAX: usize = 16;

/// When a read that has not come back is reported: longer than any disk takes that still works.
pub const STALL_AFTER_DEFAULT: std::time::Duration = std::time::Duration::from_secs(60);

/// Most rounds of a benchmark.
pub const BENCH_ROUNDS_MAX: usize = 1000;
/// Default bound of the memory of each device that slabs are staged in, in bytes; with the default of host staging it is a slot
/// for each worker.
pub const DEVICE_STAGING_BYTES_DEFAULT: u64 = 128 << 20;

/// Most boxes of one launch: bounds the tables that every worker keeps for each device to a few hundred KiB.
pub const LAUNCH_BOXES_MAX: usize = 1024;

/// Memory of a device that each worker takes beside its slab, in bytes: the tables of launches, and room to align the slab.
pub const LANE_EXTRA_BYTES: usize = 264 << 10;

/// What memory of a shard takes of a device is a multiple of this, in bytes: the driver's own alignment.
pub const DEVICE_ALIGN: u64 = 256;

/// Locked memory in which a worker packs boxes for a device, in bytes: a few copies that are worth a copy each.
pub const PACK_BYTES: usize = 256 << 10;

/// Locked memory through which a thread copies results back to the host, in bytes: enough that the call does not count.
pub const DOWNLOAD_BYTES: usize = 1 << 20;

/// Copies below this size cost their call, not their bytes: several of them are staged together and placed by one launch.
pub const GATHER_COPY_BYTES: u64 = 64 << 10;

/// Fewer small copies than this stay copies.
pub const GATHER_COPIES_MIN: usize = 4;

/// Size of the pieces of host memory that small shards share, in bytes: many large pages.
pub const HOST_SLAB_BYTES: usize = 64 << 20;

/// Larger shards have memory of their own, in bytes: it is large pages by itself.
pub const HOST_SLAB_SHARD_BYTES_MAX: usize = 4 << 20;

/// Size of the pieces in which memory of a device is taken for small shards, in bytes.
pub const DEVICE_SLAB_BYTES: u64 = 64 << 20;

/// Larger shards get memory of their own, in bytes: it is given back when they are dropped.
pub const DEVICE_SLAB_SHARD_BYTES_MAX: u64 = 16 << 20;

/// Tasks queued for each worker before the driver waits: enough that none runs dry.
pub const TASKS_PER_WORKER: usize = 8;

/// Units larger than a slot are read as a whole if the budget holds as many of them, or one for each worker.
pub const WHOLE_UNITS_MIN: u64 = 4;

/// Files kept open at once by a load.
pub const LOAD_OPEN_FILES_MAX: usize = 16;

/// Most threads: with the files of each they stay far below the usual limits on open files (256 and more) whatever the
/// machine's number of cores.
pub const METADATA_THREADS_MAX: usize = 8;

/// Files one thread keeps open.
pub const METADATA_OPEN_FILES_MAX: usize = 8;

/// Size of the inner chunks into which a saver divides large chunks, in bytes: enough for one request to cost nothing, small
/// enough that every core has several and that one fits a staging slot.
pub const INNER_CHUNK_BYTES: u64 = 4 << 20;

/// Smallest inner chunk that a saver makes of a larger chunk, in bytes: below it the index and the requests cost more than
/// the parallelism gives.
pub const CHUNK_PIECE_BYTES_MIN: u64 = 1 << 20;

/// Files that a save has open at once at most, far below the usual limits on open files.
pub const SAVE_OPEN_FILES_MAX: usize = 64;

/// Values up to this size stand in the nodes of a saved database, as Orbax configures it, in bytes.
pub const SAVE_INLINE_BYTES_MAX: u64 = 1024;

/// Larger values and inner chunks start at multiples of [`ALIGN_BYTES`] in saved data files, so that they can be read directly
/// and copied by devices; below it, the gaps would cost more than they give. In bytes.
pub const ALIGNED_VALUE_BYTES_MIN: u64 = 256 << 10;

/// What direct reads ask of offsets, in bytes.
pub const ALIGN_BYTES: u64 = 4096;

/// Default size at which a saved data file is full and the next value starts a new one, in bytes: Orbax's own.
pub const DATA_FILE_BYTES_DEFAULT: u64 = 2 << 30;

/// Most chunks of an array that are looked up one by one. Of arrays of more, those which exist are listed, so that time and
/// memory follow from what is stored and not from what a shape claims.
pub const CHUNKS_LOOKED_UP_MAX: u64 = 64;

/// Most digits of a step's number in the name of its directory: those of 2^64.
pub const STEP_DIGITS_MAX: usize = 20;

/// Longest prefix of a step's name: with the number, and what a temporary name adds, it stays a file's name.
pub const STEP_PREFIX_BYTES_MAX: usize = 150;

/// How much of a lock's file is read to say who holds it.
pub const LOCK_FILE_BYTES_MAX: u64 = 256;

/// How often a step is looked at or loaded again because another process removed or replaced it meanwhile.
pub const STEP_GONE_RETRIES_MAX: usize = 8;

/// How often a checkpoint is opened that is replaced by another process every time before it has been read.
pub const REPLACED_TRIES_MAX: usize = 8;

/// How often a watched root is looked at by default, in milliseconds: nobody waits longer for a step that took minutes to train.
pub const WATCH_INTERVAL_MS_DEFAULT: u64 = 1000;
