//! What the kernel means, in safe code that does one stream after the other.

use super::checksum::{self, STRIPE, stripe};
use super::lanes::{BLOCK_STREAMS, Positions, Rows, STREAMS, SYMBOLS_PER_REFILL, Tables, bits_at};

/// See `Kernel::run`.
pub(super) fn run(both: bool, frame: &[u8], tables: &Tables, positions: &mut Positions, staging: &[Rows]) -> usize {
    let active = if both { STREAMS } else { BLOCK_STREAMS };
    for (iteration, rows) in staging.iter().enumerate() {
        // All or nothing of an iteration.
        if positions[..active].iter().any(|position| bits_at(frame, *position).is_none() || position / 8 < 15) {
            return iteration;
        }
        for (stream, position) in positions[..active].iter_mut().enumerate() {
            for row in 0..SYMBOLS_PER_REFILL {
                let bits = bits_at(frame, *position).unwrap_or_default();
                let (symbol, used) = tables[stream / BLOCK_STREAMS].symbol(bits);
                rows[row * STREAMS + stream].set(symbol);
                *position -= used;
            }
        }
    }
    staging.len()
}

/// See `Kernel::transpose`.
pub(super) fn transpose(
    staging: &[Rows],
    columns: [&mut [u8]; STREAMS],
    content: &[[u8; STRIPE]],
    hash: &mut checksum::Lanes,
) {
    content.iter().for_each(|bytes| stripe(hash, bytes));
    for (stream, column) in columns.into_iter().enumerate() {
        let symbols = staging.as_flattened().iter().skip(stream).step_by(STREAMS);
        column.iter_mut().zip(symbols).for_each(|(byte, symbol)| *byte = symbol.get());
    }
}
