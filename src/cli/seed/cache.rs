//! `--cache`: a folder of what was made of reference images, a file each, that later runs read. A damaged file is as none.

use crate::cli::flags::device::DeviceFlags;
use crate::cli::{atomic, machine};
use crate::methods::seedselect::ReferenceCache;
use crate::weights::fingerprint;
use crate::{Error, Result, input};
use std::fs;
use std::path::{Path, PathBuf};

pub struct CacheFolder {
    path: PathBuf,
    /// What besides a key decides bits: this version, the device, the processor.
    machine: String,
}

/// Bytes before the numbers, which are little-endian f32: a hash of the key and of them.
const HEAD: usize = 8;

impl CacheFolder {
    /// Makes the folder where there is none.
    pub fn open(path: &Path, device: &DeviceFlags) -> Result<CacheFolder> {
        fs::create_dir_all(path).map_err(Error::io("create", path))?;
        let (version, processor) = (env!("CARGO_PKG_VERSION"), machine::processor());
        let machine = format!("{version} {:?} {:?} {processor}", device.device, device.hopper);
        Ok(CacheFolder { path: path.to_path_buf(), machine })
    }

    fn file(&self, key: &str) -> PathBuf {
        self.path.join(format!("{:016x}.row", hash(&format!("{} {key}", self.machine), &[])))
    }
}

fn hash(key: &str, numbers: &[u8]) -> u64 {
    fingerprint(key.bytes().chain(numbers.iter().copied()))
}

impl ReferenceCache for CacheFolder {
    fn read(&self, key: &str, len: usize) -> Option<Vec<f32>> {
        let bytes = input::read(&self.file(key), (HEAD + 4 * len) as u64).ok()?;
        let (head, numbers) = bytes.split_at_checked(HEAD)?;
        let is_whole = numbers.len() == 4 * len && head == hash(key, numbers).to_le_bytes();
        let numbers = numbers.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        is_whole.then(|| numbers.collect())
    }

    fn write(&self, key: &str, row: &[f32]) -> Result<()> {
        let numbers: Vec<u8> = row.iter().flat_map(|x| x.to_le_bytes()).collect();
        atomic::write(&self.file(key), |out| {
            out.write_all(&hash(key, &numbers).to_le_bytes())?;
            out.write_all(&numbers)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_rows_are_none_and_written_again() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheFolder { path: folder.path().to_path_buf(), machine: "m".into() };
        let row = [1.5, -0.0, f32::MIN_POSITIVE];
        assert_eq!(cache.read("key", 3), None);
        cache.write("key", &row).unwrap();
        assert_eq!(
            (cache.read("key", 3), cache.read("other", 3), cache.read("key", 2)),
            (Some(row.to_vec()), None, None)
        );
        let other = CacheFolder { machine: "n".into(), path: cache.path.clone() };
        assert_eq!(other.read("key", 3), None);
        let whole = fs::read(cache.file("key")).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            for damaged in [&whole[..at], &flipped, &[&whole[..], b"more"].concat()] {
                fs::write(cache.file("key"), damaged).unwrap();
                assert_eq!(cache.read("key", 3), None, "{at}");
            }
        }
        cache.write("key", &row).unwrap();
        assert_eq!(fs::read(cache.file("key")).unwrap(), whole);
    }
}
