//! Files that appear whole or not at all: written under a temporary name in the same folder, then renamed.

use crate::{Error, Result};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Temporary names are short, so that every name the file system takes can be written to, and cannot be guessed.
const PREFIX: &str = ".rarebit-";
const SUFFIX: &str = ".part";
/// Characters between them that are drawn.
const DRAWN: usize = 12;
/// Links in a row; Linux follows as many.
const MOST_LINKS: usize = 40;

/// Writes `path` through `fill` in the place of what is there: a link is followed, and the mode stays. Other names of the same file
/// (hard links) keep what it held. On any failure `path` is untouched.
pub fn write(path: &Path, fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let target = Target::of(path)?;
    let file = target.filled(fill).map_err(Error::io("write", path))?;
    file.persist(&target.path).map(|_| ()).map_err(|failed| Error::io("write", path)(failed.error))
}

/// As [`write`], but what has appeared at `path` meanwhile stays, by whichever program or machine: then it is `false`.
pub fn create(path: &Path, fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<bool> {
    let target = Target::of(path)?;
    if target.there.is_some() {
        return Ok(false);
    }
    let file = target.filled(fill).map_err(Error::io("write", path))?;
    match file.persist_noclobber(&target.path) {
        Ok(_) => Ok(true),
        Err(failed) if failed.error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(failed) => Err(Error::io("write", path)(failed.error)),
    }
}

/// Fails now if `path` could not be written later: no such folder, no permission, not a file. Removes what killed runs have left in
/// its folder.
pub fn probe(path: &Path) -> Result<()> {
    let target = Target::of(path)?;
    sweep(target.folder());
    target.temporary().map(|_| ()).map_err(Error::io("write", path))
}

/// Fails where `path` is there and is not to be written: a folder, a device, a pipe, a file that is read-only.
pub fn check(path: &Path) -> Result<()> {
    Target::of(path).map(|_| ())
}

/// Where a file written to `path` comes to be: links are followed, also one that points to nothing yet. An error where its folder
/// is not there.
pub fn followed(path: &Path) -> std::io::Result<PathBuf> {
    if path.as_os_str().as_encoded_bytes().ends_with(b"/") && !path.exists() {
        return Err(ErrorKind::IsADirectory.into());
    }
    let mut path = path.to_path_buf();
    for _ in 0..MOST_LINKS {
        match fs::canonicalize(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            found => return found,
        }
        match fs::read_link(&path) {
            Ok(to) => path = folder_of(&path).join(to),
            Err(_) => {
                let name = path.file_name().ok_or(ErrorKind::NotFound)?;
                return Ok(fs::canonicalize(folder_of(&path))?.join(name));
            }
        }
    }
    Err(ErrorKind::NotFound.into())
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A file to write.
struct Target {
    /// No link.
    path: PathBuf,
    /// The file in its place.
    there: Option<Metadata>,
}

impl Target {
    fn of(path: &Path) -> Result<Target> {
        let refused = || Error::io("write", path);
        let found = followed(path).map_err(refused())?;
        let there = match fs::metadata(&found) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Target { path: found, there: None }),
            there => there.map_err(refused())?,
        };
        if there.is_dir() {
            return Err(Error::Usage(format!("{}: is a folder, not a file to write", path.display())));
        }
        // A rename would put a file in the place of a device or a pipe.
        if !there.is_file() {
            return Err(Error::Usage(format!("{}: is not a regular file", path.display())));
        }
        // A rename asks the folder only; what may not be written to is meant to stay. Root may write to everything.
        if there.permissions().readonly() {
            return Err(refused()(std::io::Error::new(ErrorKind::PermissionDenied, "it is read-only")));
        }
        OpenOptions::new().write(true).open(&found).map_err(refused())?;
        Ok(Target { path: found, there: Some(there) })
    }

    fn folder(&self) -> &Path {
        folder_of(&self.path)
    }

    /// An empty temporary file beside the target, locked for as long as this process has it open.
    fn temporary(&self) -> std::io::Result<NamedTempFile> {
        loop {
            let mut builder = tempfile::Builder::new();
            mode::begin(builder.prefix(PREFIX).suffix(SUFFIX).rand_bytes(DRAWN), self.there.as_ref());
            let file = builder.tempfile_in(self.folder())?;
            // Where files cannot be locked, none is swept either.
            let _ = file.as_file().lock();
            // Another run may have swept it between its making and its lock.
            if mode::is_linked(file.as_file())? {
                return Ok(file);
            }
        }
    }

    /// A temporary file with its whole content on the disk.
    fn filled(&self, fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> std::io::Result<NamedTempFile> {
        let mut file = self.temporary()?;
        let mut out = BufWriter::new(file.as_file_mut());
        fill(&mut out)?;
        out.flush()?;
        drop(out);
        if let Some(there) = &self.there {
            mode::copy(there, file.as_file())?;
        }
        file.as_file().sync_all()?;
        Ok(file)
    }
}

/// Removes the temporary files of a folder that nobody writes any more: whoever does holds a lock, on whatever machine.
fn sweep(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.as_encoded_bytes();
        if !name.starts_with(PREFIX.as_bytes()) || !name.ends_with(SUFFIX.as_bytes()) {
            continue;
        }
        // A pipe of that name would be waited for.
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        let file = is_file.then(|| OpenOptions::new().read(true).write(true).open(entry.path()));
        if let Some(Ok(file)) = file
            && file.try_lock().is_ok()
        {
            // What cannot be removed does no harm.
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(unix)]
mod mode {
    use super::{File, Metadata};
    use std::fs::Permissions;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};

    /// Permission bits, without the file's type.
    const BITS: u32 = 0o7777;

    /// A file in this one's place may be read by nobody else at any time; a new one gets what the umask leaves.
    pub fn begin(builder: &mut tempfile::Builder<'_, '_>, there: Option<&Metadata>) {
        builder.permissions(Permissions::from_mode(there.map_or(0o666, |there| there.mode() & BITS)));
    }

    pub fn copy(there: &Metadata, file: &File) -> std::io::Result<()> {
        let own = file.metadata()?;
        if (own.uid(), own.gid()) != (there.uid(), there.gid()) {
            // Only root may give files away.
            let _ = fchown(file, Some(there.uid()), Some(there.gid()));
        }
        file.set_permissions(Permissions::from_mode(there.mode() & BITS))
    }

    pub fn is_linked(file: &File) -> std::io::Result<bool> {
        Ok(file.metadata()?.nlink() > 0)
    }
}

#[cfg(not(unix))]
mod mode {
    use super::{File, Metadata};

    pub fn begin(_: &mut tempfile::Builder<'_, '_>, _: Option<&Metadata>) {}

    pub fn copy(there: &Metadata, file: &File) -> std::io::Result<()> {
        file.set_permissions(there.permissions())
    }

    pub fn is_linked(_: &File) -> std::io::Result<bool> {
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn failing_writer_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.png");
        fs::write(&path, b"old").unwrap();
        let full = |out: &mut dyn Write| {
            out.write_all(b"half of it")?;
            Err(std::io::Error::from(ErrorKind::StorageFull))
        };
        let error = write(&path, full).unwrap_err().to_string();
        assert!(error.contains("image.png") && !error.contains('\n'), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert!(create(&folder.path().join("new.png"), full).is_err());
        assert_eq!(names(folder.path()), ["image.png"]);
    }

    #[test]
    fn replaces_whole_files() {
        let folder = tempfile::tempdir().unwrap();
        // The longest name that the file system takes.
        let path = folder.path().join("n".repeat(255));
        write(&path, |out| out.write_all(b"one")).unwrap();
        write(&path, |out| out.write_all(b"two")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(folder.path()).len(), 1);
    }

    #[test]
    fn what_appears_meanwhile_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.png");
        let late = create(&path, |out| {
            fs::write(&path, b"another run's")?;
            out.write_all(b"ours")
        });
        assert!(!late.unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"another run's");
        assert!(!create(&path, |out| out.write_all(b"ours")).unwrap());
        assert_eq!(names(folder.path()), ["image.png"]);
        assert!(create(&folder.path().join("other.png"), |out| out.write_all(b"ours")).unwrap());
    }

    #[test]
    fn leftovers_of_killed_runs_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.png");
        let others = [".rarebit-x.png", "x.part", ".x.part"];
        for name in others {
            fs::write(folder.path().join(name), b"").unwrap();
        }
        fs::create_dir(folder.path().join(".rarebit-folder.part")).unwrap();
        let killed = folder.path().join(".rarebit-abcdefghijkl.part");
        fs::write(&killed, b"half").unwrap();
        let living = Target::of(&path).unwrap().temporary().unwrap();
        probe(&path).unwrap();
        assert!(!killed.exists() && living.path().exists());
        drop(living);
        assert_eq!(names(folder.path()), [".rarebit-folder.part", ".rarebit-x.png", ".x.part", "x.part"]);
    }

    #[cfg(unix)]
    #[test]
    fn links_and_modes_stay() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mode = |name: &str| fs::metadata(at(name)).unwrap().mode() & 0o7777;
        fs::write(at("plain"), b"").unwrap();
        for bits in [0o600, 0o640, 0o666, 0o755] {
            fs::write(at("a"), b"old").unwrap();
            fs::set_permissions(at("a"), fs::Permissions::from_mode(bits)).unwrap();
            write(&at("a"), |out| out.write_all(b"new")).unwrap();
            assert_eq!((mode("a"), fs::read(at("a")).unwrap()), (bits, b"new".to_vec()));
        }
        write(&at("b"), |out| out.write_all(b"new")).unwrap();
        assert_eq!(mode("b"), mode("plain"), "the umask's");

        fs::create_dir(at("d")).unwrap();
        symlink("d/real", at("one")).unwrap();
        symlink("one", at("two")).unwrap();
        for _ in 0..2 {
            write(&at("two"), |out| out.write_all(b"new")).unwrap();
            assert!(at("two").is_symlink() && at("one").is_symlink() && !at("d/real").is_symlink());
            assert_eq!(fs::read(at("d/real")).unwrap(), b"new");
        }
        symlink("loop", at("loop")).unwrap();
        symlink("not/there", at("nowhere")).unwrap();
        for name in ["loop", "nowhere"] {
            assert_eq!(write(&at(name), |_| Ok(())).unwrap_err().exit_code(), 1);
            assert!(at(name).is_symlink());
        }
    }

    #[cfg(unix)]
    #[test]
    fn what_is_not_to_be_written_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, b"old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
        for refused in [write(&path, |_| Ok(())), create(&path, |_| Ok(())).map(|_| ()), probe(&path), check(&path)] {
            assert!(refused.unwrap_err().to_string().ends_with("a: it is read-only"));
        }
        let _listener = std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap();
        for name in ["socket", ".", "new/"] {
            assert!(probe(&folder.path().join(name)).is_err(), "{name}");
        }
        assert_eq!(probe(Path::new("/dev/null")).unwrap_err().exit_code(), 2);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["a", "socket"]);
    }
}
