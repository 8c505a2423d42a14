//! A flag that SIGTERM sets, for who asks for it. The library installs no handler by itself.

use std::sync::{Arc, atomic::AtomicBool};

use crate::error::{Error, ErrorKind, Result};

/// Has SIGTERM set a flag from now on, for [`SavePolicy::OnSignal`](super::SavePolicy::OnSignal) and for the loop to end by:
/// save, then finish. A second SIGTERM ends the process at once, as the first one does by default.
///
/// # Errors
/// A system that lets no handler be installed.
pub fn flag_on_sigterm() -> Result<Arc<AtomicBool>> {
    use signal_hook::consts::SIGTERM;
    let flag = Arc::new(AtomicBool::new(false));
    // In this order: the first signal finds the flag unset, and sets it.
    signal_hook::flag::register_conditional_shutdown(SIGTERM, 143, Arc::clone(&flag))
        .and_then(|_| signal_hook::flag::register(SIGTERM, Arc::clone(&flag)))
        .map_err(|error| Error::new(ErrorKind::Io, "cannot handle SIGTERM").caused_by(error))?;
    Ok(flag)
}
