//! Which images a command asks for: prompts × count, their seeds and file names, none of which is in memory before it is needed.

use crate::{Error, Result};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One image to make and where it goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    pub prompt: Arc<str>,
    pub seed: u64,
    /// Position among all images of the command: row of `--noise`, `--latents-out`.
    pub index: usize,
    pub path: PathBuf,
    /// There was no such file when the run began; one that is there when the image is finished is another run's.
    pub is_new: bool,
}

/// The images of a command, by their numbers from 0.
pub struct Targets {
    /// With their line numbers.
    prompts: Vec<(usize, Arc<str>)>,
    /// Of a prompt's first image.
    seed: u64,
    /// Images per prompt.
    count: usize,
    names: Names,
}

enum Names {
    /// One image, this file.
    File(PathBuf),
    /// The seed before the extension of this file's name.
    Seeds(PathBuf),
    /// Line number and seed, in this folder: adding lines at the end renames nothing.
    Lines(PathBuf),
}

/// Most images of one command.
pub const MOST_IMAGES: usize = 10_000_000;

impl Targets {
    /// Targets of one prompt: `out` is a file; several images get their seed before the extension.
    pub fn for_prompt(prompt: &str, seed: u64, count: usize, out: &Path) -> Result<Targets> {
        let names = if count == 1 { Names::File(out.to_path_buf()) } else { Names::Seeds(out.to_path_buf()) };
        Targets { prompts: vec![(1, prompt.into())], seed, count, names }.checked()
    }

    /// Targets of a prompt file: `out` is a folder.
    pub fn for_file(prompts: Vec<(usize, String)>, seed: u64, count: usize, out: &Path) -> Result<Targets> {
        let prompts = prompts.into_iter().map(|(line, prompt)| (line, prompt.into())).collect();
        Targets { prompts, seed, count, names: Names::Lines(out.to_path_buf()) }.checked()
    }

    fn checked(self) -> Result<Targets> {
        let Targets { seed, count, .. } = self;
        if self.prompts.len().checked_mul(count).is_none_or(|images| images > MOST_IMAGES) {
            return Err(Error::Usage(format!("--count {count}: more than {MOST_IMAGES} images in all")));
        }
        match seed.checked_add(count as u64 - 1) {
            Some(_) => Ok(self),
            None => {
                Err(Error::Usage(format!("--seed {seed}: --count {count} seeds from there go beyond {}", u64::MAX)))
            }
        }
    }

    pub fn len(&self) -> usize {
        self.prompts.len() * self.count
    }

    pub fn prompt(&self, index: usize) -> &Arc<str> {
        &self.prompts[index / self.count].1
    }

    /// In order, each once.
    pub fn prompts(&self) -> impl Iterator<Item = &str> {
        self.prompts.iter().map(|(_, prompt)| &**prompt)
    }

    pub fn get(&self, index: usize) -> Target {
        let (line, prompt) = &self.prompts[index / self.count];
        let seed = self.seed + (index % self.count) as u64;
        let path = match &self.names {
            Names::File(file) => file.clone(),
            Names::Seeds(file) => suffixed(file, &seed.to_string()),
            Names::Lines(folder) => folder.join(format!("{line:05}-{seed}.png")),
        };
        Target { prompt: Arc::clone(prompt), seed, index, path, is_new: true }
    }

    pub fn iter(&self) -> impl Iterator<Item = Target> {
        (0..self.len()).map(|index| self.get(index))
    }

    /// The file of what belongs to an image, like its token: `path` itself where there is one image.
    pub fn beside(&self, path: &Path, image: &Target) -> PathBuf {
        match &self.names {
            Names::File(_) => path.to_path_buf(),
            Names::Seeds(_) | Names::Lines(_) => {
                let name = image.path.file_stem().unwrap_or_default().to_string_lossy();
                suffixed(path, &name)
            }
        }
    }
}

/// `dir/token.safetensors` and `00002-7` → `dir/token-00002-7.safetensors`.
fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push("-");
    name.push(suffix);
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

/// Those of the targets that are to be made, in order.
pub struct Selection<'t> {
    pub targets: &'t Targets,
    /// Neighbours of one kind: the position of the first in the selection, their numbers, and whether they are new.
    runs: Vec<(usize, Range<usize>, bool)>,
    len: usize,
}

impl<'t> Selection<'t> {
    pub fn none_of(targets: &'t Targets) -> Selection<'t> {
        Selection { targets, runs: vec![], len: 0 }
    }

    /// All of them, none of which is there.
    pub fn all_of(targets: &'t Targets) -> Selection<'t> {
        let mut all = Selection::none_of(targets);
        (0..targets.len()).for_each(|index| all.add(index, true));
        all
    }

    /// A target behind those added before.
    pub fn add(&mut self, index: usize, is_new: bool) {
        match self.runs.last_mut() {
            Some((_, indices, new)) if indices.end == index && *new == is_new => indices.end += 1,
            _ => self.runs.push((self.len, index..index + 1, is_new)),
        }
        self.len += 1;
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The number of the target at a position, and whether it is new.
    fn at(&self, position: usize) -> (usize, bool) {
        let run = self.runs.partition_point(|(first, ..)| *first <= position) - 1;
        let (first, indices, is_new) = &self.runs[run];
        (indices.start + position - first, *is_new)
    }

    /// The targets at these positions.
    pub fn targets(&self, positions: Range<usize>) -> Vec<Target> {
        let target = |(index, is_new)| Target { is_new, ..self.targets.get(index) };
        positions.map(|position| target(self.at(position))).collect()
    }

    /// The prompts at these positions.
    pub fn prompts(&self, positions: Range<usize>) -> impl Iterator<Item = &'t Arc<str>> {
        positions.map(|position| self.targets.prompt(self.at(position).0))
    }

    /// Prompts of which there are images to make, one after the other.
    pub fn distinct_prompts(&self) -> impl Iterator<Item = &'t str> {
        let mut last: Option<&Arc<str>> = None;
        self.prompts(0..self.len).filter_map(move |prompt| {
            let is_new = last.is_none_or(|last| !Arc::ptr_eq(last, prompt));
            last = Some(prompt);
            is_new.then_some(&**prompt)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(prompts: &[(usize, &str)]) -> Vec<(usize, String)> {
        prompts.iter().map(|(line, prompt)| (*line, prompt.to_string())).collect()
    }

    #[test]
    fn names() {
        let token = Path::new("t/x.st");
        let one = Targets::for_prompt("p", 7, 1, Path::new("a/b.png")).unwrap();
        assert_eq!(one.get(0).path, Path::new("a/b.png"));
        assert_eq!(one.beside(token, &one.get(0)), token);
        let two = Targets::for_prompt("p", 7, 2, Path::new("a/b.png")).unwrap();
        assert_eq!((two.get(1).seed, two.get(1).path.as_path()), (8, Path::new("a/b-8.png")));
        assert_eq!(two.beside(token, &two.get(1)), Path::new("t/x-b-8.st"));
        let files = Targets::for_file(lines(&[(1, "x"), (4, "y")]), 3, 2, Path::new("d")).unwrap();
        assert_eq!(files.iter().map(|t| t.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(files.get(3).path, Path::new("d/00004-4.png"));
        assert_eq!(files.beside(token, &files.get(3)), Path::new("t/x-00004-4.st"));
    }

    #[test]
    fn numbers_that_do_not_exist() {
        let out = Path::new("a.png");
        assert!(Targets::for_prompt("p", u64::MAX, 1, out).is_ok());
        let error = Targets::for_prompt("p", u64::MAX, 2, out).err().unwrap();
        assert!(error.exit_code() == 2 && error.to_string().contains("--seed 18446744073709551615"), "{error}");
        for count in [MOST_IMAGES, usize::MAX] {
            let error = Targets::for_file(lines(&[(1, "x"), (2, "y")]), 0, count, out).err().unwrap();
            assert!(error.to_string().contains("--count"), "{error}");
        }
    }

    #[test]
    fn selections_skip_what_is_there() {
        let targets = Targets::for_file(lines(&[(1, "x"), (2, "y"), (3, "z")]), 0, 3, Path::new("d")).unwrap();
        let mut some = Selection::none_of(&targets);
        let added = [(0, true), (1, true), (2, false), (3, true), (7, true), (8, true)];
        added.into_iter().for_each(|(index, is_new)| some.add(index, is_new));
        assert_eq!((some.len(), some.runs.len()), (6, 4));
        let found: Vec<_> = some.targets(0..6).into_iter().map(|target| (target.index, target.is_new)).collect();
        assert_eq!(found, added);
        assert_eq!(some.distinct_prompts().collect::<Vec<_>>(), ["x", "y", "z"]);
        assert_eq!(some.prompts(3..5).map(|prompt| &**prompt).collect::<Vec<_>>(), ["y", "z"]);
        let all = Selection::all_of(&targets);
        assert_eq!((all.len(), all.runs.len()), (9, 1));
    }
}
