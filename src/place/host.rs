//! Host memory as a destination, and typed views of it.

use super::{Destination, Memory, ShardSpec};
use crate::dtype::DType;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Buffer;

// Elements are stored little-endian and handed out as native values.
const _: () = assert!(cfg!(target_endian = "little"), "touchdown runs on little-endian machines");

/// Allocates page-aligned, zeroed host memory for every shard.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostDestination;

impl Destination for HostDestination {
    fn prepare(&mut self, shards: &[ShardSpec]) -> Result<Vec<Memory>> {
        let allocate = |shard: &ShardSpec| {
            if !shard.device.is_host() {
                return Err(Error::new(ErrorKind::Device, "this destination lands shards in host memory only")
                    .at("leaf", &shard.path)
                    .found(shard.device)
                    .hint("use CPU devices (`--devices cpu:N`)"));
            }
            let len = usize::try_from(shard.bytes)
                .map_err(|_| Error::new(ErrorKind::OutOfMemory, "a shard is larger than the address space"))?;
            Buffer::zeroed(len).map(Memory::Host).map_err(|error| error.at("leaf", &shard.path))
        };
        shards.iter().map(allocate).collect()
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
