//! Where a run that optimises is kept between its iterations: a hidden file beside the image, until that is written.

use crate::cli::atomic;
use crate::cli::images::targets::{Target, Targets};
use crate::methods::seedselect::Checkpoints;
use crate::pipeline::generate::Job;
use crate::weights::fingerprint;
use crate::{Error, Result, input};
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;

/// Bytes of a state: six rows an image of the largest batch there is, in f32.
const MOST_STATE: u64 = 1 << 34;

pub struct StateFiles {
    pub targets: Arc<Targets>,
    /// Go on with what is there.
    pub resume: bool,
}

impl StateFiles {
    /// The file of a batch, that of its first image.
    fn path(&self, jobs: &[Job]) -> Result<PathBuf> {
        let is_of =
            |job: &Job| self.targets.iter().find(|target| target.seed == job.seed && *target.prompt == *job.prompt);
        let target = jobs.first().and_then(is_of);
        target.map(|target| beside(&target)).ok_or_else(|| Error::Usage("no image of the run".into()))
    }
}

fn beside(target: &Target) -> PathBuf {
    let name = target.path.file_name().unwrap_or_default().as_encoded_bytes();
    // Of a fixed length, so that every name of an image leaves room for it.
    target.path.with_file_name(format!(".rarebit-{:016x}.state", fingerprint(name.iter().copied())))
}

/// Whether a batch that begins with this image was cut short.
pub fn is_there(target: &Target) -> bool {
    beside(target).exists()
}

/// Removes the file of the batch that begins with this image.
pub fn remove(target: &Target) -> Result<()> {
    let path = beside(target);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", &path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

impl Checkpoints for StateFiles {
    fn read(&self, jobs: &[Job]) -> Result<Option<Vec<u8>>> {
        let path = self.path(jobs)?;
        if !self.resume || !path.exists() {
            return Ok(None);
        }
        input::read(&path, MOST_STATE).map(Some)
    }

    fn write(&self, jobs: &[Job], state: &[u8]) -> Result<()> {
        atomic::write(&self.path(jobs)?, |out| out.write_all(state))
    }
}
