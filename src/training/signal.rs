//! A flag that SIGTERM sets, for who asks for it. The library installs no handler by itself.

use std::sync::{Arc, atomic::AtomicBool};

use crate::error::{Error, ErrorKind, Result};

/// Has SIGTERM set a flag from now on, for [`SavePolicy::OnSignal`](super::SavePolicy::OnSignal) and for the loop to end by:
/// save, then finish. Further ones change nothing: `timeout` and schedulers send several, and the save must not be lost to them.
///
/// # Errors
/// A system that lets no handler be installed.
pub fn flag_on_sigterm() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGTERM, Arc::clone(&flag))
        .map_err(|error| Error::new(ErrorKind::Io, "cannot handle SIGTERM").caused_by(error))?;
    Ok(flag)
}
