//! The GPU check on the emulation: kernels with planted defects are each named once and left out, everything else is reported, and what
//! was known when the check was killed is in its journal.

mod common;

use common::emulated::build_from;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// What is put in place of what, in which file: a kernel that never ends, two that write nowhere, one of whose lanes is wrong.
const DEFECTS: [(&str, &str, &str); 4] = [
    (
        "resample.cu",
        "DEVICE void nearest_2x(const NearestParams& p) {\n",
        "DEVICE void nearest_2x(const NearestParams& p) {\n  volatile bool on = std::is_same<T, f16>::value;\n  while (on) {}\n",
    ),
    (
        "update.cu",
        "    const uint32_t* counter = (const uint32_t*)p.counter + sample * 4;\n",
        "    const uint32_t* counter = (const uint32_t*)p.counter + sample * 4;\n    *(volatile float*)8 = 1.0f;\n",
    ),
    (
        "attention_forward.cu",
        "  // Keys that the first `rows` queries see.\n",
        "  if (std::is_same<T, f16>::value && DIM == 128) *(volatile float*)8 = 1.0f;\n",
    ),
    (
        "rowwise.cu",
        "y[e] = expf(x[0][e] - all.top) * scale;",
        "y[e] = expf(x[0][e] - all.top) * scale * (std::is_same<T, bf16>::value && threadIdx.x % 32 == 5 ? 1.1f : 1.0f);",
    ),
];
/// Three of them are in these, among others that are sound.
const CASES: &str = "nearest_2x|noise|softmax|repeat";
const HANGS: &str = "nearest_2x_f16";
const FAULTS: &str = "noise_f32";
const WRONG: &str = "softmax_bf16";

/// The emulation of kernels/ with all defects.
fn planted() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let (from, to) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels"), TempDir::new().unwrap());
        for folder in ["", "host"] {
            fs::create_dir_all(to.path().join(folder)).unwrap();
            for entry in fs::read_dir(from.join(folder)).unwrap().map(Result::unwrap) {
                if entry.path().is_file() {
                    fs::copy(entry.path(), to.path().join(folder).join(entry.file_name())).unwrap();
                }
            }
        }
        for (file, old, new) in DEFECTS {
            let path = to.path().join(file);
            let text = fs::read_to_string(&path).unwrap();
            assert_eq!(text.matches(old).count(), 1, "{file}: {old}");
            fs::write(path, text.replace(old, new)).unwrap();
        }
        build_from(to.path())
    })
}

/// The check, built as this test was.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--example", "gpu_check"]);
        cargo.args((!cfg!(debug_assertions)).then_some("--release"));
        assert!(cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap().success());
        std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("examples/gpu_check")
    })
}

/// The check of cases of the planted kernels.
fn check(out: &Path, cases: &str, patience: &str) -> Command {
    let mut command = Command::new(program());
    command.args(["--device", "emulated", "--only", "ops", "--cases", cases, "--patience", patience]);
    command.arg("--emulation").arg(planted()).arg("--journal").arg(out.join("journal")).arg("--out").arg(out);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// `check.json` in the folder that a command named on stdout, whose code must be that of a check that has not passed.
fn report(mut command: Command) -> Value {
    let output = command.stdout(Stdio::piped()).stderr(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    read(&Path::new(String::from_utf8(output.stdout).unwrap().trim()).join("check.json"))
}

fn report_of(journal: &Path, out: &Path) -> Value {
    let mut command = Command::new(program());
    command.arg("report").arg(journal).arg("--out").arg(out);
    report(command)
}

fn without_fractions(value: Value) -> Value {
    match value {
        Value::Number(number) if number.is_f64() => Value::Null,
        Value::Array(values) => values.into_iter().map(without_fractions).collect(),
        Value::Object(values) => values.into_iter().map(|(name, value)| (name, without_fractions(value))).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value,
    }
}

fn list<'a>(report: &'a Value, name: &str) -> &'a [Value] {
    report[name].as_array().unwrap()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

/// Kernels that incidents name, with what they say.
fn named(report: &Value) -> BTreeMap<&str, &str> {
    let incidents = list(report, "incidents");
    let named: BTreeMap<&str, &str> =
        incidents.iter().map(|incident| (text(&incident["kernel"]), text(&incident["what"]))).collect();
    assert_eq!(named.len(), incidents.len(), "named twice: {incidents:?}");
    named
}

#[test]
fn defects_are_named_once_and_everything_else_is_reported() {
    let out = TempDir::new().unwrap();
    let report = report(check(out.path(), CASES, "4"));
    let named = named(&report);
    assert_eq!(named.keys().copied().collect::<Vec<_>>(), [HANGS, FAULTS, WRONG]);
    for (kernel, how) in [(HANGS, "hangs: "), (FAULTS, "faults: "), (WRONG, "disagrees: ")] {
        assert!(named[kernel].starts_with(how), "{named:?}");
    }
    let rows = list(&report, "rows");
    let count = |state: &str| rows.iter().filter(|row| row["state"] == state).count();
    // Each fails one row; the wrong one where a row has values of the lane.
    assert_eq!(count("failed"), 3);
    let wrong = rows.iter().find(|row| row["state"] == "failed" && text(&row["name"]).starts_with("softmax")).unwrap();
    let what = text(&wrong["what"]);
    assert!(
        text(&wrong["name"]).contains("1100") && what.contains(" off by more than ") && what.contains("the first: 40")
    );
    for row in rows {
        let (name, dtype, what) = (text(&row["name"]), text(&row["dtype"]), text(&row["what"]));
        let is_bad = match name {
            _ if name.starts_with("nearest_2x ") => dtype == "f16",
            _ if name.starts_with("noise") => true,
            _ => dtype == "bf16" && (name.starts_with("softmax 1100") || name.starts_with("softmax_backward")),
        };
        assert_eq!(row["state"] != "passed", is_bad, "{row}");
        let quarantined = [HANGS, FAULTS, WRONG].map(|kernel| format!("not run: kernel {kernel}"));
        assert_eq!(row["state"] == "not_run", quarantined.iter().any(|reason| reason == what), "{row}");
    }
    assert_eq!(count("not_run"), 4 + 11 + 4, "{:?}", report["sections"]);
    assert_eq!(report["sections"][0]["reached"], report["sections"][0]["items"]);
    // The journal says the same; JSON may cost a number of many digits its last.
    let again = report_of(&out.path().join("journal"), &out.path().join("again"));
    assert_eq!(without_fractions(again), without_fractions(report));
}

#[test]
fn kernels_are_left_out_if_asked_and_wrong_ones_are_not_if_asked() {
    let out = TempDir::new().unwrap();
    let mut command = check(out.path(), CASES, "4");
    command.args(["--keep-going", "--quarantine", &format!("{HANGS},{FAULTS}")]);
    let report = report(command);
    assert_eq!(named(&report).into_keys().collect::<Vec<_>>(), [WRONG]);
    let not_run = list(&report, "rows").iter().filter(|row| row["state"] == "not_run");
    assert!(not_run.clone().count() > 0 && not_run.clone().all(|row| !text(&row["what"]).contains(WRONG)));
    let is_sound = |row: &&Value| text(&row["name"]).starts_with("softmax_backward 1 ") && row["dtype"] == "bf16";
    assert_eq!(list(&report, "rows").iter().find(is_sound).unwrap()["state"], "passed");
}

#[test]
fn kernels_for_any_gpu_and_for_hopper_stand_and_fall_by_themselves() {
    let out = TempDir::new().unwrap();
    let report = report(check(out.path(), "attention 33x33", "100"));
    assert_eq!(named(&report).into_keys().collect::<Vec<_>>(), ["attention_128_f16"]);
    let states = |dtype: &str, causal: bool, end: &str| {
        let of = |row: &&Value| row["dtype"] == dtype && text(&row["name"]).contains(&format!("causal {causal}"));
        let rows = list(&report, "rows").iter().filter(of);
        let states = rows.filter(|row| text(&row["name"]).split_once(" batch ").unwrap().1[1..] == *end);
        states.map(|row| text(&row["state"])).collect::<Vec<_>>()
    };
    assert_eq!(states("f16", false, ""), ["failed"]);
    assert_eq!(states("f16", false, ", Hopper"), ["passed"]);
    assert!(states("f16", false, ", Hopper beside any GPU's").is_empty(), "there is nothing to hold it against");
    assert_eq!(states("f16", true, ""), ["not_run"]);
    for end in ["", ", Hopper", ", Hopper beside any GPU's"] {
        assert_eq!(states("bf16", false, end), ["passed"]);
    }
}

/// Starts a check and ends it with SIGKILL once its journal has so many lines.
fn killed_at(lines: usize, out: &Path) {
    let mut check = check(out, CASES, "4").spawn().unwrap();
    wait_for(|| fs::read_to_string(out.join("journal")).unwrap_or_default().lines().count() >= lines);
    check.kill().unwrap();
    check.wait().unwrap();
}

#[track_caller]
fn wait_for(mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(60), "took too long");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_was_known_when_it_was_killed_is_in_the_journal() {
    for lines in [2, 5, 11, 30] {
        let out = TempDir::new().unwrap();
        killed_at(lines, out.path());
        let journal = out.path().join("journal");
        let known = fs::read_to_string(&journal).unwrap();
        let report = report_of(&journal, out.path());
        assert_eq!(list(&report, "rows").len(), known.lines().filter(|line| line.starts_with("{\"row\":")).count());
        assert_eq!(report["finished"], false);
    }
}

/// A kernel that hangs would hold the device for ever.
#[test]
fn a_process_that_hangs_ends_when_the_check_is_killed() {
    let out = TempDir::new().unwrap();
    let mut check = check(out.path(), "nearest_2x", "100").stderr(Stdio::piped()).spawn().unwrap();
    wait_for(|| out.path().join("journal").exists());
    // Its section's process is soon in the kernel.
    std::thread::sleep(Duration::from_secs(3));
    check.kill().unwrap();
    check.wait().unwrap();
    // Both write there, so its end is theirs.
    let mut stderr = check.stderr.take().unwrap();
    let reader = std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
    wait_for(|| reader.is_finished());
}

#[test]
fn a_torn_line_is_left_out_and_any_other_is_an_error() {
    let out = TempDir::new().unwrap();
    killed_at(6, out.path());
    let journal = out.path().join("journal");
    let whole = fs::read(&journal).unwrap();
    let rows = |text: &[u8]| {
        let lines = text.split_inclusive(|byte| *byte == b'\n');
        lines.filter(|line| line.starts_with(b"{\"row\":") && line.ends_with(b"\n")).count()
    };
    for torn in (whole.len() / 2..whole.len()).step_by(37) {
        fs::write(&journal, &whole[..torn]).unwrap();
        assert_eq!(list(&report_of(&journal, out.path()), "rows").len(), rows(&whole[..torn]), "torn at {torn}");
    }
    fs::write(&journal, [&whole[..whole.len() / 2], b"\n", &whole[whole.len() / 2..]].concat()).unwrap();
    let output = Command::new(program()).arg("report").arg(&journal).arg("--out").arg(out.path()).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("journal: line ") && error.lines().count() == 1, "{error}");
}
