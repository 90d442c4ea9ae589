//! Runs that are killed at any moment: what is there is whole, and the next run goes on as if nothing had happened.

use crate::common::command::{files, path, succeeds};
use crate::common::golden::data_folder;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Kills per command; `RAREBIT_KILLS` asks for more.
const KILLS: usize = 3;

fn kills() -> usize {
    std::env::var("RAREBIT_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(KILLS)
}

/// All files of a folder with their bytes.
fn content(folder: &Path) -> Vec<(String, Vec<u8>)> {
    files(folder).into_iter().map(|name| (name.clone(), fs::read(folder.join(name)).unwrap())).collect()
}

/// Whole: images can be inspected, traces are lines of JSON, tokens are safetensors. Temporary files may be there.
fn check_whole(folder: &Path) {
    for (name, bytes) in content(folder).into_iter().filter(|(name, _)| !name.starts_with('.')) {
        match name.rsplit('.').next().unwrap() {
            "png" => assert!(bytes.ends_with(b"IEND\xaeB`\x82"), "{name}"),
            "jsonl" => {
                let whole = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
                for line in whole.split(|&byte| byte == b'\n').filter(|_| !whole.is_empty()) {
                    serde_json::from_slice::<serde_json::Value>(line).unwrap();
                }
            }
            "st" => drop(safetensors::SafeTensors::deserialize(&bytes).unwrap()),
            other => panic!("{name}: {other}"),
        }
    }
}

/// Kills a command again and again, each time later or earlier in its run, until it has been killed often enough; then lets it end.
fn kill_and_resume(command: &[&str]) {
    let folder = TempDir::new().unwrap();
    let prompts = path(&folder, "prompts.txt");
    fs::write(&prompts, "a red star\na blue ring\na green heart\n").unwrap();
    let args = |out: &str| -> Vec<String> {
        let own = |arg: &&str| arg.replace("OUT", out).replace("PROMPTS", &prompts);
        command.iter().map(own).collect()
    };
    let whole = path(&folder, "whole");
    fs::create_dir(&whole).unwrap();
    let started = Instant::now();
    let run = args(&whole);
    succeeds(&run.iter().map(String::as_str).collect::<Vec<_>>());
    let takes = started.elapsed();
    let expected = content(Path::new(&whole));

    // Moments spread evenly and never in the same order: multiples of the golden ratio.
    let mut killed = 0;
    let mut round = 0;
    while killed < kills() {
        let out = path(&folder, &format!("killed-{round}"));
        fs::create_dir(&out).unwrap();
        let args = args(&out);
        while killed < kills() {
            let moment = takes.mul_f64((0.61803398875 * (killed as f64 + 1.0)).fract());
            let mut child = Command::new(env!("CARGO_BIN_EXE_rarebit"))
                .args(&args)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let started = Instant::now();
            let mut ended = None;
            while started.elapsed() < moment && ended.is_none() {
                std::thread::sleep(Duration::from_micros(200));
                ended = child.try_wait().unwrap();
            }
            if ended.is_some() {
                break;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            killed += 1;
            check_whole(Path::new(&out));
        }
        succeeds(&args.iter().map(String::as_str).collect::<Vec<_>>());
        for ((name, found), (expected_name, expected)) in content(Path::new(&out)).iter().zip(&expected) {
            assert_eq!(name, expected_name, "{:?}", files(Path::new(&out)));
            assert!(found == expected, "{name} differs from that of a run in one piece");
        }
        assert_eq!(files(Path::new(&out)).len(), expected.len(), "{:?}", files(Path::new(&out)));
        round += 1;
    }
}

#[test]
fn generate() {
    kill_and_resume(&["generate", "--prompts", "PROMPTS", "--out", "OUT", "--steps", "4", "--count", "2", "--quiet"]);
}

#[test]
fn minority_with_trace_and_token() {
    let model = data_folder("tiny-sd1").display().to_string();
    kill_and_resume(&[
        "minority",
        "--prompts",
        "PROMPTS",
        "--model",
        &model,
        "--out",
        "OUT",
        "--steps",
        "6",
        "--t-lo",
        "0.2",
        "--iterations",
        "4",
        "--init",
        "random",
        "--quiet",
        "--trace",
        "OUT/t.jsonl",
        "--save-token",
        "OUT/t.st",
    ]);
}
