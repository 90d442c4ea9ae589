//! Files that appear whole or not at all: written under a temporary name in the same folder, then renamed.

use crate::{Error, Result};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Writes `path` through `fill`; on any failure the temporary file is removed and `path` is untouched.
pub fn write(path: &Path, fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let target = target(path)?;
    let temporary = temporary_name(&target)?;
    let outcome = fill_and_rename(&target, &temporary, fill);
    if outcome.is_err() {
        // The first error is the one to report; a temporary file that was never made cannot be removed.
        let _ = fs::remove_file(&temporary);
    }
    outcome.map_err(Error::io("write", path))
}

/// What is really written: the file a link points to. A rename would put a file in the place of a device or a pipe.
fn target(path: &Path) -> Result<PathBuf> {
    match fs::metadata(path) {
        Ok(found) if found.is_file() => fs::canonicalize(path).map_err(Error::io("write", path)),
        Ok(_) => Err(Error::Usage(format!("{}: is not a regular file", path.display()))),
        Err(_) => Ok(path.to_path_buf()),
    }
}

/// Fails now if `path` could not be written later: no such folder, no permission.
pub fn probe(path: &Path) -> Result<()> {
    let temporary = temporary_name(&target(path)?)?;
    File::create(&temporary).and_then(|_| fs::remove_file(&temporary)).map_err(Error::io("write", path))
}

fn fill_and_rename(
    path: &Path,
    temporary: &Path,
    fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut file = BufWriter::new(File::create(temporary)?);
    fill(&mut file)?;
    let file = file.into_inner().map_err(|error| error.into_error())?;
    file.sync_all()?;
    fs::rename(temporary, path)
}

/// `.name.PID.part` beside `path`: hidden, and distinct between processes.
fn temporary_name(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| Error::Usage(format!("{}: not a file name", path.display())))?;
    let name = format!(".{}.{}.part", name.to_string_lossy(), std::process::id());
    Ok(path.with_file_name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failing_writer_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.png");
        fs::write(&path, b"old").unwrap();
        let full = |out: &mut dyn Write| {
            out.write_all(b"half of it")?;
            Err(std::io::Error::from(std::io::ErrorKind::StorageFull))
        };
        let error = write(&path, full).unwrap_err().to_string();
        assert!(error.contains("image.png") && !error.contains('\n'), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn replaces_whole_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("latents.safetensors");
        write(&path, |out| out.write_all(b"one")).unwrap();
        write(&path, |out| out.write_all(b"two")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
