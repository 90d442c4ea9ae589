//! What a run does where something is in its way: bad images, other runs, signals, limits, flags that would do nothing.

use crate::common::command::{check_failure, fails, files, path, rarebit, succeeds, text};
use crate::common::golden::data_folder;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

fn start(args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rarebit"));
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn shell(script: &str) -> Output {
    let script = script.replace("RAREBIT", env!("CARGO_BIN_EXE_rarebit"));
    Command::new("bash").args(["-c", &script]).output().unwrap()
}

/// Waits until a folder has so many images.
#[track_caller]
fn wait_for_images(folder: &str, count: usize) {
    let started = Instant::now();
    let images = || files(Path::new(folder)).iter().filter(|name| name.ends_with(".png")).count();
    while !Path::new(folder).exists() || images() < count {
        assert!(started.elapsed().as_secs() < 120, "no image appeared");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Of four images the second is not finite: alone, in a batch with others, with tokens and a trace.
#[test]
fn one_bad_image_does_not_stop_the_others() {
    let inputs = TempDir::new().unwrap();
    let (noise, model) = (path(&inputs, "noise.safetensors"), data_folder("tiny-sd1").display().to_string());
    let value = |i: usize| if (256..512).contains(&i) { 3e38f32 } else { (i as f32 * 0.7).sin() };
    let values: Vec<u8> = (0..4 * 256).flat_map(|i| value(i).to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![4, 4, 8, 8], &values).unwrap();
    fs::write(&noise, safetensors::serialize([("noise", view)], None).unwrap()).unwrap();
    let minority = ["--iterations", "1", "--t-lo", "0.1", "--init", "random"];
    for (command, batch, flags) in [
        ("generate", "1", &[][..]),
        ("generate", "4", &[]),
        ("generate", "2", &["--cads"]),
        ("minority", "1", &minority),
    ] {
        let out = TempDir::new().unwrap();
        let (image, latents, token) = (path(&out, "i.png"), path(&out, "l.st"), path(&out, "t.st"));
        let args = [command, "a cat", "--model", &model, "--steps", "2", "--count", "4", "--batch", batch, "--quiet"];
        let to = ["--noise", &noise, "--out", &image, "--latents-out", &latents];
        let extras = if command == "minority" { vec!["--save-token", &token] } else { vec![] };
        let args = [&args[..], &to, flags, &extras].concat();
        let output = rarebit(&args);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert_eq!(text(&output.stdout).lines().count(), 3, "{args:?}");
        let expected = ["i-1.png: ", "--latents-out is not written", "1 of 4 images were not made"];
        assert!(
            said.lines().count() == 3 && said.lines().zip(expected).all(|(line, word)| line.contains(word)),
            "{said}"
        );
        let names = files(out.path());
        assert_eq!(names.iter().filter(|name| name.ends_with(".png")).count(), 3, "{names:?}");
        assert!(!names.contains(&"i-1.png".to_string()) && !names.contains(&"l.st".to_string()), "{names:?}");
        let tokens = if command == "minority" { vec!["t-i-0.st", "t-i-2.st", "t-i-3.st"] } else { vec![] };
        assert!(names.ends_with(&tokens.iter().map(|name| name.to_string()).collect::<Vec<_>>()), "{names:?}");
    }
    let out = TempDir::new().unwrap();
    let args = ["generate", "a cat", "--model", &model, "--steps", "2", "--count", "4", "--quiet", "--noise", &noise];
    let image = path(&out, "i.png");
    fails(&[&args[..], &["--strict", "--out", &image]].concat(), 1, &["sampling step 1 of"]);
    assert_eq!(files(out.path()), ["i-0.png"]);
}

/// Runs into one folder, made otherwise or not: what a run says it made is there, made by its settings.
#[test]
fn two_runs_into_one_folder() {
    for steps in [["9", "10"], ["10", "10"]] {
        let folder = TempDir::new().unwrap();
        let (prompts, images) = (path(&folder, "prompts.txt"), path(&folder, "images"));
        fs::write(&prompts, "a red star\n".repeat(6)).unwrap();
        let args = |steps| {
            ["generate", "--prompts", &prompts, "--steps", steps, "--quiet", "--threads", "1", "--out", &images]
        };
        let runs = steps.map(|steps| start(&args(steps)));
        let outputs = runs.map(|run| run.wait_with_output().unwrap());
        let mut failed = 0;
        for (steps, output) in steps.iter().zip(&outputs) {
            for image in text(&output.stdout).lines() {
                let shown = succeeds(&["inspect", image]);
                assert!(shown.contains(&format!("Steps: {steps},")), "{image} of {steps} steps: {shown}");
            }
            let said = text(&output.stderr);
            failed += said.lines().filter(|line| line.contains("it is kept")).count();
            let refused = said.contains("other settings");
            assert_eq!(output.status.success(), !refused, "{said}");
        }
        assert_eq!(files(Path::new(&images)).len(), 6);
        assert!(steps[0] != steps[1] || failed == 0);
    }
}

/// SIGTERM ends a run as Ctrl-C does; what the parent ignores is ignored.
#[test]
fn signals() {
    let folder = TempDir::new().unwrap();
    // As under nohup: then nobody can be sent it.
    let probe = Command::new("bash").args(["-c", "trap -p HUP"]).output().unwrap();
    let hup_is_ignored = !probe.stdout.is_empty();
    for (signal, ignored) in [("TERM", false), ("HUP", hup_is_ignored), ("INT", true), ("HUP", true), ("TERM", true)] {
        let images = path(&folder, &format!("{signal}-{ignored}"));
        let lines = if ignored { 8 } else { 60 };
        let list = path(&folder, &format!("{lines}.txt"));
        fs::write(&list, "a red star\n".repeat(lines)).unwrap();
        let trap = if ignored { format!("trap '' {signal};") } else { String::new() };
        let script = format!(
            "{trap} exec {} generate --prompts {list} --out {images} --steps 10 --quiet",
            env!("CARGO_BIN_EXE_rarebit")
        );
        let run =
            Command::new("bash").args(["-c", &script]).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        wait_for_images(&images, 1);
        Command::new("kill").args([&format!("-{signal}"), &run.id().to_string()]).status().unwrap();
        let output = run.wait_with_output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(if ignored { 0 } else { 1 }), "{signal} {ignored}: {said}");
        assert_eq!(said.contains("interrupted"), !ignored, "{signal} {ignored}: {said}");
        assert!(files(Path::new(&images)).iter().all(|name| name.ends_with(".png")));
    }
}

/// A process that may have less than the plan needs, or that is refused memory all the same, says so in a line.
#[cfg(target_os = "linux")]
#[test]
fn memory_that_is_not_given() {
    let folder = TempDir::new().unwrap();
    let out = path(&folder, "o.png");
    for command in [
        "generate a --steps 1",
        "minority a --iterations 1 --t-lo 0.1 --steps 4",
        "compare a --methods ddim --steps 1 --count 1",
        "bench --mode latency --steps 1",
    ] {
        let to = if command.starts_with("bench") { String::new() } else { format!("--out {out}") };
        let output = shell(&format!("ulimit -v 2000000; exec RAREBIT {command} --size 8192x8192 {to}"));
        check_failure(&output, 1, &["the plan needs", "ulimit -v"]);
        let output = shell(&format!("exec RAREBIT {command} --memory-limit 1M {to}"));
        check_failure(&output, 1, &["the plan needs", "--memory-limit is 1.0 MiB"]);
    }
    let compared =
        ["compare", "a", "--methods", "ddim", "--size", "2048x2048", "--count", "60", "--memory-limit", "2G"];
    fails(&[&compared[..], &["--out", &out]].concat(), 1, &["what the sheet shows", "--memory-limit"]);
    fails(&["inspect", "--plan", "--json", "--memory-limit", "1M"], 1, &["--memory-limit is 1.0 MiB"]);
    fails(&["generate", "a", "--size", "16384x16384", "--batch", "1000000", "--count", "1000000"], 1, &["--batch"]);
    let huge = ["generate", "a", "--count", "1000000", "--latents-out", &path(&folder, "l.st"), "--out", &out];
    fails(&[&huge[..], &["--memory-limit", "100M"]].concat(), 1, &["--latents-out"]);
    assert!(files(folder.path()).is_empty());
}

/// A million images cost no more than one before the first of them is made.
#[cfg(target_os = "linux")]
#[test]
fn a_million_images_take_no_memory() {
    let folder = TempDir::new().unwrap();
    let (prompts, images) = (path(&folder, "prompts.txt"), path(&folder, "images"));
    fs::write(&prompts, "a cat ".repeat(1000)).unwrap();
    let model = data_folder("tiny-sd1").display().to_string();
    let peak = |count: &str| {
        let out = format!("{images}-{count}");
        let args =
            ["generate", "--prompts", &prompts, "--count", count, "--model", &model, "--steps", "1", "--out", &out];
        let run = start(&[&args[..], &["--quiet", "--threads", "1"]].concat());
        wait_for_images(&out, 1);
        let status = fs::read_to_string(format!("/proc/{}/status", run.id())).unwrap_or_default();
        Command::new("kill").args(["-INT", &run.id().to_string()]).status().unwrap();
        run.wait_with_output().unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        peak.and_then(|peak| peak.split_whitespace().next()?.parse::<usize>().ok())
    };
    let (few, many) = (peak("300"), peak("1000000"));
    assert!(many.unwrap() < few.unwrap() + 8 * 1024, "{few:?} and {many:?} KiB");
}

/// Flags that change nothing are refused, or said in one line.
#[test]
fn flags_that_do_nothing() {
    let folder = TempDir::new().unwrap();
    let (out, prompt) = (path(&folder, "o.png"), "a red star on a dark blue background");
    let refused: [(&[&str], &[&str]); 12] = [
        (&["generate", "--cads-scale", "0.3"], &["--cads-scale", "without --cads"]),
        (&["generate", "--cads", "--sgms-ratio", "0.5"], &["--sgms-ratio", "without --sgms"]),
        (&["generate", "--by", "rarity"], &["--best-of"]),
        (&["generate", "--sampler", "euler", "--eta", "0.5"], &["--eta", "--sampler"]),
        (&["generate", "--trace", "t"], &["--trace"]),
        (&["minority", "--variable", "text", "--init", "word:a"], &["--init", "--variable token"]),
        (&["minority", "--variable", "null", "--tokens", "2"], &["--tokens", "--variable token"]),
        (&["minority", "--variable", "text", "--save-token", "t"], &["--save-token", "--variable token"]),
        (&["minority", "--objective", "repulsion", "--batch", "2", "--lambda", "1"], &["--lambda", "minority"]),
        (&["minority", "--pool-at", "eos"], &["--pool-at", "SDXL"]),
        (&["minority", "--compare", "c.png", "--trace", "t"], &["--compare", "--trace"]),
        (&["compare", "--methods", "ddim", "--lambda", "1"], &["--lambda", "minority"]),
    ];
    for (args, words) in refused {
        let to: &[&str] = if args.contains(&"--compare") { &[] } else { &["--out", &out] };
        fails(&[&args[..1], &[prompt], &args[1..], &["--steps", "1", "--quiet"], to].concat(), 2, words);
    }
    for (args, words) in [
        (&["inspect", "--steps", "4"][..], "--steps changes nothing without --plan"),
        (&["inspect", "--plan", "--seed", "4"], "--seed changes nothing in a plan"),
        (
            &["bench", "--runs", "1", "--warmup", "0", "--steps", "1", "--max-regress", "3"],
            "--max-regress changes nothing",
        ),
        (&["bench", "--runs", "1", "--warmup", "0", "--steps", "1", "--negative", "a"], "--negative changes nothing"),
    ] {
        let output = rarebit(args);
        let said = text(&output.stderr);
        assert!(output.status.success() && said.lines().count() == 1 && said.contains(words), "{args:?}: {said}");
    }
    let said: [(&[&str], &str); 7] = [
        (&["generate", "--overwrite"], "--overwrite: without --prompts"),
        (&["generate", "--batch", "3"], "--batch 3: there are only 1 images"),
        (&["generate", "--guidance", "1", "--negative", "a ring"], "--negative: --guidance 1"),
        (&["generate", "--cads", "--guidance", "1", "--cads-negative"], "--cads-negative"),
        (&["minority", "--iterations", "0"], "nothing is optimised"),
        (&["minority", "--t-lo", "1"], "nothing is optimised"),
        (&["minority", "--explain"], "--out: --explain makes no image"),
    ];
    for (args, words) in said {
        let output =
            rarebit(&[&args[..1], &[prompt], &args[1..], &["--steps", "2", "--quiet", "--out", &out]].concat());
        let said = text(&output.stderr);
        assert!(output.status.success() && said.lines().count() == 1 && said.contains(words), "{args:?}: {said}");
    }
    assert_eq!(files(folder.path()), ["o.png"]);
}
