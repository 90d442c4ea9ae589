//! The trace: a file of JSON lines, one per iteration, that grows while images are made and is whole lines at any time.

use crate::cli::images::targets::{Target, Targets};
use crate::pipeline::Iteration;
use crate::{Error, Result, input};
use serde::Deserialize;
use serde_json::json;
use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

/// How every line begins.
const START: &[u8] = b"{\"gradient\":[";
/// Longest line: the largest batch has a million images, each with some numbers.
const MOST_LINE: u64 = 1 << 28;

pub struct Trace {
    path: PathBuf,
    file: File,
    /// An image that is gone on with, and the first iteration that is not there of it.
    there: Option<(usize, usize)>,
}

impl Trace {
    /// Begins a trace, or goes on with one after its first `keep` bytes; of an image that is gone on with they hold the iterations before one.
    pub fn open(path: &Path, keep: u64, there: Option<(usize, usize)>) -> Result<Trace> {
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(Error::io("create", path))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Usage(format!("--trace {}: another run is writing it", path.display())));
            }
            // Not every file system has locks.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        file.set_len(keep).map_err(Error::io("write", path))?;
        Ok(Trace { path: path.to_path_buf(), file, there })
    }

    pub fn write(&mut self, targets: &[Target], report: &Iteration) -> Result<()> {
        // A run that goes on repeats what it had traced and not kept.
        if self.there.is_some_and(|(image, next)| targets[0].index == image && report.iteration < next) {
            return Ok(());
        }
        let mut line = json!(report);
        line["seeds"] = json!(targets.iter().map(|target| target.seed).collect::<Vec<_>>());
        line["images"] = json!(targets.iter().map(|target| target.index).collect::<Vec<_>>());
        // In one piece: who is killed leaves no half line.
        self.file.write_all(format!("{line}\n").as_bytes()).map_err(Error::io("write", &self.path))
    }
}

/// Which images a trace is of.
#[derive(Default)]
pub struct Traced {
    images: HashMap<usize, Lines>,
}

/// The lines of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lines {
    pub count: usize,
    /// The iteration after the last.
    pub next: usize,
    /// Where the last ends.
    pub end: u64,
}

#[derive(Deserialize)]
struct Line {
    iteration: usize,
    images: Vec<usize>,
    seeds: Vec<u64>,
}

impl Traced {
    /// Reads the trace of an earlier run of the same command; there may be none. A half line at its end is left out.
    pub fn read(path: &Path, targets: &Targets) -> Result<Traced> {
        let mut traced = Traced::default();
        lines(path, |line, end| {
            let is_of_target =
                |(index, seed): (&usize, &u64)| *index < targets.len() && targets.get(*index).seed == *seed;
            if !line.images.iter().zip(&line.seeds).all(is_of_target) {
                let what = "is the trace of other images; choose another name, or --overwrite";
                return Err(Error::Usage(format!("--trace {}: {what}", path.display())));
            }
            for index in line.images {
                let Lines { count, .. } = traced.of(index);
                traced.images.insert(index, Lines { count: count + 1, next: line.iteration + 1, end });
            }
            Ok(true)
        })?;
        Ok(traced)
    }

    /// Where the last whole line ends.
    pub fn end(&self) -> u64 {
        self.images.values().map(|lines| lines.end).max().unwrap_or_default()
    }

    pub fn of(&self, index: usize) -> Lines {
        self.images.get(&index).copied().unwrap_or_default()
    }
}

/// Refuses a file that is there and no trace: it would be lost.
pub fn check(path: &Path) -> Result<()> {
    lines(path, |_, _| Ok(false))
}

/// The whole lines of a trace, each with where it ends, as long as `see` wants more.
fn lines(path: &Path, mut see: impl FnMut(Line, u64) -> Result<bool>) -> Result<()> {
    let refused =
        || Error::Usage(format!("--trace {}: is there already and no trace; choose another name", path.display()));
    if !path.exists() {
        return Ok(());
    }
    let mut file = BufReader::new(input::open(path)?);
    let (mut line, mut end) = (Vec::new(), 0);
    loop {
        line.clear();
        end += file.by_ref().take(MOST_LINE).read_until(b'\n', &mut line).map_err(Error::io("read", path))? as u64;
        if !line.ends_with(b"\n") {
            let begins = line.starts_with(START) || START.starts_with(&line);
            return if begins && (line.len() as u64) < MOST_LINE { Ok(()) } else { Err(refused()) };
        }
        let found = serde_json::from_slice::<Line>(&line).ok().filter(|_| line.starts_with(START));
        let Some(found) = found.filter(|line| line.images.len() == line.seeds.len()) else { return Err(refused()) };
        if !see(found, end)? {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::AtStep;

    fn report() -> Iteration {
        Iteration {
            at: Some(AtStep { step: 0, timestep: 1.0, second_timestep: 0.5 }),
            objective: "minority",
            iteration: 0,
            lr: 0.1,
            score: vec![1.0],
            terms: Default::default(),
            gradient: vec![2.0],
            moved: vec![0.0],
        }
    }

    #[test]
    fn goes_on_after_what_is_finished() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl");
        let prompts = vec![(1, "x".to_string()), (2, "y".to_string())];
        let targets = Targets::for_file(prompts, 0, 2, Path::new("d")).unwrap();
        assert!(Traced::read(&path, &targets).unwrap().images.is_empty());
        let mut trace = Trace::open(&path, 0, None).unwrap();
        assert!(Trace::open(&path, 0, None).err().unwrap().to_string().contains("another run"));
        for index in [0, 0, 1] {
            trace.write(&[targets.get(index)], &report()).unwrap();
        }
        drop(trace);
        let whole = std::fs::read(&path).unwrap();
        // Cut anywhere in its last line, it has two whole ones.
        let two = whole.len() - 1 - whole[..whole.len() - 1].iter().rev().position(|&byte| byte == b'\n').unwrap();
        for length in two..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let traced = Traced::read(&path, &targets).unwrap();
            let two_lines = Lines { count: 2, next: 1, end: two as u64 };
            assert_eq!((traced.of(0), traced.of(1)), (two_lines, Lines::default()), "{length}");
        }
        let mut trace = Trace::open(&path, two as u64, None).unwrap();
        trace.write(&[targets.get(1)], &report()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        let fewer = Targets::for_prompt("x", 7, 1, Path::new("a.png")).unwrap();
        let error = Traced::read(&path, &fewer).err().unwrap().to_string();
        assert!(error.contains("the trace of other images"), "{error}");
    }

    #[test]
    fn other_files_are_no_trace() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t");
        check(&path).unwrap();
        for text in ["a cat\na dog\n", "precious", "{}", "{\"a\": [1]}", "[]\n", "{\"gradient\":[]}\n", "\n"] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(check(&path).unwrap_err().exit_code(), 2, "{text}");
        }
        for text in
            ["", "{\"gra", "{\"gradient\":[1", "{\"gradient\":[1],\"images\":[0],\"iteration\":0,\"seeds\":[0]}\n{\"gr"]
        {
            std::fs::write(&path, text).unwrap();
            check(&path).unwrap();
        }
    }
}
