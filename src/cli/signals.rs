//! SIGINT and SIGTERM: a verb that only reads ends at once; one that writes is told, and cleans up first.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

use crate::error::{Error, ErrorKind, Result};

/// What has been heard.
pub(super) struct Signals {
    /// Whether the next signal ends the program.
    at_once: Arc<AtomicBool>,
    /// The exit code of the last signal; 0 before there was one.
    code: Arc<AtomicUsize>,
}

impl Signals {
    /// From now on SIGINT ends the program with 130, SIGTERM with 143.
    ///
    /// # Errors
    /// The system takes no handlers.
    pub(super) fn install() -> Result<Self> {
        let signals = Self { at_once: Arc::new(AtomicBool::new(true)), code: Arc::default() };
        let no_handlers = |error| Error::new(ErrorKind::Io, "cannot handle signals").caused_by(error);
        // With a handler, of whatever kind, a file that grows beyond the limit is an error of the write.
        flag::register(SIGXFSZ, Arc::default()).map_err(no_handlers)?;
        // Handlers run in this order, so the signal that finds the program holding on makes the next one end it.
        for (signal, code) in [(SIGINT, 130), (SIGTERM, 143)] {
            flag::register_conditional_shutdown(signal, code, Arc::clone(&signals.at_once))
                .and_then(|_| flag::register(signal, Arc::clone(&signals.at_once)))
                .and_then(|_| flag::register_usize(signal, Arc::clone(&signals.code), code as usize))
                .map_err(no_handlers)?;
        }
        Ok(signals)
    }

    /// From now on the first signal is only noted, for [`exit_code`](Self::exit_code) and by the flag; a second one ends the
    /// program.
    pub(super) fn hold(&self) -> Arc<AtomicBool> {
        self.at_once.store(false, Ordering::SeqCst);
        Arc::clone(&self.at_once)
    }

    /// The exit code of the signal that came, if one did.
    pub(super) fn exit_code(&self) -> Option<u8> {
        u8::try_from(self.code.load(Ordering::SeqCst)).ok().filter(|code| *code != 0)
    }
}
