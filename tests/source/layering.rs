//! A module imports only from its left in the way of the data.

use std::fs;
use std::path::{Path, PathBuf};

/// Left to right; names on one line may not import each other.
const LAYERS: [&[&str]; 17] = [
    &["error"],
    &["input"],
    &["weights", "text"],
    &["assets"],
    &["program"],
    &["models"],
    &["autodiff"],
    &["plan"],
    &["exec"],
    &["sampler"],
    &["data"],
    &["pipeline"],
    &["rewards"],
    &["optimize"],
    &["metrics"],
    &["methods"],
    &["cli"],
];

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|names| names.contains(&module))
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

/// Modules named after `crate::` in a file, `use` lines and paths in code alike, braces unfolded.
fn imports(source: &str) -> Vec<String> {
    let code: Vec<&str> = source.lines().map(|line| line.split("//").next().unwrap_or("")).collect();
    let code = code.join("\n");
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let names: Vec<&str> = match rest.strip_prefix('{') {
            Some(list) => top_level(list),
            None => vec![rest],
        };
        let word =
            |name: &str| name.trim().split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("").to_string();
        found.extend(names.into_iter().map(word));
    }
    found
}

/// The entries of a brace list, up to its closing brace; what is in nested braces belongs to its entry.
fn top_level(list: &str) -> Vec<&str> {
    let (mut depth, mut start, mut entries) = (0, 0, Vec::new());
    for (at, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                entries.push(&list[start..at]);
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    entries
}

#[test]
fn imports_point_left() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&source, &mut files);
    let (mut checked, mut wrong) = (0, Vec::new());
    for file in files {
        let inside = file.strip_prefix(&source).unwrap();
        let own = inside.components().next().unwrap().as_os_str().to_string_lossy().replace(".rs", "");
        if own == "lib" || own == "main" {
            continue;
        }
        let own_layer = layer(&own).unwrap_or_else(|| panic!("module '{own}' has no place in the layers"));
        for name in imports(&fs::read_to_string(&file).unwrap()) {
            // `crate::Result` and `crate::Error` are re-exports of the leftmost module.
            let Some(other) = layer(&name) else { continue };
            checked += 1;
            if name != own && other >= own_layer {
                wrong.push(format!("{} imports crate::{name}", inside.display()));
            }
        }
    }
    assert!(checked > 50, "only {checked} imports found: is the test reading the right folder?");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn finds_imports() {
    let source =
        "use crate::{plan::{a, b}, exec::cpu};\nuse crate::program::Op; // crate::cli\nlet x = crate::text::y();";
    assert_eq!(imports(source), ["plan", "exec", "program", "text"]);
}
