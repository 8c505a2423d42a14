//! The program on the simulated driver: what it says about drivers, which devices it takes, and that what it dumps from devices is
//! what it dumps from processors, for every checked-in checkpoint.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking and say what they compared"
)]

#[path = "simulated/mod.rs"]
mod simulated;
mod support;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use simulated::{Driver, files};
use support::{Output, finish, fixture, program, repository, scratch};

const TIMEOUT: Duration = Duration::from_secs(60);

/// Runs the program with these variables.
fn run<A: AsRef<OsStr>>(args: &[A], variables: &[(&str, &OsStr)]) -> Output {
    finish(envs(program(args), variables), TIMEOUT)
}

fn envs(mut command: Command, variables: &[(&str, &OsStr)]) -> Command {
    command.envs(variables.iter().copied());
    command
}

fn json(output: &Output) -> Value {
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    serde_json::from_str(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", output.stdout))
}

#[test]
fn the_doctor_tells_drivers_apart() {
    let Some(files) = files("the_doctor_tells_drivers_apart") else { return };
    let driver = files.driver.as_os_str();
    let answer = |library: &OsStr, variables: &[(&str, &str)]| {
        let mut all = vec![("TOUCHDOWN_LIBCUDA", library)];
        all.extend(variables.iter().map(|(name, value)| (*name, OsStr::new(*value))));
        let found = json(&run(&["doctor", "--json"], &all));
        let text = |field: &str| found["cuda"][field].as_str().unwrap().to_owned();
        (text("state"), text("detail"), found["cuda"]["devices"].as_u64().unwrap())
    };
    let is = |answer: (String, String, u64), state: &str, detail: &str| {
        assert!(answer.0 == state && answer.1.contains(detail) && answer.2 == 0, "{answer:?}, not {state}");
    };
    is(answer(OsStr::new("/nonexistent/libcuda.so.1"), &[]), "no-library", "/nonexistent/libcuda.so.1");
    is(answer(files.kernels.as_os_str(), &[]), "missing-symbol", "cuInit");
    is(answer(driver, &[("FAKECUDA_INIT", "34")]), "stub", "stub");
    is(answer(driver, &[("FAKECUDA_INIT", "100")]), "no-device", "no device");
    is(answer(driver, &[("FAKECUDA_DEVICES", "0")]), "no-device", "no device");
    is(answer(driver, &[("FAKECUDA_DRIVER", "10020")]), "old-driver", "10.2");
    is(answer(driver, &[("FAKECUDA_INIT", "999")]), "failed", "999");
    let (state, detail, count) = answer(driver, &[("FAKECUDA_DEVICES", "3")]);
    assert!(state == "devices" && count == 3 && detail.contains("Simulated GPU 2"), "{state}: {detail}");
}

#[test]
fn auto_takes_all_gpus_or_a_processor_and_nothing_else_does() {
    let Some(files) = files("auto_takes_all_gpus_or_a_processor_and_nothing_else_does") else { return };
    let (driver, kernels) = (files.driver.as_os_str(), files.kernels.as_os_str());
    let checkpoint = fixture("quickstart").join("ckpt");
    let load = |devices: &[&str], variables: &[(&str, &OsStr)]| {
        let mut args = vec!["load", checkpoint.to_str().unwrap(), "--json"];
        args.extend_from_slice(devices);
        run(&args, variables)
    };
    let devices = |found: &Value| {
        let name = |row: &Value| row["device"].as_str().unwrap().to_owned();
        found["devices"].as_array().unwrap().iter().map(name).collect::<Vec<_>>()
    };
    let simulated = [("TOUCHDOWN_LIBCUDA", driver), ("FAKECUDA_KERNELS", kernels)];
    let found = json(&load(&[], &simulated));
    assert_eq!(devices(&found), ["cuda:0", "cuda:1"]);
    assert!(found["peak_device_bytes"].as_u64().unwrap() > found["bytes_logical"].as_u64().unwrap());
    assert!(found["startup"]["cuda"].as_f64().unwrap() > 0.0 && found["startup"]["pin"].as_f64().unwrap() > 0.0);
    assert!(found["stages"]["copy"]["bytes"].as_u64().unwrap() >= found["bytes_logical"].as_u64().unwrap());
    let none = [("TOUCHDOWN_LIBCUDA", OsStr::new("/nonexistent"))];
    let found = json(&load(&[], &none));
    assert_eq!(devices(&found), ["cpu:0"]);
    assert_eq!(found["peak_device_bytes"], 0);
    // A GPU that was asked for is not silently another device.
    for (args, variables, says) in [
        (["--devices", "cuda:0"], &none[..], "/nonexistent"),
        (["--devices", "cuda:7"], &simulated[..], "cuda:7"),
        (
            ["--devices", "cuda:0"],
            &[simulated[0], simulated[1], ("FAKECUDA_MEMORY", OsStr::new("200000"))],
            "bytes free",
        ),
        // The committed kernels are for CUDA 9 and later, which every driver that is taken knows; this one has no kernels at all.
        (["--devices", "cuda:0"], &simulated[..1], "CUDA_ERROR_NOT_FOUND"),
    ] {
        let output = load(&args, variables);
        assert_eq!(output.code, Some(4), "{says}: {}", output.stderr);
        assert!(output.stderr.contains(says), "{says}: {}", output.stderr);
    }
}

#[test]
fn one_ptx_serves_drivers_of_every_age() {
    let Some(files) = files("one_ptx_serves_drivers_of_every_age") else { return };
    let checkpoint = fixture("quickstart").join("ckpt");
    for driver in ["11000", "11080", "12090", "13000"] {
        let args =
            ["load", checkpoint.to_str().unwrap(), "--devices", "cuda:0", "--cast", "**@float=bfloat16", "--json"];
        let simulated = [
            ("TOUCHDOWN_LIBCUDA", files.driver.as_os_str()),
            ("FAKECUDA_KERNELS", files.kernels.as_os_str()),
            ("FAKECUDA_DRIVER", OsStr::new(driver)),
        ];
        let found = json(&run(&args, &simulated));
        assert!(found["peak_device_bytes"].as_u64() > found["bytes_logical"].as_u64(), "CUDA {driver}: {found}");
    }
}

#[test]
fn a_plan_is_held_against_the_free_memory_of_devices() {
    let Some(files) = files("a_plan_is_held_against_the_free_memory_of_devices") else { return };
    let checkpoint = fixture("quickstart").join("ckpt");
    let plan = |json: &[&str], memory: &str| {
        let args =
            ["plan", checkpoint.to_str().unwrap(), "--devices", "cuda:0*2,cuda:1", "--threads", "2", "--otherwise"];
        let args = [&args[..], &["replicate"], json].concat();
        let simulated = [
            ("TOUCHDOWN_LIBCUDA", files.driver.as_os_str()),
            ("FAKECUDA_KERNELS", files.kernels.as_os_str()),
            ("FAKECUDA_MEMORY", OsStr::new(memory)),
        ];
        run(&args, &simulated)
    };
    let found = json(&plan(&["--json"], "1073741824"));
    let gpus = found["gpus"].as_array().unwrap();
    assert_eq!((gpus.len(), &found["fits"]), (2, &Value::Bool(true)));
    for (gpu, device) in gpus.iter().zip(["cuda:0", "cuda:1"]) {
        assert_eq!((&gpu["device"], &gpu["free"]), (&Value::from(device), &Value::from(1u64 << 30)));
        let number = |field: &str| gpu[field].as_u64().unwrap();
        assert_eq!(number("needed"), number("results") + number("staging"));
    }
    // Logical devices of one GPU share a replica.
    assert_eq!(gpus[0]["results"], gpus[1]["results"]);
    let short = json(&plan(&["--json"], "300000"));
    assert_eq!(short["fits"], Value::Bool(false));
    let devices: Vec<&Value> = short["shortages"].as_array().unwrap().iter().map(|row| &row["device"]).collect();
    assert_eq!(devices, ["cuda:0", "cuda:1"]);
    let text = plan(&[], "300000");
    assert!(text.code == Some(0) && text.stdout.contains("does not fit: cuda:1 needs"), "{text:?}");
    // A plan for another machine's devices.
    let elsewhere = ["plan", checkpoint.to_str().unwrap(), "--devices", "cuda:0", "--otherwise", "replicate"];
    let text = run(&elsewhere, &[("TOUCHDOWN_LIBCUDA", OsStr::new("/nonexistent"))]);
    assert!(text.code == Some(0) && text.stdout.contains("of an unknown amount free"), "{text:?}");
}

#[test]
fn bench_measures_devices_beside_loads() {
    let Some(driver) = Driver::find("bench_measures_devices_beside_loads") else { return };
    let checkpoint = fixture("quickstart").join("ckpt");
    let mut command = program([
        "bench",
        checkpoint.to_str().unwrap(),
        "--rounds",
        "2",
        "--devices",
        "cuda:0*2",
        "--threads",
        "2",
        "--json",
    ]);
    driver.tell(&mut command, 0, 1);
    let found = json(&finish(command, TIMEOUT));
    let devices = found["devices"].as_array().unwrap();
    assert_eq!((devices.len(), &devices[0]["device"]), (1, &Value::from("cuda:0")));
    let measured = devices[0]["measured"].as_array().unwrap();
    let names: Vec<&str> = measured.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names[..3], ["copy to the device", "copy on the device", "copy"]);
    assert!(names.contains(&"float32 to bfloat16") && names.contains(&"transpose, 4 bytes"), "{names:?}");
    for row in measured {
        assert!(row["seconds"].as_f64() > Some(0.0) && row["gb_per_second"].as_f64() > Some(0.0), "{row}");
        assert_eq!(row["samples"].as_array().unwrap().len(), 2, "{row}");
    }
    assert_eq!(measured[1]["of_copy_on_the_device"], 1.0);
    let loads = found["loads"].as_array().unwrap();
    assert_eq!(loads.len(), 5);
    assert!(loads.iter().all(|load| load["peak_device_bytes"].as_u64() > Some(0)), "{loads:?}");
    assert!(found["device_startup"]["cuda"].as_f64() > Some(0.0));
}

#[test]
fn fixtures_land_on_devices_as_on_processors() {
    let Some(driver) = Driver::find("fixtures_land_on_devices_as_on_processors") else { return };
    let meshes = match driver {
        Driver::Simulated(_) => [(8, "cuda:0*3,cuda:1-2,cpu:3"), (2, "cpu:1,cuda:0"), (1, "cuda:3"), (8, "cuda:0-7")],
        Driver::Real => [(8, "cuda:0*5,cpu:3"), (2, "cpu:1,cuda:0"), (1, "cuda:0"), (8, "cuda:0*8")],
    };
    let folder = scratch("cuda-fixtures");
    let report = folder.join("report");
    let (mut fixtures, mut dumps, mut compared) = (0, 0, 0);
    for entry in fs::read_dir(repository().join("tests/fixtures")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let checkpoint = path.join("ckpt");
        let dump = |devices: &str, more: &[&str], to: &Path| {
            let mut args =
                vec!["load", checkpoint.to_str().unwrap(), "--devices", devices, "--dump", to.to_str().unwrap()];
            args.extend_from_slice(more);
            let mut command = program(&args);
            driver.tell(&mut command, 100, 1);
            finish(envs(command, &[("FAKECUDA_REPORT", report.as_os_str())]), TIMEOUT)
        };
        let mut taken = false;
        for (number, more) in
            [&[][..], &["--spec", "**=device"], &["--cast", "**@float=bfloat16", "--spec", "**=_,device"]]
                .into_iter()
                .enumerate()
        {
            // As they are stored, or saved, on all; divided and cast on two.
            for (count, devices) in meshes.into_iter().take(if more.is_empty() { 4 } else { 2 }) {
                let cpu = folder.join(format!("{name}-{number}-cpu{count}"));
                if !cpu.join("dump.json").exists() && dump(&format!("cpu:{count}"), more, &cpu).code != Some(0) {
                    // Not for this layout, or not at all: other tests say why.
                    continue;
                }
                let gpu = folder.join(format!("{name}-{number}-{}", devices.replace([':', ','], "")));
                let output = dump(devices, more, &gpu);
                assert_eq!(output.code, Some(0), "{name} {more:?} on {devices}: {}", output.stderr);
                let (want, got) = (contents(&cpu), contents(&gpu));
                assert!(want == got, "{name} {more:?} on {devices} differs from {}", cpu.display());
                if let Driver::Simulated(_) = driver {
                    assert_eq!(
                        fs::read_to_string(&report).unwrap(),
                        "",
                        "{name} {more:?} on {devices} leaves something"
                    );
                }
                compared += got.values().map(Vec::len).sum::<usize>();
                dumps += 1;
                taken = true;
            }
        }
        fixtures += usize::from(taken);
    }
    println!("{fixtures} fixtures, {dumps} dumps, {compared} bytes compared");
    assert!(fixtures > 20 && dumps > 100);
    fs::remove_dir_all(&folder).unwrap();
}

/// The files of a folder.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    files.map(|file| (file.file_name().to_string_lossy().into_owned(), fs::read(file.path()).unwrap())).collect()
}
