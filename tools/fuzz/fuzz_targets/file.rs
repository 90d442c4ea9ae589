//! A file for readers that want a path.

use std::path::PathBuf;

/// One file per process, in memory where the system has such a folder.
pub fn holding(bytes: &[u8]) -> PathBuf {
    let shared = PathBuf::from("/dev/shm");
    let folder = if shared.is_dir() { shared } else { std::env::temp_dir() };
    let path = folder.join(format!("rarebit-fuzz-{}", std::process::id()));
    std::fs::write(&path, bytes).expect("the temporary file is written");
    path
}
