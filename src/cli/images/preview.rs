//! Previews: an image as it would be if its optimisation ended now, beside where it will be, until it is there. They carry no record, so
//! that none is taken for a finished image.

use crate::cli::atomic;
use crate::cli::images::targets::Target;
use crate::data::metadata;
use crate::{Error, Result};
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

/// `dir/name.png` → `dir/name.preview.png`.
pub fn beside(target: &Target) -> PathBuf {
    target.path.with_extension("preview.png")
}

/// In the place of the one before.
pub fn write(target: &Target, [width, height]: [usize; 2], rgb: &[u8]) -> Result<()> {
    atomic::write(&beside(target), |out| metadata::write_png(out, width, height, rgb, None))
}

pub fn remove(target: &Target) -> Result<()> {
    let path = beside(target);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", &path)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}
