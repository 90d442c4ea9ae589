//! `rarebit bench` as a user meets it: what the report holds, and what comes of a baseline.

use crate::common::command::{fails, path, rarebit, succeeds, text};
use crate::common::golden::data_folder;
use serde_json::Value;
use std::fs;
use tempfile::TempDir;

const FAST: [&str; 7] = ["bench", "--steps", "4", "--runs", "2", "--warmup", "1"];

fn report(out: &TempDir, flags: &[&str]) -> Value {
    let file = path(out, "bench.json");
    succeeds(&[&FAST[..], flags, &["--out", &file]].concat());
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

/// Name, calls and median of every stage of a case.
fn stages(case: &Value) -> Vec<(String, u64, f64)> {
    let stage = |row: &Value| {
        let name = row["name"].as_str().unwrap().to_string();
        (name, row["calls"].as_u64().unwrap(), row["latency_ms"]["p50"].as_f64().unwrap())
    };
    case["stages"].as_array().unwrap().iter().map(stage).collect()
}

#[test]
fn an_image_and_its_stages() {
    let out = TempDir::new().unwrap();
    let report = report(&out, &["--mode", "latency,throughput", "--batch", "2"]);
    assert_eq!(report["case"]["model"], "shapes");
    let cases = report["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 2);
    let case = &cases[0];
    let found = stages(case);
    let calls: Vec<(&str, u64)> = found.iter().map(|(name, calls, _)| (name.as_str(), *calls)).collect();
    assert_eq!(calls, [("text encode", 2), ("condition", 1), ("unet step", 4), ("vae decode", 2)]);
    assert!(found.iter().all(|(_, _, ms)| *ms > 0.0));
    let total = &case["total"];
    assert_eq!(total["raw_ms"].as_array().unwrap().len(), 2);
    // Two guided images of the embedded model: each step and decoding are the same programs that `inspect --plan` counts.
    let flops = |row: &Value| row["calls"].as_u64().unwrap() * row["flops"].as_u64().unwrap();
    assert_eq!(total["flops"].as_u64().unwrap(), case["stages"].as_array().unwrap().iter().map(flops).sum::<u64>());
    let per_second = case["images_per_s"].as_f64().unwrap();
    let mean = total["latency_ms"]["mean"].as_f64().unwrap();
    assert!((per_second * mean / 2000.0 - 1.0).abs() < 0.05, "{per_second} images/s, {mean} ms");
    assert_eq!(case["determinism"], cases[1]["determinism"], "the same images");
    assert!(case["open_s"].as_f64().unwrap() > 0.0);
    let unknown = [&case["energy"]["avg_w"], &case["host_us_per_step"], &report["gpu"]];
    assert!(unknown.iter().all(|value| value.is_null()), "nothing is made up");
}

#[test]
fn passes_ops_and_methods() {
    let out = TempDir::new().unwrap();
    let report = report(&out, &["--mode", "grad,kernels,methods"]);
    let [grad, ops, methods] = &report["cases"].as_array().unwrap()[..] else { panic!("three cases") };
    let [forward, to_text, to_latents] = &stages(grad)[..] else { panic!("three passes") };
    assert!(to_text.2 > forward.2 && to_latents.2 > forward.2);
    let arena = |row: usize| grad["stages"][row]["arena"].as_u64().unwrap();
    assert!(arena(1) > arena(0) && arena(2) > arena(0), "activations are kept");
    // All ops of a step are there: their operations are the step's.
    let flops = |row: &Value| row["calls"].as_u64().unwrap() * row["flops"].as_u64().unwrap();
    let plan: Value = serde_json::from_str(&succeeds(&["inspect", "--plan", "--json", "--steps", "4"])).unwrap();
    let step = plan["plan"]["programs"].as_array().unwrap().iter().find(|line| line["program"] == "step").unwrap();
    let sum: u64 = ops["stages"].as_array().unwrap().iter().map(flops).sum();
    assert_eq!(sum, 2 * step["macs"].as_u64().unwrap());
    let times: Vec<f64> = ops["stages"].as_array().unwrap().iter().map(|row| row["share"].as_f64().unwrap()).collect();
    assert!(times.is_sorted_by(|a, b| a >= b), "the heaviest first");
    assert_eq!(methods["backward"].as_u64().unwrap(), 2 * methods["iterations"].as_u64().unwrap());
    assert!(methods["found_over_predicted"].as_f64().unwrap() > 0.3);
}

#[test]
fn a_baseline_is_kept_or_missed() {
    let out = TempDir::new().unwrap();
    let mut report = report(&out, &[]);
    let (kept, missed) = (path(&out, "kept.json"), path(&out, "missed.json"));
    let set = |report: &mut Value, ms: f64| report["cases"][0]["total"]["latency_ms"]["p50"] = ms.into();
    report["cases"][0]["stages"] = Value::Array(vec![]);
    set(&mut report, 1e9);
    fs::write(&kept, report.to_string()).unwrap();
    set(&mut report, 1e-6);
    fs::write(&missed, report.to_string()).unwrap();
    let table = succeeds(&[&FAST[..], &["--baseline", &kept]].concat());
    assert!(table.contains("unet step") && table.contains("images/s"), "{table}");
    let output = rarebit(&[&FAST[..], &["--json", "--baseline", &missed]].concat());
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("images of batch 1: image: ") && stderr.contains("baseline"), "{stderr}");
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed["schema"], 1);
}

#[test]
fn mistakes_are_one_line() {
    let out = TempDir::new().unwrap();
    let broken = path(&out, "broken.json");
    fs::write(&broken, "{}").unwrap();
    fails(&["bench", "--baseline", &broken], 1, &["broken.json", "schema"]);
    fails(&["bench", "--baseline", &path(&out, "none.json")], 1, &["none.json"]);
    fails(&["bench", "--mode", "speed"], 2, &["speed"]);
    fails(&["bench", "--runs", "0"], 2, &["--runs"]);
    fails(&["bench", "--memory-limit", "1K"], 1, &["--memory-limit"]);
}

#[test]
fn another_measurement_is_no_baseline() {
    let out = TempDir::new().unwrap();
    let (file, other) = (path(&out, "bench.json"), path(&out, "other.json"));
    let report = report(&out, &[]);
    let refused = |flags: &[&str], words: &[&str]| {
        fails(&[&FAST[..], &["--baseline"], flags].concat(), 2, &[&["--baseline"], words].concat());
    };
    refused(&[&file, "--mode", "grad"], &["has no times of 'UNet passes of batch 1'"]);
    refused(&[&file, "--batch", "2"], &["has no times of 'images of batch 2'"]);
    refused(&[&file, "--size", "64x128"], &["another height"]);
    refused(&[&file, "--threads", "77"], &["another --threads"]);
    refused(&[&file, "--sampler", "euler"], &["another --sampler"]);
    refused(&[&file, "--guidance", "1"], &["another --guidance"]);
    refused(&[&file, "--dtype", "f64"], &["another --dtype"]);
    let model = data_folder("tiny-sdxl").display().to_string();
    refused(&[&file, "--model", &model], &["another model", "tiny-sdxl"]);
    // The same name with other weights.
    let mut edited = report.clone();
    edited["case"]["model_hash"] = "0123456789abcdef".into();
    fs::write(&other, edited.to_string()).unwrap();
    refused(&[&other], &["another weights"]);
    for (text, words) in [
        (r#"{"schema": 2}"#, "schema 2"),
        (r#"{"schema": 1}"#, "another model"),
        (&report.to_string().replace("\"schema\":1", "\"schema\":0"), "schema 0"),
    ] {
        fs::write(&other, text).unwrap();
        refused(&[&other], &[words]);
    }
    edited = report.clone();
    edited["cases"][0]["total"]["latency_ms"]["p50"] = "NaN".into();
    fs::write(&other, edited.to_string()).unwrap();
    refused(&[&other], &["a median of NaN ms"]);
    // What only this run has is told.
    let output = rarebit(&[&FAST[..], &["--baseline", &file, "--batch", "1,2", "--max-regress", "10000"]].concat());
    assert!(output.status.success() && text(&output.stderr).contains("does not have 'images of batch 2'"));
}

#[test]
fn what_cannot_be_written_or_held_is_refused_before_measuring() {
    let out = TempDir::new().unwrap();
    let started = std::time::Instant::now();
    let slow = ["bench", "--runs", "1000000", "--out"];
    fails(&[&slow[..], &[&path(&out, "none/b.json")]].concat(), 1, &["none"]);
    fails(&[&slow[..], &[&out.path().display().to_string()]].concat(), 2, &["is a folder"]);
    for flags in [&["--memory-limit", "1M"][..], &["--batch", "1000000"]] {
        for mode in ["grad", "kernels", "latency"] {
            fails(&[&["bench", "--runs", "1000000", "--mode", mode], flags].concat(), 1, &["the plan needs"]);
        }
    }
    assert!(started.elapsed().as_secs() < 60);
}
