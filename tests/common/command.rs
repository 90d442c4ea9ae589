//! Running the command line program and looking at what it leaves.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

pub fn rarebit(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rarebit")).args(args).output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
pub fn succeeds(args: &[&str]) -> String {
    let output = rarebit(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// The command fails with `code` and one line on stderr that holds every one of `words`.
#[track_caller]
pub fn fails(args: &[&str], code: i32, words: &[&str]) {
    let output = rarebit(args);
    check_failure(&output, code, words);
}

#[track_caller]
pub fn check_failure(output: &Output, code: i32, words: &[&str]) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "not one line: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "'{word}' is not in: {stderr}");
    }
}

pub fn files(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

pub fn path(folder: &TempDir, name: &str) -> String {
    folder.path().join(name).display().to_string()
}
