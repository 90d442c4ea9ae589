//! Images that could not be made although others can: each is said when it fails, and the command fails at its end.

use crate::cli::progress::Reporter;
use crate::{Error, Result};
use serde_json::json;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Copies count together.
#[derive(Clone)]
pub struct Failures {
    stop: bool,
    reporter: Reporter,
    images: Arc<Mutex<HashSet<PathBuf>>>,
}

impl Failures {
    /// `stop`: the first failure ends the run.
    pub fn new(stop: bool, reporter: Reporter) -> Failures {
        Failures { stop, reporter, images: Arc::default() }
    }

    /// Says why images are missing, or gives the error back where it ends the run.
    pub fn add(&self, images: &[&Path], error: Error) -> Result<()> {
        let (Some(first), false) = (images.first(), self.stop) else { return Err(error) };
        self.images().extend(images.iter().map(|path| path.to_path_buf()));
        let first = first.display();
        self.reporter.warn(&match (images.len(), &error) {
            // It names the file.
            (_, Error::File { .. }) => error.to_string(),
            (1, _) => format!("{first}: {error}"),
            (n, _) => format!("{first} and {} more of its batch: {error}", n - 1),
        });
        let paths: Vec<String> = images.iter().map(|path| path.display().to_string()).collect();
        self.reporter.event(json!({"event": "failed", "paths": paths, "error": error.to_string()}))
    }

    fn images(&self) -> MutexGuard<'_, HashSet<PathBuf>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn has(&self, image: &Path) -> bool {
        self.images().contains(image)
    }

    pub fn count(&self) -> usize {
        self.images().len()
    }

    /// An error if there was one, among `of` images.
    pub fn result(&self, of: usize) -> Result<()> {
        match self.count() {
            0 => Ok(()),
            count => Err(Error::Incomplete(format!("{count} of {of} images were not made"))),
        }
    }
}
