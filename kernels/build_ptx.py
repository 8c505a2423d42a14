"""Compiles the kernels to place.ptx, which is committed: a build needs no toolkit.

    pip install -r tests/kernels/requirements.txt
    python kernels/build_ptx.py [OUT]            # default: kernels/place.ptx

NVRTC, NVIDIA's compiler as a library, comes from PyPI and needs neither a device nor a driver. The target is compute_70: every
driver translates it for its device, from Volta on. NVRTC states its own PTX version, which only drivers of its age accept;
the kernels use nothing that is newer than PTX 6.0 (CUDA 9), so the line is lowered to that, as the format allows: ptxas checks
a text against the version that it states. `--ptxas FILE` does so for every architecture.

The text is the same on every machine. Its head carries the hash of the sources, with which build.rs notices a stale file.
"""

import argparse
import ctypes
import pathlib
import subprocess
import sys
import sysconfig
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
MAIN = "place.cu"
HEADERS = ["convert.cuh", "descriptor.cuh", "platform.cuh"]  # build.rs hashes the same files in the same order
OPTIONS = ["--gpu-architecture=compute_70", "--std=c++14"]
PTX_VERSION = "6.0"
NVRTC_VERSION = (12, 9)
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120"]


def fnv1a64(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def library():
    root = pathlib.Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cuda_nvrtc" / "lib"
    try:
        # The compiler loads its built-in functions by name: they must be there before.
        ctypes.CDLL(str(next(root.glob("libnvrtc-builtins.so.*"))), mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(root / "libnvrtc.so.12"))
    except (StopIteration, OSError) as error:
        sys.exit(f"no NVRTC below {root} (pip install -r tests/kernels/requirements.txt): {error}")


def compile_ptx(sources):
    nvrtc = library()

    def check(code, what):
        if code != 0:
            sys.exit(f"{what} failed: NVRTC error {code}")

    major, minor = ctypes.c_int(), ctypes.c_int()
    check(nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    if (major.value, minor.value) != NVRTC_VERSION:
        sys.exit(f"NVRTC {major.value}.{minor.value}: expected {NVRTC_VERSION}, other versions write other text")
    strings = lambda items: (ctypes.c_char_p * len(items))(*items)
    program = ctypes.c_void_p()
    check(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program),
            sources[MAIN],
            MAIN.encode(),
            len(HEADERS),
            strings([sources[name] for name in HEADERS]),
            strings([name.encode() for name in HEADERS]),
        ),
        "nvrtcCreateProgram",
    )
    code = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), strings([option.encode() for option in OPTIONS]))
    size = ctypes.c_size_t()
    check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)), "nvrtcGetProgramLogSize")
    log = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetProgramLog(program, log), "nvrtcGetProgramLog")
    # The age of the target is known and wanted.
    said = [line for line in log.value.decode().splitlines() if line and "are deprecated" not in line]
    if code != 0 or said:
        sys.exit("\n".join([f"{MAIN} does not compile cleanly:", *said]))
    check(nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)), "nvrtcGetPTXSize")
    text = ctypes.create_string_buffer(size.value)
    check(nvrtc.nvrtcGetPTX(program, text), "nvrtcGetPTX")
    return text.value.decode()


def lowered(ptx):
    versions = [line for line in ptx.splitlines() if line.startswith(".version ")]
    if len(versions) != 1:
        sys.exit(f"expected one .version line, found {versions}")
    return ptx.replace(versions[0], f".version {PTX_VERSION}", 1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?", type=pathlib.Path, default=HERE / "place.ptx")
    parser.add_argument("--ptxas", type=pathlib.Path, help="assemble the result with this ptxas for every architecture")
    arguments = parser.parse_args()
    sources = {name: (HERE / name).read_bytes() for name in [MAIN, *HEADERS]}
    digest = fnv1a64(b"".join(sources[name] for name in [MAIN, *HEADERS]))
    head = f"// sources fnv1a64 {digest:016x}\n// made by kernels/build_ptx.py; do not edit\n"
    arguments.out.write_text(head + lowered(compile_ptx(sources)).rstrip() + "\n")
    for architecture in ARCHITECTURES if arguments.ptxas else []:
        with tempfile.NamedTemporaryFile() as cubin:
            command = [arguments.ptxas, "-v", f"-arch={architecture}", arguments.out, "-o", cubin.name]
            done = subprocess.run(command, capture_output=True, text=True)
            used = [line.split(":", 1)[1].strip() for line in done.stderr.splitlines() if "Used" in line]
            print(architecture, "ok" if done.returncode == 0 else done.stderr.strip(), *used, sep="\n  ")


if __name__ == "__main__":
    main()
