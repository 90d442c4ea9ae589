//! One safetensors file: read by position, or embedded; its header is checked before any tensor is touched.
//!
//! Files are read, not mapped. A mapping spares the copy out of the system's cache, but when somebody truncates the file meanwhile the
//! process is ended (SIGBUS), and what somebody writes meanwhile is taken in unseen. A chunk is hashed as it is read, while it is
//! still in the processor's cache: what is known of a file's content is what the weights were made of, and costs no second pass. Measured
//! in turn on two cores, SD 1.5 (2.1 GB) is loaded from the system's cache in the time that its mapping took without any hash (1.75 s);
//! a pass of its own for the hash would add 0.13 s.

use super::header::{self, Header};
use crate::{Error, Result, input};
use rayon::prelude::*;
use std::cell::RefCell;
use std::fs;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;
use twox_hash::XxHash3_64;

/// Element type of a tensor as the file stores it.
pub use safetensors::Dtype as Stored;

/// Bytes that are read and hashed at once: enough for a disk, few for the second-level cache. Part of what a digest means.
const CHUNK: usize = 1 << 17;

/// Most bytes of a file: twenty times the largest model of the families built here. A sparse file may claim to have any number.
const FILE_CAP: u64 = 1 << 38;

/// Where the bytes are.
enum Bytes {
    Disk { file: fs::File, opened: Written },
    Embedded(&'static [u8]),
}

/// The chunk that a thread read last, as rows follow one another in it.
#[derive(Default)]
struct Chunk {
    /// File and number; none where reading failed.
    of: Option<(FileId, usize)>,
    bytes: Vec<u8>,
    /// What lies in several chunks, put together.
    joined: Vec<u8>,
}

thread_local! {
    static LAST: RefCell<Chunk> = RefCell::default();
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
    /// Of every chunk that was read.
    hashes: Vec<OnceLock<u64>>,
}

impl File {
    /// Opens the file at `path` and reads its header.
    ///
    /// Errors when it cannot be read or is not a well-formed safetensors file.
    pub fn open(path: &Path) -> Result<File> {
        let file = input::open(path)?;
        let opened = Written::of(&file).map_err(Error::io("read", path))?;
        if opened.length > FILE_CAP {
            return Err(Error::file(
                path,
                format!("is larger than {FILE_CAP} bytes, the most that a file of weights may have"),
            ));
        }
        let bytes = Bytes::Disk { file, opened };
        let read = |range: Range<usize>| {
            let mut found = vec![0; range.len()];
            bytes.read(path, range.start, &mut found).map(|()| found)
        };
        let malformed = |what: String| Error::file(path, what);
        let place = header::place(&read(0..bytes.len().min(header::START))?, bytes.len() as u64).map_err(malformed)?;
        let header = header::checked(&read(place)?, bytes.len() as u64).map_err(malformed)?;
        Ok(File::new(path.to_path_buf(), bytes, header))
    }

    /// A file compiled into the binary; `path` only serves messages.
    pub fn embedded(path: PathBuf, bytes: &'static [u8]) -> Result<File> {
        let header = header::parse_header(bytes).map_err(|what| Error::file(&path, what))?;
        Ok(File::new(path, Bytes::Embedded(bytes), header))
    }

    fn new(path: PathBuf, bytes: Bytes, header: Header) -> File {
        static OPENED: AtomicU64 = AtomicU64::new(0);
        let hashes = (0..bytes.len().div_ceil(CHUNK)).map(|_| OnceLock::new()).collect();
        File { id: FileId(OPENED.fetch_add(1, Ordering::Relaxed)), path, bytes, header, hashes }
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

    /// Gives `visit` the bytes of a tensor or of some of its rows, by their place in the file. `visit` must not come back here.
    ///
    /// Errors when they cannot be read, or the file is not any more what it was: for bytes that were read before their hash says so, for
    /// others the time at which the file was last written to.
    pub fn visit<R>(&self, range: Range<usize>, visit: impl FnOnce(&[u8]) -> R) -> Result<R> {
        if let Bytes::Embedded(bytes) = &self.bytes {
            return Ok(visit(&bytes[range]));
        }
        LAST.with_borrow_mut(|chunk| {
            let (first, end) = (range.start / CHUNK, range.end.div_ceil(CHUNK));
            let within = |n: usize| range.start.max(n * CHUNK) - n * CHUNK..range.end.min((n + 1) * CHUNK) - n * CHUNK;
            if end == first + 1 {
                self.load(first, chunk)?;
                return Ok(visit(&chunk.bytes[within(first)]));
            }
            chunk.joined.clear();
            for n in first..end {
                self.load(n, chunk)?;
                chunk.joined.extend_from_slice(&chunk.bytes[within(n)]);
            }
            let visited = visit(&chunk.joined);
            // A whole tensor should not stay.
            chunk.joined.truncate(CHUNK);
            chunk.joined.shrink_to(CHUNK);
            Ok(visited)
        })
    }

    /// A hash of the whole content: no cryptography. What was not read yet is, by all threads.
    pub fn digest(&self) -> Result<u64> {
        let hash = |n: usize| match self.hashes[n].get() {
            Some(&hash) => Ok(hash),
            None => LAST.with_borrow_mut(|chunk| self.load(n, chunk)),
        };
        let hashes = (0..self.hashes.len()).into_par_iter().map(hash).collect::<Result<Vec<u64>>>()?;
        Ok(XxHash3_64::oneshot(&hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect::<Vec<u8>>()))
    }

    /// Reads chunk number `n`, unless it is the one there, and gives its hash.
    fn load(&self, n: usize, chunk: &mut Chunk) -> Result<u64> {
        let is_there = chunk.of == Some((self.id, n));
        if let (true, Some(&hash)) = (is_there, self.hashes[n].get()) {
            return Ok(hash);
        }
        chunk.of = None;
        chunk.bytes.resize(CHUNK.min(self.bytes.len() - n * CHUNK), 0);
        self.bytes.read(&self.path, n * CHUNK, &mut chunk.bytes)?;
        let hash = XxHash3_64::oneshot(&chunk.bytes);
        let first = match self.hashes[n].get() {
            Some(&first) => first,
            None if !self.bytes.are_as_opened().map_err(Error::io("read", &self.path))? => return Err(self.changed()),
            None => *self.hashes[n].get_or_init(|| hash),
        };
        if first != hash {
            return Err(self.changed());
        }
        chunk.of = Some((self.id, n));
        Ok(hash)
    }

    fn changed(&self) -> Error {
        Error::file(&self.path, "changed while it was read; start again")
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
    fn len(&self) -> usize {
        match self {
            Bytes::Disk { opened, .. } => opened.length as usize,
            Bytes::Embedded(bytes) => bytes.len(),
        }
    }

    /// Fills `out` with the bytes from `at` on.
    fn read(&self, path: &Path, at: usize, out: &mut [u8]) -> Result<()> {
        match self {
            Bytes::Disk { file, .. } => read_exact_at(file, out, at as u64).map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof => {
                    Error::file(path, "was cut off while it was read; start again once it is whole")
                }
                _ => Error::io("read", path)(error),
            }),
            Bytes::Embedded(bytes) => {
                out.copy_from_slice(&bytes[at..][..out.len()]);
                Ok(())
            }
        }
    }

    /// Whether nobody has written to the file since it was opened.
    fn are_as_opened(&self) -> io::Result<bool> {
        match self {
            Bytes::Disk { file, opened } => Ok(Written::of(file)? == *opened),
            Bytes::Embedded(_) => Ok(true),
        }
    }
}

/// What becomes of a file when somebody writes to it. A new name or owner, and that it is deleted, change nothing here.
#[derive(PartialEq, Eq)]
struct Written {
    length: u64,
    at: Option<SystemTime>,
}

impl Written {
    fn of(file: &fs::File) -> io::Result<Written> {
        let found = file.metadata()?;
        Ok(Written { length: found.len(), at: found.modified().ok() })
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

    /// A file of so many numbers.
    fn on_disk(folder: &Path, numbers: usize) -> PathBuf {
        let path = folder.join("x.safetensors");
        fs::write(&path, testing::file(&[("x", &[numbers])])).unwrap();
        path
    }

    fn bytes(file: &File, range: Range<usize>) -> Result<Vec<u8>> {
        file.visit(range, <[u8]>::to_vec)
    }

    #[test]
    fn what_is_read_is_what_the_file_holds() {
        let folder = tempfile::tempdir().unwrap();
        // Two chunks and a piece of a third.
        let path = on_disk(folder.path(), 2 * CHUNK / 4 + 1000);
        let whole: &'static [u8] = fs::read(&path).unwrap().leak();
        let (disk, embedded) = (File::open(&path).unwrap(), File::embedded(path, whole).unwrap());
        let (chunk, end) = (CHUNK, whole.len());
        let ranges = [
            0..end,
            9..20,
            5..5,
            chunk - 1..chunk,
            chunk - 1..chunk + 1,
            chunk..chunk + 7,
            7..end - 7,
            end - 1..end,
            end..end,
        ];
        for range in ranges.clone().into_iter().chain(ranges) {
            assert_eq!(bytes(&disk, range.clone()).unwrap(), &whole[range.clone()], "{range:?}");
            assert_eq!(bytes(&embedded, range.clone()).unwrap(), &whole[range]);
        }
        assert_eq!(disk.digest().unwrap(), embedded.digest().unwrap());
    }

    #[test]
    fn files_that_change_after_they_were_opened_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = on_disk(folder.path(), 40);
        let whole = fs::read(&path).unwrap();
        let file = File::open(&path).unwrap();
        // Longer than the steps of the file system's clock.
        std::thread::sleep(std::time::Duration::from_millis(50));
        let refused = |why: &str| {
            for error in [bytes(&file, whole.len() - 8..whole.len()).unwrap_err(), file.digest().unwrap_err()] {
                let error = error.to_string();
                assert!(error.contains("x.safetensors") && error.contains(why) && !error.contains('\n'), "{error}");
            }
        };
        let write = || fs::OpenOptions::new().write(true).open(&path).unwrap();
        write().set_len(whole.len() as u64 - 4).unwrap();
        refused("was cut off while it was read");
        write().set_len(0).unwrap();
        refused("was cut off while it was read");
        // The same length and the same bytes, written anew.
        write().write_all(&whole).unwrap();
        refused("changed while it was read");
        write().set_len(whole.len() as u64 + 1).unwrap();
        refused("changed while it was read");
    }

    #[test]
    fn what_was_read_before_is_known_by_its_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = on_disk(folder.path(), CHUNK);
        let mut whole = fs::read(&path).unwrap();
        let file = File::open(&path).unwrap();
        let digest = file.digest().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        let (first, last) = (0..CHUNK, whole.len() - 8..whole.len());
        // Back from the other chunk, so that it is read anew.
        let again = || bytes(&file, last.clone()).and_then(|_| bytes(&file, first.clone()));
        fs::write(&path, &whole).unwrap();
        assert_eq!(again().unwrap(), &whole[..CHUNK], "written anew, the same");
        whole[CHUNK - 1] ^= 1;
        fs::write(&path, &whole).unwrap();
        assert!(again().unwrap_err().to_string().ends_with("changed while it was read; start again"));
        fs::remove_file(&path).unwrap();
        assert_eq!(file.digest().unwrap(), digest, "of what was read, and never of what became of it");
    }

    #[test]
    fn no_file_is_larger_than_any_model() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        fs::File::create(&path).unwrap().set_len(FILE_CAP + 1).unwrap();
        assert!(File::open(&path).err().unwrap().to_string().contains("is larger than"));
    }

    #[test]
    fn every_byte_counts_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = on_disk(folder.path(), 700_000);
        let mut whole = fs::read(&path).unwrap();
        let digest = |whole: &[u8]| {
            fs::write(&path, whole).unwrap();
            File::open(&path).unwrap().digest().unwrap()
        };
        let (first, data) = (digest(&whole), whole.len() - 4 * 700_000);
        for at in [data, data + 1, CHUNK - 1, CHUNK, CHUNK + 77_777, whole.len() / 2, whole.len() - 1] {
            whole[at] ^= 1;
            assert_ne!(digest(&whole), first, "byte {at}");
            whole[at] ^= 1;
        }
        assert_eq!(digest(&whole), first);
        // Whatever was read before, and however many threads there are.
        let file = File::open(&path).unwrap();
        bytes(&file, CHUNK + 5..3 * CHUNK + 5).unwrap();
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(one.install(|| file.digest().unwrap()), first);
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
