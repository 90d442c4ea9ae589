//! No file that ships names a folder of the machine it was made on.

use std::fs;
use std::path::{Path, PathBuf};

/// Where people and build machines keep their files. Put together here, so that this file passes its own test.
fn homes() -> Vec<Vec<u8>> {
    let unix = ["work", "home", "root", "Users"].map(|folder| format!("/{folder}/"));
    let windows = ["\\", "\\\\", "/"].map(|slash| format!(":{slash}Users"));
    unix.into_iter().chain(windows).map(String::into_bytes).collect()
}

/// Built, fetched or hidden: nothing of it is in the repository.
fn is_ignored(name: &str) -> bool {
    name.starts_with('.') || ["target", "corpus", "artifacts", "__pycache__"].contains(&name)
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        if is_ignored(&entry.file_name().to_string_lossy()) {
            continue;
        }
        if entry.file_type().unwrap().is_dir() {
            files(&entry.path(), found);
        } else {
            found.push(entry.path());
        }
    }
}

/// Where an absolute path into one of `homes` begins, text or not: the headers of weights and the text of images count too.
fn path_in(bytes: &[u8], homes: &[Vec<u8>]) -> Option<usize> {
    // `$build/root/x` and `a.b/home/` go on from something; `C:` is itself the start.
    let goes_on = |before: u8| before.is_ascii_alphanumeric() || b"_.-~})$*".contains(&before);
    let begins = |at: usize| bytes[at] == b':' || at == 0 || !goes_on(bytes[at - 1]);
    let is_start = |at: usize| homes.iter().any(|home| bytes[at..].starts_with(home)) && begins(at);
    bytes.iter().enumerate().filter(|(_, byte)| matches!(byte, b'/' | b':')).map(|(at, _)| at).find(|&at| is_start(at))
}

#[test]
fn no_file_names_a_machines_folder() {
    let mut found = Vec::new();
    files(Path::new(env!("CARGO_MANIFEST_DIR")), &mut found);
    assert!(found.len() > 300 && found.iter().any(|path| path.ends_with("clip/config.json")), "{} files", found.len());
    let homes = homes();
    let named: Vec<String> = found
        .iter()
        .filter_map(|path| {
            let bytes = fs::read(path).unwrap();
            let at = path_in(&bytes, &homes)?;
            let text = String::from_utf8_lossy(&bytes[at..bytes.len().min(at + 40)]).replace('\n', " ");
            Some(format!("{}: {text}", path.display()))
        })
        .collect();
    assert!(named.is_empty(), "{}", named.join("\n"));
}

#[test]
fn finds_absolute_paths_only() {
    let homes = homes();
    let at = |text: &str| path_in(text.as_bytes(), &homes);
    let with = |before: &str, folder: &str| format!("{before}/{folder}/x");
    assert_eq!(at(&with("\"a\": \"", "work")), Some(6));
    assert_eq!(at(&with("", "home")), Some(0));
    assert_eq!(at(&with("file://", "root")), Some(7));
    assert_eq!(at(&format!("C:{}Users", '\\')), Some(1));
    assert_eq!(at(&with("$new", "root")), None);
    assert_eq!(at(&with("https://example.org", "home")), None);
    assert_eq!(at("/usr/local/cuda and /tmp/x"), None);
}
