//! `rarebit seed` as a user meets it: references to an image, its trace and its noise, images between noises, one line for every mistake.

use crate::common::command::{fails, files, path, rarebit, succeeds, text};
use crate::common::golden::data_folder;
use crate::common::sheet::{lines, named, pixels};
use crate::methods::record;
use serde_json::Value;
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

const PROMPT: &str = "a red star on a dark blue background";

/// Two iterations of four steps, from the better of two noises.
const FAST: [&str; 7] = ["--steps", "4", "--iterations", "2", "--starts", "2", "--quiet"];

/// A folder of three plain images.
fn references(out: &TempDir) -> String {
    let folder = path(out, "references");
    fs::create_dir(&folder).unwrap();
    succeeds(&["generate", PROMPT, "--steps", "4", "--seed", "50", "--count", "3", "--out", &folder, "--quiet"]);
    folder
}

#[test]
fn an_image_like_its_references() {
    let out = TempDir::new().unwrap();
    let references = references(&out);
    let (image, trace, noise) = (path(&out, "i.png"), path(&out, "t.jsonl"), path(&out, "n.safetensors"));
    let own = ["--references", &references, "--out", &image];
    let seen = ["--appearance", "1", "--trace", &trace, "--save-noise", &noise];
    let all = [&["seed", PROMPT][..], &own, &FAST, &seen].concat();
    assert_eq!(succeeds(&all).trim(), image);
    let found: Vec<Value> =
        fs::read_to_string(&trace).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(found.len(), 2);
    for (index, line) in found.iter().enumerate() {
        assert_eq!((&line["iteration"], &line["seeds"]), (&index.into(), &serde_json::json!([0])));
        let of = |name: &str| line["terms"][name][0].as_f64().unwrap();
        let states = 0.05 * of("semantics.2") + 0.25 * of("semantics.3") + 0.7 * of("semantics.4");
        let loss = line["score"][0].as_f64().unwrap();
        assert!((loss - 10.0 * states - of("appearance")).abs() < 1e-5 * loss, "{line}");
        // Numbers of a noise: 1024, whose likeliest length is 32.
        assert!((25.0..40.0).contains(&of("norm")), "{line}");
    }
    let first = pixels(&image);
    // The same noise makes the same image, and so do the same flags; what is recorded tells references apart.
    let again = path(&out, "again.png");
    succeeds(&["generate", PROMPT, "--steps", "4", "--noise", &noise, "--quiet", "--out", &again]);
    assert_eq!(pixels(&again), first);
    let kept = fs::read(&image).unwrap();
    succeeds(&all);
    assert_eq!(fs::read(&image).unwrap(), kept);
    fs::remove_file(fs::read_dir(&references).unwrap().next().unwrap().unwrap().path()).unwrap();
    succeeds(&[&["seed", PROMPT][..], &own, &FAST].concat());
    assert_ne!(fs::read(&image).unwrap(), kept);
    let told = succeeds(&["inspect", &image]);
    assert!(told.contains("seed") && told.contains("references"), "{told}");
}

#[test]
fn prompt_files_resume() {
    let out = TempDir::new().unwrap();
    let (references, prompts, images) = (references(&out), path(&out, "prompts.txt"), path(&out, "images"));
    fs::write(&prompts, "a red star\na blue ring\n").unwrap();
    let trace = path(&out, "t.jsonl");
    let own = ["--references", &references, "--out", &images, "--trace", &trace, "--save-noise", &path(&out, "n.st")];
    let args = [&["seed", "--prompts", &prompts][..], &own, &FAST].concat();
    assert_eq!(succeeds(&args).lines().count(), 2);
    assert_eq!(succeeds(&args), "");
    let written = [path(&out, "n-00001-0.st"), path(&out, "n-00002-0.st")];
    fs::remove_file(&written[1]).unwrap();
    assert_eq!(succeeds(&args).lines().count(), 1, "a noise that is gone is made again");
    assert!(written.iter().all(|file| fs::metadata(file).is_ok()));
}

#[test]
fn starts_among_inverted_references() {
    let out = TempDir::new().unwrap();
    let (references, images, sheet) = (references(&out), path(&out, "images"), path(&out, "sheet.png"));
    fs::create_dir(&images).unwrap();
    let nao = ["--start", "nao", "--inversion-steps", "3", "--references", &references];
    succeeds(&[&["seed", PROMPT, "--count", "2", "--out", &images][..], &nao, &FAST].concat());
    let image = |seed: usize| format!("{images}/image-{seed}.png");
    assert_ne!(pixels(&image(0)), pixels(&image(1)));
    let found = record(&image(1));
    assert_eq!(found["options"]["start"], serde_json::json!({"from": "nao", "inversion_steps": 3}));
    // Every way to make the noises; what inverting them costs is shared by the images of a comparison.
    let methods = ["--methods", "seed,nao", "--references", &references, "--inversion-steps", "3"];
    let flags = ["--seed-iterations", "1", "--steps", "2", "--count", "2", "--quiet", "--json", "--out", &sheet];
    let events = lines(&succeeds(&[&["compare", PROMPT][..], &methods, &flags].concat()));
    let methods = named(&events, "method");
    let forwards: Vec<f64> = methods.iter().map(|event| event["per_image"]["forwards"].as_f64().unwrap()).collect();
    assert_eq!(forwards[1] - forwards[0], 3.0 * 3.0 / 2.0, "{methods:?}");
    assert_eq!(methods[1]["name"], "SeedSelect from NAO");

    let seed = ["seed", PROMPT, "--steps", "2", "--quiet", "--out", &sheet, "--start", "lol"];
    let one = format!("{references}/image-50.png");
    fails(&[&seed[..], &["--references", &one]].concat(), 2, &["--start lol", "two"]);
    fails(&[&seed[..], &["--references", &references, "--noise", "x"]].concat(), 2, &["--noise", "--start"]);
}

/// Killed at any iteration and gone on with: image, noise and trace are those of a run in one piece, and nothing else is left.
#[test]
fn a_run_that_is_cut_short_goes_on() {
    let out = TempDir::new().unwrap();
    let references = references(&out);
    let args = |folder: &str| in_folder(&references, folder, &["--iterations", "5", "--count", "2", "--lr", "0.02"]);
    // In the first image, at its end, in the second.
    goes_on(&out, &[1, 3, 5, 5, 6, 10, 10], &args);

    // What was kept of a run with other settings is not gone on with.
    let other = folder(&out, "other");
    let mut child =
        Command::new(env!("CARGO_BIN_EXE_rarebit")).args(args(&other)).stdout(Stdio::null()).spawn().unwrap();
    while !files(other.as_ref()).iter().any(|name| name.ends_with(".state")) {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let others = [args(&other), vec!["--resume".into(), "--norm-prior".into(), "0.1".into()]].concat();
    fails(&others.iter().map(String::as_str).collect::<Vec<_>>(), 2, &["--resume", "other settings"]);
}

/// The same where all images share a noise: in it, at its end, in the images' own iterations.
#[test]
fn a_bootstrapped_run_that_is_cut_short_goes_on() {
    let out = TempDir::new().unwrap();
    let references = references(&out);
    let own = ["--iterations", "3", "--bootstrap", "2", "--count", "3", "--lr", "0.02", "--starts", "1"];
    goes_on(&out, &[1, 3, 4, 5, 6, 8, 9], &|folder: &str| in_folder(&references, folder, &own));
}

fn folder(out: &TempDir, name: &str) -> String {
    fs::create_dir(path(out, name)).unwrap();
    path(out, name)
}

/// A run with all its files in a folder.
fn in_folder(references: &str, folder: &str, own: &[&str]) -> Vec<String> {
    let files = [("--out", ""), ("--trace", "/t.jsonl"), ("--save-noise", "/n.st")];
    let files = files.iter().flat_map(|(flag, file)| [flag.to_string(), format!("{folder}{file}")]);
    let all = ["seed", PROMPT, "--references", references, "--steps", "4", "--patience", "none", "--quiet"];
    all.iter().chain(own).map(|arg| arg.to_string()).chain(files).collect()
}

/// Kills the run of `args` in a folder as its trace has so many lines, again and again, and holds what it leaves against a run in one
/// piece.
#[track_caller]
fn goes_on(out: &TempDir, kills: &[usize], args: &dyn Fn(&str) -> Vec<String>) {
    let run = |args: &[String]| succeeds(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let content = |folder: &str| -> Vec<(String, Vec<u8>)> {
        let named = |name: String| (name.clone(), fs::read(format!("{folder}/{name}")).unwrap());
        files(folder.as_ref()).into_iter().map(named).collect()
    };
    let whole = folder(out, "whole");
    run(&args(&whole));
    let expected = content(&whole);
    assert!(expected.len() >= 5, "{:?}", files(whole.as_ref()));

    let cut = folder(out, "cut");
    let again = [args(&cut), vec!["--resume".into()]].concat();
    for lines in kills {
        let mut child = Command::new(env!("CARGO_BIN_EXE_rarebit")).args(&again).stdout(Stdio::null()).spawn().unwrap();
        let traced =
            || fs::read(format!("{cut}/t.jsonl")).map_or(0, |text| text.iter().filter(|x| **x == b'\n').count());
        while traced() < *lines && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = child.kill();
        child.wait().unwrap();
    }
    run(&again);
    let found = content(&cut);
    assert_eq!(files(cut.as_ref()), files(whole.as_ref()));
    for ((name, found), (_, expected)) in found.iter().zip(&expected) {
        assert!(found == expected, "{name} differs from that of a run in one piece");
    }
}

/// Every image of one optimisation is another, and says which references it was made towards.
#[test]
fn many_images_of_one_optimisation() {
    let out = TempDir::new().unwrap();
    let (references, images) = (references(&out), folder(&out, "images"));
    let args = ["seed", PROMPT, "--references", &references, "--out", &images, "--count", "3", "--bootstrap", "1"];
    succeeds(&[&args[..], &FAST].concat());
    let image = |seed: usize| format!("{images}/image-{seed}.png");
    for seed in 0..3 {
        let found = record(&image(seed))["options"]["bootstrap"].clone();
        assert_eq!((&found["iterations"], &found["seed"]), (&1.into(), &0.into()));
        let names: Vec<&str> = found["subset"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
        let indices = rarebit::methods::seedselect::subset(seed as u64, 3);
        assert_eq!(names, indices.iter().map(|index| format!("image-{}.png", 50 + index)).collect::<Vec<_>>());
        assert!((0..seed).all(|other| pixels(&image(other)) != pixels(&image(seed))));
    }
    let one = format!("{references}/image-50.png");
    let args = ["seed", PROMPT, "--references", &one, "--out", &image(0), "--bootstrap", "1"];
    let output = rarebit(&[&args[..], &FAST].concat());
    let said = text(&output.stderr);
    assert!(output.status.success() && said.contains("every image's subset"), "{said}");
    fails(&[&args[..], &["--noise", "x"]].concat(), 2, &["--noise", "--bootstrap"]);
}

/// Towards the references and away from other classes.
#[test]
fn contrasts_to_other_classes() {
    let out = TempDir::new().unwrap();
    let (references, others) = (references(&out), folder(&out, "others"));
    succeeds(&["generate", "a blue ring", "--steps", "4", "--out", &format!("{others}/ring.png"), "--quiet"]);
    let (image, trace) = (path(&out, "i.png"), path(&out, "t.jsonl"));
    let seed = [&["seed", PROMPT, "--references", &references, "--out", &image][..], &FAST].concat();
    let other = ["--other", &others, "--other", &format!("{others}/ring.png")];
    succeeds(&[&seed[..], &other, &["--contrast", "2", "--trace", &trace]].concat());
    let lines = lines(&fs::read_to_string(&trace).unwrap());
    assert!(lines.len() == 2 && lines.iter().all(|line| line["terms"]["contrast.4"][0].as_f64() > Some(0.0)));
    let contrast = &record(&image)["options"]["contrast"];
    assert_eq!((&contrast["weight"], contrast["others"].as_array().map(Vec::len)), (&2.0.into(), Some(2)));
    fails(&[&seed[..], &["--contrast", "2"]].concat(), 2, &["--contrast", "--other"]);
    fails(&[&seed[..], &["--other", &others]].concat(), 2, &["--contrast", "--other"]);
    fails(&[&seed[..], &["--other", "nowhere", "--contrast", "2"]].concat(), 1, &["nowhere"]);
}

/// A broken reference is named and the others are used; with --strict it ends the run.
#[test]
fn broken_references_are_named() {
    let out = TempDir::new().unwrap();
    let references = references(&out);
    fs::write(format!("{references}/broken.png"), b"<html>not found</html>").unwrap();
    fs::write(format!("{references}/notes.txt"), b"no image").unwrap();
    let image = path(&out, "i.png");
    let args = [&["seed", PROMPT, "--references", &references, "--out", &image][..], &FAST].concat();
    let output = rarebit(&args);
    let said = text(&output.stderr);
    assert!(output.status.success() && said.contains("broken.png") && said.contains("left out"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    fs::remove_file(&image).unwrap();
    fails(&[&args[..], &["--strict"]].concat(), 1, &["broken.png"]);
    assert!(fs::metadata(&image).is_err());
}

/// Who judges stands in every line of the trace, and decides nothing.
#[test]
fn a_judge_is_held_out() {
    let out = TempDir::new().unwrap();
    let references = references(&out);
    let [image, trace] = ["i.png", "t.jsonl"].map(|name| path(&out, name));
    let args = [&["seed", PROMPT, "--references", &references, "--out", &image, "--trace", &trace][..], &FAST].concat();
    succeeds(&args);
    let plain = fs::read(&image).unwrap();
    for judge in ["shapes", &data_folder("tiny-clip-h").display().to_string()] {
        succeeds(&[&args[..], &["--judge", judge]].concat());
        assert!(fs::read(&image).unwrap() == plain, "{judge}");
        for line in fs::read_to_string(&trace).unwrap().lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            let score = line["terms"]["held_out"][0].as_f64().unwrap();
            assert!((-1.0..=1.0).contains(&score) && line["terms"]["log_density"][0].as_f64() < Some(0.0), "{line}");
        }
    }
    let same = data_folder("tiny-clip-h").display().to_string();
    let said = text(&rarebit(&[&args[..], &["--judge", &same, "--clip", &same]].concat()).stderr);
    assert!(said.contains("--judge") && said.contains("no judgement"), "{said}");
    let refused = |flags: &[&str], code: i32, words: &[&str]| fails(&[&args[..], flags].concat(), code, words);
    refused(&["--judge", "nowhere"], 1, &["nowhere"]);
    refused(&["--judge", "shapes", "--size", "32x32"], 2, &["`shapes` world", "64x64"]);
    let other = ["seed", "a lighthouse", "--references", &references, "--out", &image, "--judge", "shapes"];
    fails(&other, 2, &["--judge", "--trace"]);
    fails(&[&other[..], &["--trace", &trace]].concat(), 2, &["--judge shapes", "a lighthouse"]);
}

/// A preview is there while the image is not, whole, and is no finished image; it changes nothing.
#[test]
fn a_preview_is_there_until_the_image_is() {
    let out = TempDir::new().unwrap();
    let references = references(&out);
    let [image, preview] = ["i.png", "i.preview.png"].map(|name| path(&out, name));
    let own = ["--steps", "4", "--iterations", "12", "--patience", "none", "--lr", "0.02", "--quiet"];
    let args = [&["seed", PROMPT, "--references", &references, "--out", &image][..], &own].concat();
    succeeds(&args);
    let expected = fs::read(&image).unwrap();
    fs::remove_file(&image).unwrap();
    let shown = [&args[..], &["--preview", "1", "--resume"]].concat();
    let mut child = Command::new(env!("CARGO_BIN_EXE_rarebit")).args(&shown).stdout(Stdio::null()).spawn().unwrap();
    while fs::metadata(&preview).is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(pixels(&preview).0, 64);
    succeeds(&shown);
    assert!(fs::read(&image).unwrap() == expected);
    assert_eq!(files(out.path()), ["i.png", "references"]);
    fails(&[&args[..], &["--preview", "0"]].concat(), 2, &["--preview"]);
    fails(&[&args[..], &["--trace", &preview, "--preview", "2"]].concat(), 2, &["--preview", "--trace"]);
    let said = text(&rarebit(&[&args[..], &["--preview", "13"]].concat()).stderr);
    assert!(said.contains("--preview 13") && said.contains("12 iterations"), "{said}");
}

/// What is made of references is read again, whatever happened to it meanwhile.
#[test]
fn references_are_read_once() {
    let out = TempDir::new().unwrap();
    let references = references(&out);
    let [image, cache] = ["i.png", "cache"].map(|name| path(&out, name));
    let own = ["--references", &references, "--appearance", "1", "--out", &image];
    let args = [&["seed", PROMPT][..], &own, &FAST].concat();
    succeeds(&args);
    let expected = fs::read(&image).unwrap();
    let kept = [&args[..], &["--cache", &cache]].concat();
    let rows = || -> Vec<(String, Vec<u8>)> {
        let named = |name: String| (name.clone(), fs::read(format!("{cache}/{name}")).unwrap());
        files(cache.as_ref()).into_iter().map(named).collect()
    };
    succeeds(&kept);
    let first = rows();
    assert!(first.len() == 6 && fs::read(&image).unwrap() == expected);
    for kept_bytes in [0, 20] {
        for (name, bytes) in &first[..2] {
            fs::write(format!("{cache}/{name}"), &bytes[..kept_bytes]).unwrap();
        }
        succeeds(&kept);
        assert!(rows() == first && fs::read(&image).unwrap() == expected);
    }
    let file = format!("{references}/image-50.png");
    succeeds(&["generate", PROMPT, "--steps", "4", "--seed", "60", "--out", &file, "--quiet"]);
    succeeds(&kept);
    assert!(rows().len() == 8 && fs::read(&image).unwrap() != expected);
    fails(&[&args[..], &["--cache", &file]].concat(), 1, &["image-50.png"]);
}

/// Time by stage, counted UNet calls, every iteration, and what as many seeds as cost the same would have found.
#[test]
fn a_report_of_a_run() {
    let out = TempDir::new().unwrap();
    let references = references(&out);
    let [image, file] = ["i.png", "r.json"].map(|name| path(&out, name));
    let often = ["--steps", "4", "--iterations", "1", "--starts", "1", "--lr", "0", "--quiet", "--judge", "shapes"];
    let own = [&often[..], &["--appearance", "1"]].concat();
    let args = [&["seed", PROMPT, "--references", &references, "--out", &image][..], &own].concat();
    succeeds(&[&args[..], &["--report", &file, "--equal-compute"]].concat());
    let report: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    // Two branches of four steps: an iteration there, again and back; the last noise; the image.
    let calls = &report["unet_calls"];
    assert_eq!((&calls["forwards"], &calls["backwards"]), (&32.into(), &8.into()), "{report}");
    let seconds = |stage: &str| report["stages"][stage]["seconds"].as_f64().unwrap();
    let stages = [
        "unet_forward",
        "unet_recompute_and_backward",
        "decoder_and_clip",
        "decode",
        "optimizer",
        "references",
        "other",
    ];
    let sum: f64 = stages.iter().map(|stage| seconds(stage)).sum();
    let total = report["seconds"].as_f64().unwrap() + report["load_seconds"].as_f64().unwrap();
    assert!(stages.iter().all(|stage| seconds(stage) > 0.0) && sum <= total, "{sum} of {total}: {report}");
    assert!(report["planned_bytes"].as_u64() > Some(1 << 20) && report["peak_bytes"].as_u64() > Some(1 << 20));
    let line = &report["images"][0]["iterations"][0]["terms"];
    let of = |name: &str| line[name].as_f64().unwrap();
    assert!(of("norm") > 0.0 && of("held_out") <= 1.0);
    let equal = &report["equal_compute"];
    // An image is 8 forwards; a backward counts as two.
    assert_eq!((&equal["n"], &equal["forwards_per_image"]), (&6.into(), &48.into()), "{equal}");
    let loss = |arm: &str| equal["images"][0][arm]["loss"].as_f64().unwrap();
    let own = 10.0 * of("semantics.4") + of("appearance");
    assert!((loss("optimised") - own).abs() < 1e-5 * own, "{} and {own}", loss("optimised"));
    assert!(equal["mean_loss"]["best_of"].as_f64() == Some(loss("best_of")));
    fails(&[&args[..], &["--equal-compute", "--trace", &file]].concat(), 2, &["--equal-compute", "--report"]);
    let contrast = ["--equal-compute", "--report", &file, "--other", &references, "--contrast", "1"];
    fails(&[&args[..], &contrast].concat(), 2, &["--equal-compute", "--contrast"]);
    // Three references in two calls each, without guidance, and that much more by count.
    succeeds(&[&args[..], &["--start", "nao", "--inversion-steps", "2", "--report", &file]].concat());
    let report: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(report["unet_calls"]["forwards"], 32 + 3 * 2);
    fails(&[&args[..], &["--report", &image]].concat(), 2, &["--report", "--out"]);
}

/// A step into nowhere is said, and what was best before is made.
#[test]
fn what_was_best_before_is_kept() {
    let out = TempDir::new().unwrap();
    let references = references(&out);
    let [image, plain] = ["i.png", "plain.png"].map(|name| path(&out, name));
    let far = ["--steps", "4", "--iterations", "3", "--starts", "1", "--quiet", "--lr", "1e30", "--seed", "7"];
    let own = [&far[..], &["--appearance", "1"]].concat();
    let args = [&["seed", PROMPT, "--references", &references, "--out", &image][..], &own].concat();
    let output = rarebit(&args);
    let said = text(&output.stderr);
    assert!(output.status.success() && said.contains("seed 7") && said.contains("not finite after 1"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    succeeds(&["generate", PROMPT, "--steps", "4", "--quiet", "--seed", "7", "--out", &plain]);
    assert_eq!(pixels(&image), pixels(&plain));
    fails(&[&args[..], &["--guidance", "1e38"]].concat(), 1, &["NaN"]);
}

#[test]
fn images_between_two_noises() {
    let out = TempDir::new().unwrap();
    let frames = path(&out, "frames");
    fs::create_dir(&frames).unwrap();
    let args = ["seed", PROMPT, "--steps", "4", "--quiet", "--out", &frames, "--frames", "3", "--interpolate", "5"];
    succeeds(&[&args[..], &["9"]].concat());
    assert_eq!(files(frames.as_ref()), ["image-0.png", "image-1.png", "image-2.png"]);
    let frame = |index: usize| pixels(&format!("{frames}/image-{index}.png"));
    let plain = |seed: &str| {
        let image = path(&out, "plain.png");
        succeeds(&["generate", PROMPT, "--steps", "4", "--quiet", "--seed", seed, "--out", &image]);
        pixels(&image)
    };
    assert!(frame(0) == plain("5") && frame(2) == plain("9") && frame(1) != frame(0) && frame(1) != frame(2));
    let nao = frame(1);
    succeeds(&[&args[..], &["9", "--along", "lerp"]].concat());
    assert!(frame(1) != nao && frame(0) == plain("5"));
    for (flags, words) in [
        (&["--interpolate", "1", "2", "--count", "3"][..], ["--count", "--frames"]),
        (&["--interpolate", "1", "2", "--references", "x"], ["--references", "--interpolate"]),
        (&["--interpolate", "1", "2", "--save-noise", "x"], ["--save-noise", "--interpolate"]),
        (&["--references", "x", "--frames", "3"], ["--frames", "--interpolate"]),
        (&["--interpolate", "1", "2", "--frames", "1"], ["--frames", "2.."]),
        (&["--interpolate", "1"], ["--interpolate", "2 values"]),
    ] {
        fails(&[&["seed", PROMPT], flags].concat(), 2, &words);
    }
    fails(&["seed", PROMPT, "--interpolate", "1", "no-such-file"], 1, &["no-such-file"]);
}

/// What searches choose by the same references, at the cost of what SeedSelect takes.
#[test]
fn searches_by_the_same_references() {
    let out = TempDir::new().unwrap();
    let (references, sheet) = (references(&out), path(&out, "sheet.png"));
    let methods = ["--methods", "ddim,best-of,evolution,seed", "--references", &references, "--candidates", "5"];
    let flags = ["--seed-iterations", "1", "--steps", "4", "--count", "1", "--quiet", "--json", "--out", &sheet];
    let events = lines(&succeeds(&[&["compare", PROMPT][..], &methods, &flags].concat()));
    let methods = named(&events, "method");
    assert_eq!(methods.len(), 4);
    for event in &methods[1..3] {
        assert!(event["options"]["by"]["references"].is_string(), "{event}");
        assert_eq!(event["per_image"]["forwards"], 40.0, "five candidates of four steps of two branches");
    }
    assert!(methods[3]["per_image"]["backwards"].as_f64() > Some(0.0));

    let image = path(&out, "i.png");
    let generate = ["generate", PROMPT, "--steps", "4", "--quiet", "--out", &image, "--best-of", "2"];
    succeeds(&[&generate[..], &["--references", &references]].concat());
    fails(&[&generate[..], &["--references", &references, "--by", "agreement"]].concat(), 2, &["--references", "--by"]);
    fails(&[&generate[..], &["--by", "references"]].concat(), 2, &["--references"]);
    fails(&["compare", PROMPT, "--methods", "seed", "--out", &sheet], 2, &["--methods seed", "--references"]);
}

#[test]
fn mistakes() {
    let out = TempDir::new().unwrap();
    let references = references(&out);
    let empty = path(&out, "empty");
    fs::create_dir(&empty).unwrap();
    let seed = ["seed", PROMPT, "--steps", "2", "--quiet", "--out", &path(&out, "i.png"), "--references"];
    let refused = |flags: &[&str], code: i32, words: &[&str]| fails(&[&seed[..], flags].concat(), code, words);
    refused(&[&empty], 1, &["empty", "no PNG"]);
    refused(&["nowhere"], 1, &["nowhere"]);
    refused(&[&references, "--semantics", "0", "--appearance", "0"], 2, &["semantics", "appearance"]);
    refused(&[&references, "--clip", "nowhere"], 1, &["nowhere"]);
    refused(&[&references, "--memory-limit", "1MiB"], 1, &["--memory-limit"]);
    refused(&[&references, "--clip-norm", "0.1", "--batch", "2", "--count", "2"], 2, &["--batch 1"]);
    refused(&[&references, "--patience", "often"], 2, &["--patience", "none"]);
    refused(&[&references, "--trace", &path(&out, "i.png")], 2, &["--trace", "--out"]);
    fails(&["seed", PROMPT], 2, &["--references"]);
}
