//! One safetensors file: read by position, or embedded; its header is checked before any tensor is touched.
//!
//! Files are read, not mapped. A mapping spares the copy out of the system's cache, but when somebody truncates the file meanwhile the
//! process is ended (SIGBUS), and what somebody writes meanwhile is taken in unseen. What a read costs: COST

use super::header::{self, Header};
use crate::{Error, Result, input};
use rayon::prelude::*;
use std::borrow::Cow;
use std::cell::RefCell;
use std::fs;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;
use twox_hash::XxHash3_64;

/// Element type of a tensor as the file stores it.
pub use safetensors::Dtype as Stored;

/// Bytes that are hashed at once: large for the disk, small for the second-level cache. Part of what a digest means.
const CHUNK: usize = 1 << 20;

/// Where the bytes are.
enum Bytes {
    Disk { file: fs::File, opened: Identity },
    Embedded(&'static [u8]),
}

/// Identifies an opened file within the process; opening the same file again gives another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId(u64);

/// A safetensors file whose header has been checked.
pub struct File {
    id: FileId,
    path: PathBuf,
    bytes: Bytes,
    header: Header,
}

impl File {
    /// Opens the file at `path` and reads its header.
    ///
    /// Errors when it cannot be read or is not a well-formed safetensors file.
    pub fn open(path: &Path) -> Result<File> {
        let file = input::open(path)?;
        let opened = Identity::of(&file).map_err(Error::io("read", path))?;
        let (length, bytes) = (opened.length, Bytes::Disk { file, opened });
        let start = bytes.read(path, 0..length.min(header::START as u64) as usize)?;
        let place = header::place(&start, length).map_err(|what| Error::file(path, what))?;
        let header = header::checked(&bytes.read(path, place)?, length).map_err(|what| Error::file(path, what))?;
        Ok(File::new(path.to_path_buf(), bytes, header))
    }

    /// A file compiled into the binary; `path` only serves messages.
    pub fn embedded(path: PathBuf, bytes: &'static [u8]) -> Result<File> {
        let header = header::parse_header(bytes).map_err(|what| Error::file(&path, what))?;
        Ok(File::new(path, Bytes::Embedded(bytes), header))
    }

    fn new(path: PathBuf, bytes: Bytes, header: Header) -> File {
        static OPENED: AtomicU64 = AtomicU64::new(0);
        File { id: FileId(OPENED.fetch_add(1, Ordering::Relaxed)), path, bytes, header }
    }

    pub fn id(&self) -> FileId {
        self.id
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The bytes of a tensor or of some of its rows, by their place in the file. Errors as [`File::visit`].
    pub fn read(&self, range: &Range<usize>) -> Result<Cow<'_, [u8]>> {
        self.bytes.read(&self.path, range.clone())
    }

    /// Gives `visit` the bytes at a place in the file, which are in a buffer of this thread's: `visit` must not come back here.
    ///
    /// Errors when they cannot be read, or the file is not any more what it was when it was opened.
    pub fn visit<R>(&self, range: Range<usize>, visit: impl FnOnce(&[u8]) -> R) -> Result<R> {
        thread_local! {
            static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        match &self.bytes {
            Bytes::Embedded(bytes) => Ok(visit(&bytes[range])),
            Bytes::Disk { file, opened } => BUFFER.with_borrow_mut(|buffer| {
                if buffer.len() < range.len() {
                    buffer.resize(range.len(), 0);
                }
                let bytes = &mut buffer[..range.len()];
                opened.read(file, &self.path, range.start, bytes)?;
                Ok(visit(bytes))
            }),
        }
    }

    /// A hash of the whole content (XXH3 of the hashes of its chunks): no cryptography. All threads read.
    pub fn digest(&self) -> Result<u64> {
        let length = match &self.bytes {
            Bytes::Disk { opened, .. } => opened.length as usize,
            Bytes::Embedded(bytes) => bytes.len(),
        };
        let chunk = |n: usize| self.visit(n * CHUNK..length.min((n + 1) * CHUNK), XxHash3_64::oneshot);
        let chunks = (0..length.div_ceil(CHUNK)).into_par_iter().map(chunk).collect::<Result<Vec<u64>>>()?;
        Ok(XxHash3_64::oneshot(&chunks.iter().flat_map(|hash| hash.to_le_bytes()).collect::<Vec<u8>>()))
    }

    /// Tells the system that the bytes are needed soon, so that it reads them while others are worked on. Best effort.
    pub fn prefetch(&self, range: &Range<usize>) {
        #[cfg(target_os = "linux")]
        if let Bytes::Disk { file, .. } = &self.bytes {
            let (at, length) = (range.start as u64, std::num::NonZeroU64::new(range.len() as u64));
            // A failure only leaves the bytes to be read when they are asked for.
            let _ = rustix::fs::fadvise(file, at, length, rustix::fs::Advice::WillNeed);
        }
    }
}

impl Bytes {
    fn read(&self, path: &Path, range: Range<usize>) -> Result<Cow<'static, [u8]>> {
        match self {
            Bytes::Embedded(bytes) => Ok(Cow::Borrowed(&bytes[range])),
            Bytes::Disk { file, opened } => {
                let mut bytes = vec![0; range.len()];
                opened.read(file, path, range.start, &mut bytes)?;
                Ok(Cow::Owned(bytes))
            }
        }
    }
}

/// What an opened file changes by when it is written to.
#[derive(PartialEq, Eq)]
struct Identity {
    length: u64,
    modified: Option<SystemTime>,
    /// Of content or attributes, which no program can set: seconds and nanoseconds.
    #[cfg(unix)]
    changed: (i64, i64),
}

impl Identity {
    fn of(file: &fs::File) -> io::Result<Identity> {
        let found = file.metadata()?;
        Ok(Identity {
            length: found.len(),
            modified: found.modified().ok(),
            #[cfg(unix)]
            changed: {
                use std::os::unix::fs::MetadataExt;
                (found.ctime(), found.ctime_nsec())
            },
        })
    }

    /// Fills `out` with the bytes from `at` on of a file that is still the one that was opened.
    fn read(&self, file: &fs::File, path: &Path, at: usize, out: &mut [u8]) -> Result<()> {
        let read = read_exact_at(file, out, at as u64);
        if read.as_ref().is_err_and(|error| error.kind() == ErrorKind::UnexpectedEof) {
            return Err(Error::file(path, "was cut off while it was read; start again once it is whole"));
        }
        read.map_err(Error::io("read", path))?;
        match Identity::of(file).map_err(Error::io("read", path))? == *self {
            true => Ok(()),
            false => Err(Error::file(path, "changed while it was read; start again")),
        }
    }
}

#[cfg(unix)]
fn read_exact_at(file: &fs::File, out: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, at)
}

#[cfg(windows)]
fn read_exact_at(file: &fs::File, mut out: &mut [u8], mut at: u64) -> io::Result<()> {
    while !out.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, out, at)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            read => (out, at) = (&mut out[read..], at + read as u64),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use std::io::Write;

    /// A file of 40 numbers, on disk.
    fn on_disk(folder: &Path) -> PathBuf {
        let path = folder.join("x.safetensors");
        fs::write(&path, testing::file(&[("x", &[40])])).unwrap();
        path
    }

    fn refused(file: &File, range: Range<usize>, why: &str) {
        for error in
            [file.read(&range).unwrap_err(), file.visit(range.clone(), |_| ()).unwrap_err(), file.digest().unwrap_err()]
        {
            let error = error.to_string();
            assert!(error.contains("x.safetensors") && error.contains(why) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn what_is_read_is_what_the_file_holds() {
        let folder = tempfile::tempdir().unwrap();
        let path = on_disk(folder.path());
        let bytes: &'static [u8] = fs::read(&path).unwrap().leak();
        let (disk, embedded) = (File::open(&path).unwrap(), File::embedded(path, bytes).unwrap());
        for range in [0..bytes.len(), 9..20, 5..5, bytes.len() - 1..bytes.len()] {
            assert_eq!(disk.read(&range).unwrap(), &bytes[range.clone()]);
            assert!(disk.visit(range.clone(), |read| read == &bytes[range.clone()]).unwrap());
            assert!(embedded.visit(range.clone(), |read| read == &bytes[range]).unwrap());
        }
        assert_eq!(disk.digest().unwrap(), embedded.digest().unwrap());
    }

    #[test]
    fn files_that_change_after_they_were_opened_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = on_disk(folder.path());
        let whole = fs::read(&path).unwrap();
        let file = File::open(&path).unwrap();
        let range = whole.len() - 8..whole.len();
        let write = || fs::OpenOptions::new().write(true).open(&path).unwrap();
        write().set_len(whole.len() as u64 - 4).unwrap();
        refused(&file, range.clone(), "was cut off while it was read");
        write().set_len(0).unwrap();
        refused(&file, range.clone(), "was cut off while it was read");
        // The same length and the same bytes, written anew.
        write().write_all(&whole).unwrap();
        refused(&file, range.clone(), "changed while it was read");
        write().set_len(whole.len() as u64 + 1).unwrap();
        refused(&file, range, "changed while it was read");
    }

    #[test]
    fn every_byte_counts_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        // More than two chunks.
        let path = folder.path().join("x.safetensors");
        let mut bytes = testing::file(&[("x", &[700_000])]).to_vec();
        let digest = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            File::open(&path).unwrap().digest().unwrap()
        };
        let first = digest(&bytes);
        let data = bytes.len() - 4 * 700_000;
        for at in [data, data + 1, CHUNK - 1, CHUNK, CHUNK + 77_777, bytes.len() / 2, bytes.len() - 1] {
            bytes[at] ^= 1;
            assert_ne!(digest(&bytes), first, "byte {at}");
            bytes[at] ^= 1;
        }
        assert_eq!(digest(&bytes), first);
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(one.install(|| digest(&bytes)), first);
    }

    #[cfg(unix)]
    #[test]
    fn links_that_point_nowhere_and_pipes_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("model.safetensors");
        std::os::unix::fs::symlink("../blobs/0123", &link).unwrap();
        let error = File::open(&link).err().unwrap().to_string();
        assert!(error.contains("is a link to ../blobs/0123, which is not there"), "{error}");
        for path in [Path::new("/dev/zero"), folder.path()] {
            let error = File::open(path).err().unwrap().to_string();
            assert!(error.ends_with("is not a regular file"), "{error}");
        }
    }
}
