//! One safetensors file: its bytes (mapped or embedded) and its header, checked in full before any tensor is touched.

use crate::{Error, Result};
use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Element type of a tensor as the file stores it.
pub use safetensors::Dtype as Stored;

/// Longest header accepted, in bytes; the limit of the format's own library.
const HEADER_CAP: u64 = 100_000_000;

/// The header of a safetensors file.
#[derive(Debug, Deserialize)]
pub struct Header {
    #[serde(default, rename = "__metadata__")]
    pub metadata: HashMap<String, String>,
    /// Type, shape and byte range of every tensor; the ranges count from the start of the file.
    #[serde(flatten)]
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// Reads and checks the header of a whole safetensors file given as bytes.
///
/// Afterwards every range lies inside `bytes`, has the size its shape and type say, and overlaps no other.
/// The error is one line without the file's name.
pub fn parse_header(bytes: &[u8]) -> Result<Header, String> {
    let length = match bytes.first_chunk::<8>() {
        Some(first) => u64::from_le_bytes(*first),
        None => return Err(format!("{} bytes is too short for a safetensors file", bytes.len())),
    };
    if length > HEADER_CAP {
        return Err(not_safetensors(bytes));
    }
    let start = 8 + length as usize;
    let Some(json) = bytes.get(8..start) else {
        return Err(format!("the header needs {start} bytes, the file has {}: truncated download?", bytes.len()));
    };
    let mut header: Header = serde_json::from_slice(json)
        .map_err(|e| format!("malformed safetensors header: {}", e.to_string().replace(char::is_control, " ")))?;
    let end = check_offsets(&mut header.tensors, start)?;
    match bytes.len() {
        have if have < end => Err(format!("the header says {end} bytes, the file has {have}: truncated download?")),
        have if have > end => {
            Err(format!("the header says {end} bytes, the file has {have}: not one safetensors file"))
        }
        _ => Ok(header),
    }
}

/// Checks that the tensors follow each other without gap or overlap and moves their offsets by `start`; returns the
/// end.
fn check_offsets(tensors: &mut BTreeMap<String, TensorInfo>, start: usize) -> Result<usize, String> {
    let mut order: Vec<_> = tensors.iter_mut().collect();
    order.sort_by_key(|(_, info)| info.data_offsets);
    let mut end = 0usize;
    for (name, info) in order {
        let (from, to) = info.data_offsets;
        // Names end up in messages of one line.
        if name.contains(char::is_control) {
            return Err(format!("tensor {name:?}: control characters in its name"));
        }
        if from != end || to < from {
            return Err(format!("tensor '{name}': bytes {from}..{to} overlap another tensor or leave a gap"));
        }
        if tensor_bytes(info) != Some(to - from) {
            let TensorInfo { dtype, shape, .. } = info;
            return Err(format!("tensor '{name}': {dtype} {shape:?} does not fill its {} bytes", to - from));
        }
        end = to;
        let place = from.checked_add(start).zip(to.checked_add(start));
        info.data_offsets = place.ok_or_else(|| format!("tensor '{name}': its offset is absurd"))?;
    }
    end.checked_add(start).ok_or_else(|| "the tensors' offsets are absurd".to_string())
}

/// Bytes a tensor of this shape and type takes; `None` on overflow or a broken byte.
fn tensor_bytes(info: &TensorInfo) -> Option<usize> {
    let elements = info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    let bits = elements.checked_mul(info.dtype.bitsize())?;
    (bits % 8 == 0).then_some(bits / 8)
}

/// Names what else the file may be; all of these give an absurd header length.
fn not_safetensors(bytes: &[u8]) -> String {
    let seen = match bytes {
        [b'P', b'K', 3, 4, ..] | [0x80, 2..=5, ..] => "a PyTorch pickle; convert it to safetensors",
        [b'G', b'G', b'U', b'F', ..] => "a GGUF file; give a safetensors checkpoint",
        _ if bytes.starts_with(b"version https://git-lfs") => "a Git LFS pointer; fetch the file it stands for",
        _ => "its header length is absurd",
    };
    format!("not a safetensors file: {seen}")
}

/// FNV-1a, 64 bits.
pub fn fingerprint(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Parses a JSON configuration file; the error names `path`.
pub fn parse_json(path: &Path, bytes: &[u8]) -> Result<serde_json::Value> {
    serde_json::from_slice(bytes).map_err(|e| Error::file(path, format!("malformed JSON: {e}")))
}

/// Where the bytes are.
enum Bytes {
    /// A read-only private mapping. Should someone truncate the file meanwhile, touching the lost pages ends the
    /// process.
    Mapped(memmap2::Mmap),
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
    /// Maps the file at `path`.
    ///
    /// Errors when it cannot be read or is not a well-formed safetensors file.
    pub fn open(path: &Path) -> Result<File> {
        let file = fs::File::open(path).map_err(Error::io("read", path))?;
        // Mapping a directory or a pipe fails with a message that helps nobody.
        if !file.metadata().map_err(Error::io("read", path))?.is_file() {
            return Err(Error::file(path, "is not a regular file"));
        }
        Self::new(path.to_path_buf(), Bytes::Mapped(map(&file).map_err(Error::io("read", path))?))
    }

    /// A file compiled into the binary; `path` only serves messages.
    pub fn embedded(path: PathBuf, bytes: &'static [u8]) -> Result<File> {
        Self::new(path, Bytes::Embedded(bytes))
    }

    fn new(path: PathBuf, bytes: Bytes) -> Result<File> {
        let header = parse_header(slice(&bytes)).map_err(|what| Error::file(&path, what))?;
        static OPENED: AtomicU64 = AtomicU64::new(0);
        Ok(File { id: FileId(OPENED.fetch_add(1, Ordering::Relaxed)), path, bytes, header })
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

    /// The bytes of a tensor or of some of its rows, by their place in the file; empty for a range the header does
    /// not hold.
    pub fn bytes(&self, range: &Range<usize>) -> &[u8] {
        slice(&self.bytes).get(range.clone()).unwrap_or(&[])
    }

    /// The file's length and 64 samples of 4 KiB spread over it: enough to tell files apart without reading them.
    pub fn samples(&self) -> impl Iterator<Item = u8> {
        const COUNT: usize = 64;
        const SIZE: usize = 4096;
        let bytes = slice(&self.bytes);
        let starts = (0..COUNT).map(move |i| bytes.len().saturating_sub(SIZE) * i / (COUNT - 1));
        let samples = starts.flat_map(move |at| &bytes[at..bytes.len().min(at + SIZE)]).copied();
        (bytes.len() as u64).to_le_bytes().into_iter().chain(samples)
    }

    /// Tells the system that the bytes are needed soon, so that it reads them while others are worked on. Best effort.
    pub fn prefetch(&self, range: &Range<usize>) {
        match &self.bytes {
            Bytes::Mapped(mapped) => will_need(mapped, range),
            Bytes::Embedded(_) => {}
        }
    }

    /// Tells the system that the bytes are not needed soon, so that they leave the resident memory.
    ///
    /// Reading them again later is correct, only slower. Best effort: errors and other systems are ignored.
    pub fn release(&self) {
        match &self.bytes {
            Bytes::Mapped(mapped) => forget(mapped),
            Bytes::Embedded(_) => {}
        }
    }
}

fn slice(bytes: &Bytes) -> &[u8] {
    match bytes {
        Bytes::Mapped(mapped) => mapped,
        Bytes::Embedded(bytes) => bytes,
    }
}

#[allow(unsafe_code)]
fn map(file: &fs::File) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: the mapping is read-only and private, and checkpoints are not written while they are in use. A writer
    // could change the numbers we read (any bit pattern is a valid number) or truncate the file (the process gets
    // SIGBUS).
    unsafe { memmap2::Mmap::map(file) }
}

#[cfg(unix)]
#[allow(unsafe_code)]
fn forget(mapped: &memmap2::Mmap) {
    // SAFETY: the mapping is backed by a file and never written, so dropped pages come back with the same content.
    // A failure only leaves the pages resident.
    let _ = unsafe { mapped.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
}

#[cfg(not(unix))]
fn forget(_: &memmap2::Mmap) {}

#[cfg(unix)]
fn will_need(mapped: &memmap2::Mmap, range: &Range<usize>) {
    // A failure only leaves the pages to be read when they are touched.
    let _ = mapped.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
}

#[cfg(not(unix))]
fn will_need(_: &memmap2::Mmap, _: &Range<usize>) {}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with this header and `data` zero bytes after it.
    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn refused(bytes: &[u8], why: &str) {
        match parse_header(bytes) {
            Ok(_) => panic!("accepted a header that should be refused: {why}"),
            Err(what) => assert!(what.contains(why) && !what.contains('\n'), "{what:?} lacks {why:?}"),
        }
    }

    const TWO: &str = r#"{"__metadata__":{"a":"b"},
        "x":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
        "y":{"dtype":"F16","shape":[],"data_offsets":[24,26]}}"#;

    #[test]
    fn good_header_gives_ranges_in_the_file() {
        let bytes = file(TWO, 26);
        let header = parse_header(&bytes).unwrap();
        assert_eq!(header.metadata["a"], "b");
        assert_eq!(header.tensors["y"].data_offsets, (bytes.len() - 2, bytes.len()));
    }

    #[test]
    fn truncated_and_padded_files_are_refused() {
        let bytes = file(TWO, 26);
        for n in 0..bytes.len() {
            assert!(parse_header(&bytes[..n]).is_err(), "{n} bytes");
        }
        refused(&bytes[..bytes.len() - 1], "truncated download?");
        refused(&bytes[..20], "truncated download?");
        refused(&bytes[..5], "too short");
        refused(&file(TWO, 27), "not one safetensors file");
    }

    #[test]
    fn malformed_headers_are_refused() {
        let one = |dtype: &str, shape: &str, offsets: &str| {
            file(&format!(r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#), 24)
        };
        assert!(parse_header(&one("F32", "[2,3]", "[0,24]")).is_ok());
        refused(&one("F32", "[2,2]", "[0,24]"), "tensor 'x': F32 [2, 2] does not fill its 24 bytes");
        refused(&one("Q7", "[2,3]", "[0,24]"), "malformed");
        refused(&one("F32", "[2,3]", "[24,0]"), "gap");
        refused(&one("F32", "[2,3]", "[4,28]"), "gap");
        refused(&one("F32", "[2,-3]", "[0,24]"), "malformed");
        refused(&one("F32", "[4611686018427387904,4]", "[0,24]"), "does not fill");
        refused(&one("U8", "[2305843009213693951]", "[0,2305843009213693951]"), "truncated");
        refused(&file(r#"{"a\nb":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#, 0), "control characters");
        refused(&one("a\\nb", "[2,3]", "[0,24]"), "malformed");
        refused(&file("[", 0), "malformed");
        refused(&file("\u{7f}{}", 0), "malformed");
        let overlap = TWO.replace("[24,26]", "[22,24]");
        refused(&file(&overlap, 26), "overlap");
    }

    #[test]
    fn offsets_near_the_end_of_the_address_space_do_not_overflow() {
        let mut entries = Vec::new();
        let step = (1u64 << 61) - 1;
        for i in 0..8u64 {
            entries.push(format!(
                r#""{i}":{{"dtype":"U8","shape":[{step}],"data_offsets":[{},{}]}}"#,
                i * step,
                (i + 1) * step
            ));
        }
        assert!(parse_header(&file(&format!("{{{}}}", entries.join(",")), 0)).is_err());
    }

    #[test]
    fn other_file_kinds_are_named() {
        refused(b"version https://git-lfs.github.com/spec/v1", "Git LFS");
        refused(b"PK\x03\x04............", "PyTorch pickle");
        refused(&[0xff; 16], "absurd");
    }
}
