//! Every binary of this package: the target of its name. Bodies and corpus: `src/fuzzing.rs`, `fuzz/corpus`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| touchdown::fuzzing::run(env!("CARGO_BIN_NAME"), data));
