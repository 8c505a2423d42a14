//! One unit of a plan for `verify`: read, checked, decoded, and forgotten.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::land::{inner_chunk, usize_of};
use crate::decode::{self, Decoder};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::io::{OpenFile, Ring, Root, read_error};
use crate::limits::ZSTD_WINDOW_LOG_MAX;
use crate::plan::{Plan, Source, Unit, UnitArray};

/// Reads a unit in pieces of a slot, checks and decodes it, and keeps nothing.
pub(super) fn check_unit(
    plan: &Plan,
    unit: &Unit,
    file: Option<&OpenFile>,
    root: &Root,
    ring: &Arc<Ring>,
) -> Result<()> {
    let array = &plan.arrays[unit.array as usize];
    let mut slot = ring.slot()?;
    let mut out = ring.slot()?;
    let mut decoder: Option<Box<dyn Decoder>> = None;
    let mut written = 0;
    let mut decode = |stored: &[u8], encoded: u64| -> Result<()> {
        let mut stored = stored;
        let whole = unit.whole && !array.codecs.is_empty();
        if !whole {
            return memory_form(array.dtype, stored, unit.skip);
        }
        let decoder = match &mut decoder {
            Some(decoder) => decoder,
            none => none.insert(decode::decoder(
                &array.codecs,
                encoded,
                unit.decoded_bytes,
                true,
                1 << ZSTD_WINDOW_LOG_MAX,
            )?),
        };
        loop {
            // The decoder may write exactly what is missing, so that the format's trailer is read with no output left.
            let room = usize_of((unit.decoded_bytes - written).min(out.len() as u64))?;
            let step = decoder.step(stored, &mut out[..room])?;
            memory_form(array.dtype, &out[..step.written], written)?;
            written += step.written as u64;
            stored = &stored[step.read..];
            if step.read == 0 && step.written == 0 {
                return Ok(());
            }
        }
    };
    match (&unit.source, file) {
        (Source::Fill(_), _) => return Ok(()),
        (Source::Inline(bytes), _) => {
            let stored = stored_part(unit, array, bytes)?;
            if let Some(stored) = stored {
                decode(stored, stored.len() as u64)?;
            }
        }
        (Source::File { offset, len, .. }, Some(file)) => {
            let mut at = 0;
            // At least once: an empty file is no encoding of anything, which only the decoder can say.
            loop {
                let part = usize_of((*len - at).min(slot.len() as u64))?;
                let from = offset + at;
                file.file()
                    .read_exact_at(&mut slot[..part], from)
                    .map_err(|error| read_error(error, &root.shown(file.path()), from, part as u64, file.size()))?;
                // A shard that carries its own index fits one slot, by the plan.
                let stored = stored_part(unit, array, &slot[..part])?;
                if let Some(stored) = stored {
                    decode(stored, if unit.indexed { stored.len() as u64 } else { *len })?;
                }
                at += part as u64;
                if at >= *len {
                    break;
                }
            }
        }
        (Source::File { .. }, None) => return Err(Error::bug("a unit has no file")),
    }
    match decoder {
        Some(mut decoder) => Ok(decoder.finish()?),
        None => Ok(()),
    }
}

/// The encoded bytes of a unit within its value; `None` if the value says that they are not stored.
fn stored_part<'v>(unit: &Unit, array: &UnitArray, value: &'v [u8]) -> Result<Option<&'v [u8]>> {
    match (unit.indexed, array.single) {
        (true, Some(single)) => match inner_chunk(value, single)? {
            None if array.every_chunk_stored => {
                Err(Error::not_found("a shard is empty, although the checkpoint says that every chunk is stored"))
            }
            inner => Ok(inner.and_then(|inner| value.get(inner))),
        },
        _ => Ok(Some(value)),
    }
}

/// Checks elements whose bytes are restricted: bools. `at` is the position of the bytes within the unit.
fn memory_form(dtype: DType, bytes: &[u8], at: u64) -> Result<()> {
    if dtype != DType::Bool {
        return Ok(());
    }
    match bytes.iter().position(|byte| *byte > 1) {
        None => Ok(()),
        Some(index) => {
            Err(Error::corrupt("a bool is neither 0 nor 1").at("byte", at + index as u64).found(bytes[index]))
        }
    }
}
