//! The command-line program; everything is in `touchdown::cli`.

fn main() -> std::process::ExitCode {
    touchdown::cli::main()
}
