//! Host memory as a destination, and typed views of it.

use super::{Destination, Memory, ShardSpec};
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Buffer;
use crate::limits::{HOST_SLAB_BYTES, HOST_SLAB_SHARD_BYTES_MAX};

// Elements are stored little-endian and handed out as native values.
const _: () = assert!(cfg!(target_endian = "little"), "touchdown runs on little-endian machines");

/// Allocates page-aligned, zeroed host memory for every shard. Small shards share pieces, each of which is given back when the last
/// of its shards is dropped.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostDestination;

impl Destination for HostDestination {
    fn prepare(&mut self, shards: &[ShardSpec]) -> Result<Vec<Memory>> {
        let mut memory = Vec::with_capacity(shards.len());
        let mut small: Vec<usize> = Vec::new();
        let mut small_bytes = 0;
        for shard in shards {
            if !shard.device.is_host() {
                return Err(Error::new(ErrorKind::Device, "this destination lands shards in host memory only")
                    .at("leaf", &shard.path)
                    .found(shard.device)
                    .hint("use CPU devices (`--devices cpu:N`)"));
            }
            let at = |error: Error| error.at("leaf", &shard.path);
            let len = usize::try_from(shard.bytes)
                .map_err(|_| at(Error::new(ErrorKind::OutOfMemory, "a shard is larger than the address space")))?;
            // In the order of shards: what was put off comes before what is not.
            if len >= HOST_SLAB_SHARD_BYTES_MAX || small_bytes + len > HOST_SLAB_BYTES {
                memory.extend(Buffer::zeroed_parts(&std::mem::take(&mut small)).map_err(at)?);
                small_bytes = 0;
            }
            if len >= HOST_SLAB_SHARD_BYTES_MAX {
                memory.push(Buffer::zeroed(len).map_err(at)?);
            } else {
                small.push(len);
                small_bytes += len;
            }
        }
        memory.extend(Buffer::zeroed_parts(&small)?);
        Ok(memory.into_iter().map(Memory::Host).collect())
    }
}

/// A Rust type that has the memory form of one or more element types.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// The element type that this type is by itself.
    const DTYPE: DType;

    /// Whether elements of this type can be seen as `Self`.
    fn holds(dtype: DType) -> bool;
}

macro_rules! element {
    ($($rust:ty => $own:ident $(| $dtype:ident)*;)+) => {$(
        impl Element for $rust {
            const DTYPE: DType = DType::$own;

            fn holds(dtype: DType) -> bool {
                matches!(dtype, DType::$own $(| DType::$dtype)*)
            }
        }
    )+};
}

element! {
    u8 => UInt8 | Bool | UInt2 | UInt4 | Float4E2M1FN | Float6E2M3FN | Float6E3M2FN | Float8E3M4 | Float8E4M3 | Float8E4M3FN
        | Float8E4M3FNUZ | Float8E4M3B11FNUZ | Float8E5M2 | Float8E5M2FNUZ | Float8E8M0FNU;
    i8 => Int8 | Int4 | Int2;
    u16 => UInt16;
    i16 => Int16;
    u32 => UInt32;
    i32 => Int32;
    u64 => UInt64;
    i64 => Int64;
    half::f16 => Float16;
    half::bf16 => BFloat16;
    f32 => Float32;
    f64 => Float64;
    [f32; 2] => Complex64;
    [f64; 2] => Complex128;
}
