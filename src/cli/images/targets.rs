//! Which images a command asks for: prompts × count, their seeds, file names, and which of them are already there.

use crate::data::metadata::{self, Record};
use crate::{Error, Result};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// One image to make and where it goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    pub prompt: String,
    pub seed: u64,
    /// Position among all images of the command: row of `--noise`, `--latents-out`.
    pub index: usize,
    pub path: PathBuf,
}

/// Targets of one prompt: `out` is a file; several images get their seed before the extension.
pub fn for_prompt(prompt: &str, seed: u64, count: usize, out: &Path) -> Vec<Target> {
    (0..count)
        .map(|index| {
            let seed = seed.wrapping_add(index as u64);
            let path = if count == 1 { out.to_path_buf() } else { with_suffix(out, seed) };
            Target { prompt: prompt.to_string(), seed, index, path }
        })
        .collect()
}

/// Targets of a prompt file: `out` is a folder; names are line number and seed, so that adding lines at the end renames nothing.
pub fn for_file(prompts: &[(usize, String)], seed: u64, count: usize, out: &Path) -> Vec<Target> {
    let images = prompts.iter().flat_map(|line| (0..count).map(move |i| (line, i)));
    images
        .enumerate()
        .map(|(index, ((line, prompt), i))| {
            let seed = seed.wrapping_add(i as u64);
            let path = out.join(format!("{line:05}-{seed}.png"));
            Target { prompt: prompt.clone(), seed, index, path }
        })
        .collect()
}

/// `dir/token.safetensors` for the image `00002-7.png` → `dir/token-00002-7.safetensors`.
pub fn beside(path: &Path, image: &Path) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push("-");
    name.push(image.file_stem().unwrap_or_default());
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

/// `dir/name.png` → `dir/name-SEED.png`.
fn with_suffix(path: &Path, seed: u64) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{seed}"));
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

/// Whether the image is already there and was made as `record` says. A file made otherwise is an error, not overwritten:
/// it is somebody's result. A PNG that says nothing (`--no-metadata`) is taken at its name.
pub fn is_finished(path: &Path, record: &Record) -> Result<bool> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let texts = metadata::read_text(&path.display().to_string(), BufReader::new(file))?;
    match metadata::record(&texts) {
        None => Ok(true),
        Some(Ok(found)) if found.same_image(record) => Ok(true),
        Some(_) => Err(Error::Usage(format!(
            "{}: was made with other settings; choose another --out, or --overwrite",
            path.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let one = for_prompt("p", 7, 1, Path::new("a/b.png"));
        assert_eq!(one[0].path, Path::new("a/b.png"));
        let two = for_prompt("p", 7, 2, Path::new("a/b.png"));
        assert_eq!((two[1].seed, two[1].path.as_path()), (8, Path::new("a/b-8.png")));
        let lines = [(1, "x".to_string()), (4, "y".to_string())];
        let files = for_file(&lines, 3, 2, Path::new("d"));
        assert_eq!(files.iter().map(|t| t.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(files[3].path, Path::new("d/00004-4.png"));
    }
}
