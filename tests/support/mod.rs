//! What the integration tests share: the real Orbax as a judge, the binary under test, and the
//! comparison of what the two say.
//!
//! Orbax lives in a virtual environment below `target/`, made once per set of pins
//! (`tests/requirements.txt`). Where Python or the network is missing, `TOUCHDOWN_SKIP_ORBAX=1` skips
//! the tests that need it; without the variable they fail, so that a judge is never missing silently.

#![allow(dead_code, unreachable_pub, reason = "every test binary uses its own part of this module")]

pub mod ask;
pub mod dump;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// No single call of the binary on test-sized data comes near this; a hang must end the test.
const TOUCHDOWN_TIMEOUT: Duration = Duration::from_secs(120);
const SKIP_VARIABLE: &str = "TOUCHDOWN_SKIP_ORBAX";
/// Skips what needs a compiler for the kernels, for the host or for devices.
pub const SKIP_KERNELS_VARIABLE: &str = "TOUCHDOWN_SKIP_KERNELS";

/// A folder to which the test binaries were packed with what they need (`benches/gpu.py`), for a machine without the sources.
const PACK_VARIABLE: &str = "TOUCHDOWN_TEST_PACK";
/// A Python that has Orbax, for a machine that cannot install it.
const PYTHON_VARIABLE: &str = "TOUCHDOWN_TEST_PYTHON";

/// That folder, if the tests run from one: `tests/` as in the sources, `bin/` and `lib/` with what was built.
pub fn pack() -> Option<PathBuf> {
    std::env::var_os(PACK_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// Where tests write.
fn temporary() -> PathBuf {
    pack().map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), |pack| pack.join("tmp"))
}

/// Prints a skip and how many there were in this test binary, past the test harness, which swallows what tests print.
pub fn skipped(test: &str, why: &str) {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed) + 1;
    // Where stderr is closed there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "skipped ({count} in this binary): {test} ({why})");
}

/// The Python that has the pinned Orbax, or `None` (and a printed line) if the caller is to be skipped.
///
/// # Panics
/// If it cannot be installed: the message names the reason and the variable that skips.
pub fn python(test: &str) -> Option<PathBuf> {
    if is_set(SKIP_VARIABLE) {
        skipped(test, &format!("{SKIP_VARIABLE} is set"));
        return None;
    }
    if let Some(named) = std::env::var_os(PYTHON_VARIABLE) {
        return Some(PathBuf::from(named));
    }
    match environment("orbax", "tests/requirements.txt") {
        Ok(python) => Some(python),
        Err(reason) => panic!("{test}: no Orbax to ask: {reason}; {SKIP_VARIABLE}=1 skips the tests that need it"),
    }
}

/// A Python with NVIDIA's runtime compiler (`tests/kernels/requirements.txt`), or `None` (and a printed line) if the caller is
/// to be skipped.
///
/// # Panics
/// As [`python`], with its own variable.
pub fn compiler_python(test: &str) -> Option<PathBuf> {
    if is_set(SKIP_KERNELS_VARIABLE) {
        skipped(test, &format!("{SKIP_KERNELS_VARIABLE} is set"));
        return None;
    }
    match environment("nvrtc", "tests/kernels/requirements.txt") {
        Ok(python) => Some(python),
        Err(reason) => {
            panic!("{test}: no NVRTC: {reason}; {SKIP_KERNELS_VARIABLE}=1 skips the tests that need a compiler")
        }
    }
}

/// The kernels as a library of the host, compiled anew.
///
/// # Errors
/// No C++ compiler.
///
/// # Panics
/// If the sources do not compile.
pub fn kernels_of_the_host() -> Result<PathBuf, String> {
    if let Some(pack) = pack() {
        return Ok(pack.join("lib/kernels.so"));
    }
    let library = scratch("kernels").join("kernels.so");
    let named = std::env::var_os("CXX").into_iter();
    let compilers: Vec<OsString> = named.chain(["c++", "g++", "clang++"].map(OsString::from)).collect();
    for compiler in &compilers {
        let run = Command::new(compiler)
            // Elements of many types are read from one buffer, which strict aliasing forbids and devices do not know.
            .args(["-std=c++14", "-O2", "-Wall", "-Wextra", "-Werror", "-fno-strict-aliasing", "-fPIC", "-shared"])
            .arg("-I")
            .arg(repository().join("kernels"))
            .arg(repository().join("tests/kernels/shim.cpp"))
            .arg("-o")
            .arg(&library)
            .output();
        let Ok(output) = run else { continue };
        assert!(output.status.success(), "{compiler:?}:\n{}", String::from_utf8_lossy(&output.stderr));
        return Ok(library);
    }
    Err(format!("none of the C++ compilers {compilers:?} was found"))
}

/// Whether a variable is set to something other than nothing and 0.
pub fn is_set(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| !value.is_empty() && value != "0")
}

/// Runs `tests/orbax/<script>` and returns what it printed.
///
/// # Panics
/// If it fails, with the end of its stderr.
pub fn run_python<A: AsRef<OsStr>>(python: &Path, script: &str, args: impl IntoIterator<Item = A>) -> String {
    let script = repository().join("tests/orbax").join(script);
    let output = Command::new(python)
        .arg(&script)
        .args(args)
        .env("PYTHONDONTWRITEBYTECODE", "1") // the script's folder is part of the source tree
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}", python.display()));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} ended with {}:\n{}", script.display(), output.status, tail(&stderr, 30));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What a run of the binary left behind. `code` is `None` if a signal or the timeout ended it.
#[derive(Debug)]
pub struct Output {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// The first `error:` line of stderr, or all of it.
    pub fn error(&self) -> &str {
        self.stderr.lines().find(|line| line.starts_with("error:")).unwrap_or(self.stderr.trim_end())
    }
}

/// The binary under test, with these arguments.
pub fn program<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Command {
    let built = || PathBuf::from(env!("CARGO_BIN_EXE_touchdown"));
    let mut command = Command::new(pack().map_or_else(built, |pack| pack.join("bin/touchdown")));
    command.args(args);
    command
}

/// Runs the binary under test. Output goes through files, so that a full pipe cannot block it.
pub fn touchdown<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Output {
    finish(program(args), TOUCHDOWN_TIMEOUT)
}

/// Runs a command to its end, or kills it after this time.
pub fn finish(mut command: Command, timeout: Duration) -> Output {
    let folder = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| folder.path().join(name);
    let file = |name: &str| File::create(path(name)).expect("a file in the temporary directory");
    let mut child =
        command.stdin(Stdio::null()).stdout(file("stdout")).stderr(file("stderr")).spawn().expect("the binary starts");
    let start = Instant::now();
    let mut pause = Duration::from_micros(200);
    let code = loop {
        if let Some(status) = child.try_wait().expect("the child can be waited for") {
            break status.code();
        }
        if start.elapsed() > timeout {
            child.kill().expect("the child can be killed");
            child.wait().expect("a killed child ends");
            break None;
        }
        sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    };
    let text = |name: &str| String::from_utf8_lossy(&fs::read(path(name)).expect("the output file")).into_owned();
    Output { code, stdout: text("stdout"), stderr: text("stderr") }
}

/// A fresh, empty directory below `target/tmp`, named after the test so that a failure can be looked at.
pub fn scratch(test: &str) -> PathBuf {
    let folder = temporary().join(format!("{test}-{}", std::process::id()));
    if folder.exists() {
        fs::remove_dir_all(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    }
    fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    folder
}

/// `tests/fixtures/<path>`.
pub fn fixture(path: &str) -> PathBuf {
    repository().join("tests/fixtures").join(path)
}

/// Copies a directory and what is in it.
pub fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap_or_else(|e| panic!("{}: {e}", to.display()));
    for entry in fs::read_dir(from).unwrap_or_else(|e| panic!("{}: {e}", from.display())) {
        let entry = entry.expect("a readable entry");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).unwrap_or_else(|e| panic!("{}: {e}", target.display()));
        }
    }
}

/// The files below a directory, sorted.
pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let paths = entries.map(|entry| entry.expect("a readable entry").path());
    let mut found: Vec<PathBuf> =
        paths.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect();
    found.sort();
    found
}

/// The files below a directory with what is in them, by their paths in it.
pub fn contents_below(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let within = |path: &Path| path.strip_prefix(dir).expect("a path below the directory").to_owned();
    let read = |path: &Path| fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    files_below(dir).into_iter().map(|path| (within(&path), read(&path))).collect()
}

pub fn read_json(path: &Path) -> serde_json::Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// An environment variable as a number, for tests whose size can be turned up.
pub fn number_from_environment(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) => default,
    }
}

pub fn repository() -> PathBuf {
    pack().unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")))
}

/// The environment of these pins, made if it is missing.
///
/// It is built beside its final name and renamed when whole; a lock (freed by the system if its holder
/// dies) makes other test processes wait for the first one instead of building their own.
fn environment(kind: &str, requirements: &str) -> Result<PathBuf, String> {
    let requirements = repository().join(requirements);
    let pins = fs::read(&requirements).map_err(|e| format!("{}: {e}", requirements.display()))?;
    let mut hasher = DefaultHasher::new();
    pins.hash(&mut hasher);
    let name = format!("{kind}-{:016x}", hasher.finish());
    let root = temporary();
    let (finished, partial) = (root.join(&name), root.join(format!("{name}.partial")));
    let python = finished.join("bin/python");

    let at = |path: &Path, e: std::io::Error| format!("{}: {e}", path.display());
    let lock_path = root.join(format!("{name}.lock"));
    let lock = File::create(&lock_path).map_err(|e| at(&lock_path, e))?;
    lock.lock().map_err(|e| at(&lock_path, e))?;
    if finished.exists() {
        return Ok(python);
    }
    eprintln!("installing the pinned packages below {}", finished.display());
    if partial.exists() {
        fs::remove_dir_all(&partial).map_err(|e| at(&partial, e))?;
    }
    run_quietly(Command::new(base_python()?).args(["-m", "venv"]).arg(&partial))?;
    run_quietly(
        Command::new(partial.join("bin/python"))
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "-r"])
            .arg(&requirements),
    )?;
    fs::rename(&partial, &finished).map_err(|e| at(&finished, e))?;
    Ok(python)
}

/// The pins are for CPython 3.11; a newer one usually has wheels for them too.
fn base_python() -> Result<&'static str, String> {
    ["python3.11", "python3"]
        .into_iter()
        .find(|python| {
            Command::new(python)
                .args(["-c", "import venv, sys; sys.exit(sys.version_info < (3, 11))"])
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|status| status.success())
        })
        .ok_or_else(|| "no python3 of version 3.11 or later with venv was found".to_owned())
}

fn run_quietly(command: &mut Command) -> Result<(), String> {
    let shown = format!("{command:?}");
    let output = command.output().map_err(|e| format!("{shown}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let line = stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message");
    Err(format!("{shown} ended with {}: {line}", output.status))
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
