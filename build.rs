//! Kernels for devices. A build needs no toolkit: the committed `kernels/place.ptx` is enough, and here it is only checked to be
//! made from the present sources. Where nvcc is found, the kernels are translated in advance for some devices too, which saves
//! their drivers that work at the first load. Nothing is downloaded, and a missing or old nvcc fails no build.
//!
//! `TOUCHDOWN_NVCC` names the compiler (empty: use none); else it is looked for in `CUDA_HOME`, `CUDA_PATH` and `PATH`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// In the order in which `kernels/build_ptx.py` hashes them.
const SOURCES: [&str; 4] = ["place.cu", "convert.cuh", "descriptor.cuh", "platform.cuh"];

/// Devices whose code is made in advance, as 10 * major + minor: A100, H100, B200.
pub(crate) const ARCHITECTURES: [u32; 3] = [80, 90, 100];

fn main() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    for name in SOURCES.iter().chain(["place.ptx"].iter()) {
        println!("cargo::rerun-if-changed=kernels/{name}");
    }
    for variable in ["TOUCHDOWN_NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    check_ptx()?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets no OUT_DIR")?);
    write_cubins(&out)
}

/// Fails if the committed PTX was made from other sources.
fn check_ptx() -> Result<(), String> {
    let mut sources = Vec::new();
    for name in SOURCES {
        sources.extend(read(&Path::new("kernels").join(name))?);
    }
    let ptx = read(Path::new("kernels/place.ptx"))?;
    let head = ptx.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let expected = format!("// sources fnv1a64 {:016x}", fnv1a64(&sources));
    if head == expected.as_bytes() {
        return Ok(());
    }
    let found = String::from_utf8_lossy(head);
    Err(format!(
        "kernels/place.ptx was made from other sources: expected `{expected}`, found `{found}`; run kernels/build_ptx.py"
    ))
}

/// Writes the constant that `src/transform/cuda/mod.rs` includes, empty where nothing was compiled.
fn write_cubins(out: &Path) -> Result<(), String> {
    let nvcc = find_nvcc();
    let made = ARCHITECTURES.iter().filter_map(|architecture| {
        let cubin = out.join(format!("place_sm_{architecture}.cubin"));
        let nvcc = nvcc.as_deref()?;
        match compile(nvcc, *architecture, &cubin) {
            Ok(()) => Some(format!("    ({architecture}, include_bytes!({:?})),\n", cubin.display().to_string())),
            Err(reason) => {
                println!("cargo::warning=no kernels in advance for sm_{architecture}, the driver will translate them: {reason}");
                None
            }
        }
    });
    let text = format!(
        "/// The kernels translated in advance: compute capability, as 10 * major + minor, and cubin. One runs on devices of\n\
         /// its major version and at least its minor one. Empty where the build found no nvcc.\n\
         pub const CUBINS: &[(u32, &[u8])] = &[\n{}];\n",
        made.collect::<String>()
    );
    fs::write(out.join("cubins.rs"), text).map_err(|e| format!("{}: {e}", out.display()))
}

/// Translates the kernels for devices of an architecture.
pub(crate) fn compile(nvcc: &Path, architecture: u32, cubin: &Path) -> Result<(), String> {
    let output = Command::new(nvcc)
        .args(["-cubin", "-O3", "-std=c++14", &format!("-arch=sm_{architecture}"), "-o"])
        .arg(cubin)
        .arg("kernels/place.cu")
        .output()
        .map_err(|e| format!("{}: {e}", nvcc.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let line = stderr.lines().find(|line| !line.trim().is_empty()).unwrap_or("no message");
    Err(format!("{} ended with {}: {line}", nvcc.display(), output.status))
}

fn find_nvcc() -> Option<PathBuf> {
    if let Some(named) = env::var_os("TOUCHDOWN_NVCC") {
        return Some(PathBuf::from(named)).filter(|path| !path.as_os_str().is_empty());
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    homes.chain(env::split_paths(&path)).map(|dir| dir.join("nvcc")).find(|nvcc| nvcc.is_file())
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// The 64-bit hash of Fowler, Noll and Vo, variant 1a: enough to notice a forgotten step.
fn fnv1a64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3))
}
