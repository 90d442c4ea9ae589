//! What comes from files reaches the terminal as text, in lines of bounded length.

use crate::common::command::{path, rarebit, text};
use crate::common::layouts::copy_of;
use std::fs;
use std::process::Output;
use tempfile::TempDir;

/// A window title, a colour, an 8-bit control, an override of the reading order, a line separator.
const HOSTILE: &str = "\u{1b}]0;owned\u{7}\u{1b}[31m\u{9b}1m\u{202e}\u{2028}";

#[track_caller]
fn is_harmless(output: &Output) {
    for stream in [&output.stdout, &output.stderr] {
        let found = text(stream);
        let commands = |c: char| c != '\n' && (c.is_control() || ('\u{2028}'..='\u{202e}').contains(&c));
        assert!(!found.contains(commands), "{found:?}");
    }
    for line in text(&output.stderr).lines() {
        assert!(line.chars().count() < 4000, "{} characters", line.chars().count());
    }
}

#[test]
fn names_and_prompts_of_images() {
    let folder = TempDir::new().unwrap();
    let image = path(&folder, &format!("a{HOSTILE}.png"));
    is_harmless(&rarebit(&["generate", HOSTILE, "--steps", "1", "--out", &image]));
    for flags in [&["inspect"][..], &["inspect", "--json"], &["score", "--shapes"], &["score", "--shapes", "--json"]] {
        is_harmless(&rarebit(&[flags, &[&image]].concat()));
    }
    fs::write(&image, "broken").unwrap();
    for flags in [&["inspect"][..], &["score", "--shapes"], &["score", "--shapes", "--json"]] {
        let output = rarebit(&[flags, &[&image]].concat());
        is_harmless(&output);
        assert_eq!(output.status.code(), Some(1));
    }
    is_harmless(&rarebit(&["score", "--shapes", &folder.path().display().to_string()]));
}

#[test]
fn columns_are_as_wide_as_what_is_shown() {
    let folder = TempDir::new().unwrap();
    for name in ["a\u{1b}[31m.png", "b.png"] {
        assert!(rarebit(&["generate", "a", "--steps", "1", "--quiet", "--out", &path(&folder, name)]).status.success());
    }
    let output = rarebit(&["score", "--shapes", &folder.path().display().to_string()]);
    is_harmless(&output);
    let shown = text(&output.stdout);
    // Log-densities stand under each other, to the right.
    let end = |line: &str, what: &str| line.find(what).map(|at| at + what.len());
    let head = end(shown.lines().next().unwrap(), "log-density").unwrap();
    for line in shown.lines().skip(1).take(2) {
        let value = line.split_whitespace().nth(1).unwrap();
        assert_eq!(end(line, value), Some(head), "{shown}");
    }
}

#[test]
fn what_users_write_comes_back_short_and_plain() {
    let folder = TempDir::new().unwrap();
    let out = path(&folder, "i.png");
    let long = format!("{HOSTILE}{}", "word ".repeat(4000));
    is_harmless(&rarebit(&["generate", &long, "--steps", "1", "--out", &out]));
    is_harmless(&rarebit(&["generate", "a", "--steps", &long, "--out", &out]));
    is_harmless(&rarebit(&["generate", "a", &format!("--{long}"), "--out", &out]));
    is_harmless(&rarebit(&[&long]));
    is_harmless(&rarebit(&["score", "--shapes", &format!("/{long}")]));
    let prompts = path(&folder, "prompts.txt");
    fs::write(&prompts, format!("{}\n", long.replace('\u{2028}', ""))).unwrap();
    let images = path(&folder, "images");
    is_harmless(&rarebit(&["generate", "--prompts", &prompts, "--steps", "1", "--json", "--out", &images]));
    let baseline = path(&folder, "b.json");
    fs::write(&baseline, serde_json::json!({"schema": 1, "case": {"model": long}}).to_string()).unwrap();
    let output = rarebit(&["bench", "--baseline", &baseline]);
    assert_eq!(output.status.code(), Some(2));
    is_harmless(&output);
}

#[test]
fn names_of_tokens_and_classes() {
    let folder = TempDir::new().unwrap();
    let token = path(&folder, &format!("{HOSTILE}.safetensors"));
    let header = serde_json::json!({HOSTILE: {"dtype": "F32", "shape": [1, 3], "data_offsets": [0, 12]}}).to_string();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 12]].concat();
    fs::write(&token, bytes).unwrap();
    is_harmless(&rarebit(&["generate", "a", "--token", &token, "--out", &path(&folder, "i.png")]));
    is_harmless(&rarebit(&["generate", "a", "--noise", &token, "--out", &path(&folder, "i.png")]));
    let model = copy_of("tiny-sd1");
    let index = serde_json::json!({"_class_name": HOSTILE, "unet": [HOSTILE, HOSTILE]}).to_string();
    fs::write(model.path().join("model_index.json"), index).unwrap();
    fs::write(model.path().join("tokenizer/added_tokens.json"), serde_json::json!({HOSTILE: 9999}).to_string())
        .unwrap();
    is_harmless(&rarebit(&["inspect", &model.path().display().to_string()]));
}
