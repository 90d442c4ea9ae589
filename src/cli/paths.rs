//! No output of a command is one of its inputs or another output: by what the paths are, not by how they are spelled.

use crate::cli::atomic;
use crate::{Error, Result};
use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};

/// All paths of a command. Inputs come first; each output is held against what came before it. Nothing is opened or written.
#[derive(Default)]
pub struct Paths {
    /// The flag that names each, and whether it is read.
    known: HashMap<Identity, (&'static str, bool)>,
    /// The folder of the last output that is not there yet, and what it is: images of a run share theirs.
    folder: Option<(PathBuf, Identity)>,
}

/// What a path stands for, links followed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Identity {
    /// Device and inode of what is there.
    There(u64, u64),
    /// What would be made: names below a folder that is there.
    New(PathBuf),
}

/// Endings of the files that models are made of.
const MODEL_FILES: [&str; 9] = ["safetensors", "json", "txt", "model", "bin", "ckpt", "pt", "pth", "gguf"];
/// Folders of a Hugging Face cache above a model's files: `snapshots/REVISION/unet/`.
const MODEL_DEPTH: usize = 3;
/// A folder with more entries is no model's.
const MOST_MODEL_FILES: usize = 20_000;

impl Paths {
    pub fn input(&mut self, flag: &'static str, path: &Path) {
        self.known.entry(identity(path)).or_insert((flag, true));
    }

    /// A model's file, or every file of its folder that can be of a model.
    pub fn model(&mut self, flag: &'static str, path: &Path) {
        self.input(flag, path);
        let (mut folders, mut seen) = (vec![(path.to_path_buf(), 0)], 0);
        while let Some((folder, depth)) = folders.pop() {
            // What cannot be listed, a single file first of all, is for the model's reader to refuse.
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                seen += 1;
                if seen > MOST_MODEL_FILES {
                    return;
                }
                let path = entry.path();
                let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
                if MODEL_FILES.contains(&ending.to_ascii_lowercase().as_str()) {
                    self.input(flag, &path);
                } else if depth < MODEL_DEPTH && path.is_dir() {
                    folders.push((path, depth + 1));
                }
            }
        }
    }

    /// `Error::Usage` where it would overwrite what is read or written already.
    pub fn output(&mut self, flag: &'static str, path: &Path) -> Result<()> {
        let identity = self.hold(flag, path)?;
        self.known.insert(identity, (flag, false));
        Ok(())
    }

    /// One of many outputs whose names differ by their making: remembered only where it is there, perhaps by a link.
    pub fn numbered_output(&mut self, flag: &'static str, path: &Path) -> Result<()> {
        if let there @ Identity::There(..) = self.hold(flag, path)? {
            self.known.insert(there, (flag, false));
        }
        Ok(())
    }

    fn hold(&mut self, flag: &'static str, path: &Path) -> Result<Identity> {
        let identity = self.identity_of_output(path);
        let path = path.display();
        match self.known.get(&identity) {
            None => Ok(identity),
            Some((input, true)) => {
                Err(Error::Usage(format!("{flag} {path}: would overwrite what {input} reads; choose another name")))
            }
            Some((other, false)) => {
                Err(Error::Usage(format!("{flag} {path}: {other} writes the same file; choose another name")))
            }
        }
    }

    fn identity_of_output(&mut self, path: &Path) -> Identity {
        let (Some(folder), Some(name), Err(_)) = (path.parent(), path.file_name(), fs::symlink_metadata(path)) else {
            return identity(path);
        };
        match &self.folder {
            Some((known, Identity::New(below))) if known == folder => Identity::New(below.join(name)),
            _ => {
                let found = identity(path);
                if let Identity::New(below) = &found {
                    let below = below.parent().unwrap_or(below).to_path_buf();
                    self.folder = Some((folder.to_path_buf(), Identity::New(below)));
                }
                found
            }
        }
    }
}

fn identity(path: &Path) -> Identity {
    // What cannot be looked at is refused where it is opened.
    let absolute = || std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    match fs::metadata(path) {
        Ok(found) => there(path, &found),
        Err(_) => Identity::New(atomic::followed(path).unwrap_or_else(|_| below_what_is_there(&absolute()))),
    }
}

#[cfg(unix)]
fn there(_: &Path, found: &Metadata) -> Identity {
    use std::os::unix::fs::MetadataExt;
    Identity::There(found.dev(), found.ino())
}

#[cfg(not(unix))]
fn there(path: &Path, _: &Metadata) -> Identity {
    Identity::New(fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf()))
}

/// A path whose folder is not there either: the nearest one that is, and the names below it.
fn below_what_is_there(path: &Path) -> PathBuf {
    let mut below: Vec<_> = vec![];
    for folder in path.ancestors() {
        if let Ok(there) = fs::canonicalize(folder) {
            return below.iter().rev().fold(there, |path, name| path.join(name));
        }
        match folder.components().next_back() {
            Some(last) => below.push(last),
            None => break,
        }
    }
    path.to_path_buf()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each in a folder of its own, `d` beside it, and the file `d/in` with every spelling of its name.
    fn spellings(folder: &Path) -> Vec<PathBuf> {
        let file = folder.join("d/in");
        fs::create_dir(folder.join("d")).unwrap();
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, folder.join("soft")).unwrap();
        std::os::unix::fs::symlink(folder.join("d"), folder.join("e")).unwrap();
        fs::hard_link(&file, folder.join("hard")).unwrap();
        ["d/in", "d/./in", "d/../d/in", "d//in", "soft", "e/in", "hard"].map(|name| folder.join(name)).to_vec()
    }

    #[test]
    fn outputs_are_no_inputs_however_spelled() {
        let folder = tempfile::tempdir().unwrap();
        let names = spellings(folder.path());
        for (input, output) in names.iter().flat_map(|a| names.iter().map(move |b| (a, b))) {
            let mut paths = Paths::default();
            paths.input("--noise", input);
            let error = paths.output("--trace", output).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains("--noise") && error.to_string().contains("--trace"), "{error}");
            assert!(paths.numbered_output("--out", output).is_err());
            assert!(paths.output("--trace", &folder.path().join("d/other")).is_ok());
        }
    }

    #[test]
    fn outputs_differ_where_none_is_there_yet() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("d")).unwrap();
        std::os::unix::fs::symlink(at("d/new"), at("dangling")).unwrap();
        std::os::unix::fs::symlink("d", at("e")).unwrap();
        let names = ["d/new", "d/./new", "e/new", "dangling", "e/../d/new", "d//new"];
        for (one, other) in names.iter().flat_map(|a| names.iter().map(move |b| (at(a), at(b)))) {
            let mut paths = Paths::default();
            paths.output("--out", &one).unwrap();
            let error = paths.output("--trace", &other).unwrap_err().to_string();
            assert!(error.contains("--out writes the same file"), "{} {}: {error}", one.display(), other.display());
            assert!(paths.numbered_output("--save-token", &other).is_err());
            paths.numbered_output("--save-token", &at("d/newer")).unwrap();
        }
        let mut paths = Paths::default();
        paths.output("--out", &at("not/there/a")).unwrap();
        assert!(paths.output("--trace", &at("./not//there/./a")).is_err());
        assert!(paths.output("--trace", &at("not/there/b")).is_ok());
    }

    #[test]
    fn files_of_a_model_are_inputs() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for subfolder in ["blobs", "snapshots/main/unet"] {
            fs::create_dir_all(at(subfolder)).unwrap();
        }
        fs::write(at("blobs/0123"), "").unwrap();
        fs::write(at("old.png"), "").unwrap();
        let file = at("snapshots/main/unet/diffusion_pytorch_model.safetensors");
        std::os::unix::fs::symlink("../../../blobs/0123", &file).unwrap();
        for model in [folder.path().to_path_buf(), at("snapshots/main")] {
            let mut paths = Paths::default();
            paths.model("--model", &model);
            for output in [&file, &at("blobs/0123")] {
                assert!(paths.output("--trace", output).unwrap_err().to_string().contains("--model"));
            }
            paths.output("--out", &at("old.png")).unwrap();
            paths.output("--trace", &at("snapshots/main/unet/new.safetensors")).unwrap();
        }
    }

    #[test]
    fn two_images_are_not_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("a-0.png"), "").unwrap();
        std::os::unix::fs::symlink(at("a-0.png"), at("a-1.png")).unwrap();
        let mut paths = Paths::default();
        paths.numbered_output("--out", &at("a-0.png")).unwrap();
        assert!(paths.numbered_output("--out", &at("a-1.png")).is_err());
        paths.numbered_output("--out", &at("a-2.png")).unwrap();
    }
}
