//! Files that users hand in: regular ones only, read up to a bound, and named as what they are where they are something else.

use crate::{Error, Result};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::Path;

/// Opens a regular file. A pipe, a device, a socket or a folder is refused before it is opened: opening a pipe waits for its writer,
/// and a device may never end.
pub fn open(path: &Path) -> Result<File> {
    let found = match (fs::metadata(path), fs::read_link(path)) {
        (Err(error), Ok(to)) if error.kind() == ErrorKind::NotFound => {
            let to = to.display();
            return Err(Error::file(path, format!("is a link to {to}, which is not there; an interrupted download?")));
        }
        (found, _) => found.map_err(Error::io("read", path))?,
    };
    if !found.is_file() {
        return Err(Error::file(path, "is not a regular file"));
    }
    File::open(path).map_err(Error::io("read", path))
}

/// The bytes of a regular file of at most `most` bytes.
pub fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // The length is not asked for beforehand: a file may grow while it is read.
    open(path)?.take(most + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > most {
        return Err(Error::file(path, format!("is larger than {most} bytes, the most such a file may have")));
    }
    Ok(bytes)
}

/// As [`read`]; `None` where there is no such file.
pub fn read_if_there(path: &Path, most: u64) -> Result<Option<Vec<u8>>> {
    match read(path, most) {
        Ok(bytes) => Ok(Some(bytes)),
        // A link that points nowhere is another error: a file somebody meant to be there.
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The text of a regular UTF-8 file of at most `most` bytes.
pub fn read_text(path: &Path, most: u64) -> Result<String> {
    String::from_utf8(read(path, most)?).map_err(|error| match identify(error.as_bytes()) {
        Some(kind) => Error::file(path, format!("is {kind}, not UTF-8 text")),
        None => Error::file(path, "is not UTF-8 text"),
    })
}

/// JSON as Python's `json` writes it: `NaN`, `Infinity` and `-Infinity`, which JSON does not have, become strings of that name, so
/// that an entry nobody needs harms nothing and one that should be a number is refused by whoever reads it.
pub fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value> {
    from_json(path, bytes)
}

/// As [`parse_json`], of a certain type.
pub fn from_json<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    let malformed = |error: serde_json::Error| match identify(bytes) {
        Some(kind) if kind != JSON => Error::file(path, format!("is {kind}, not JSON")),
        _ => Error::file(path, format!("malformed JSON: {error}")),
    };
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    serde_json::from_slice(bytes).or_else(|error| match quote_non_numbers(bytes) {
        Some(quoted) => serde_json::from_slice(&quoted).map_err(malformed),
        None => Err(malformed(error)),
    })
}

/// Puts `NaN`, `Infinity` and `-Infinity` outside of strings into quotes; `None` where there is none.
fn quote_non_numbers(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut quoted = Vec::with_capacity(bytes.len() + 16);
    let (mut at, mut in_string, mut found) = (0, false, false);
    while at < bytes.len() {
        let rest = &bytes[at..];
        let word: &[u8] = match in_string {
            true if rest[0] == b'\\' => &rest[..rest.len().min(2)],
            true => &rest[..1],
            false => {
                [&b"-Infinity"[..], b"Infinity", b"NaN"].into_iter().find(|w| rest.starts_with(w)).unwrap_or(&rest[..1])
            }
        };
        if word == b"\"" {
            in_string = !in_string;
        }
        let is_number = !in_string && word.len() > 2;
        found |= is_number;
        let quote: &[u8] = if is_number { b"\"" } else { b"" };
        [quote, word, quote].into_iter().for_each(|part| quoted.extend_from_slice(part));
        at += word.len();
    }
    found.then_some(quoted)
}

const JSON: &str = "JSON text";
pub const WEB_PAGE: &str = "a web page (HTML)";

/// What a file is by its first bytes, with an article; `None` for what is not known, and for other text.
pub fn identify(bytes: &[u8]) -> Option<&'static str> {
    let start = &bytes[..bytes.len().min(4096)];
    let magic = |at: usize, mark: &[u8]| start.get(at..at + mark.len()) == Some(mark);
    let known: [(&[u8], &str); 19] = [
        (b"\xff\xd8\xff", "a JPEG image"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"GIF8", "a GIF image"),
        (b"BM", "a BMP image"),
        (b"GGUF", "a GGUF file"),
        (b"lmgg", "a GGML file"),
        (b"tjgg", "a GGML file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x93NUMPY", "a NumPy array"),
        (b"version https://git-lfs", "a Git LFS pointer"),
        (b"\x1f\x8b", "a gzip archive"),
        (b"BZh", "a bzip2 archive"),
        (b"\x28\xb5\x2f\xfd", "a zstd archive"),
        (b"\xfd7zXZ", "an xz archive"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!", "a RAR archive"),
        (b"\x7fELF", "a program"),
        (b"%PDF", "a PDF document"),
        (b"\xff\xfe", "UTF-16 text"),
    ];
    if magic(0, b"RIFF") && magic(8, b"WEBP") {
        return Some("a WebP image");
    }
    if magic(4, b"ftypavif") || magic(4, b"ftypheic") {
        return Some("an AVIF or HEIC image");
    }
    if magic(257, b"ustar") {
        return Some("a tar archive");
    }
    if magic(0, b"PK\x03\x04") {
        // torch.save writes `NAME/data.pkl` as the first entry.
        let is_pickle = start.windows(8).any(|name| name == b"data.pkl");
        return Some(if is_pickle { "a PyTorch pickle" } else { "a ZIP archive" });
    }
    if start.len() > 1 && start[0] == 0x80 && (2..=5).contains(&start[1]) {
        return Some("a PyTorch pickle");
    }
    if let Some((_, kind)) = known.iter().find(|(mark, _)| start.starts_with(mark)) {
        return Some(kind);
    }
    if start.is_empty() {
        return Some("an empty file");
    }
    if start.len() > 8 && start.iter().all(|&byte| byte == 0) {
        return Some("a file that begins with zeros (an unfinished download?)");
    }
    let text = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start).trim_ascii_start();
    let lower: Vec<u8> = text.iter().take(64).map(u8::to_ascii_lowercase).collect();
    match text.first() {
        Some(b'<') if lower.starts_with(b"<!doctype html") || lower.starts_with(b"<html") => Some(WEB_PAGE),
        Some(b'<') if lower.starts_with(b"<?xml") => Some("XML text"),
        Some(b'{' | b'[') => Some(JSON),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_of_bounded_size() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        assert!(read_if_there(&path, 4).unwrap().is_none());
        fs::write(&path, b"four").unwrap();
        assert_eq!(read(&path, 4).unwrap(), b"four");
        let error = read(&path, 3).unwrap_err().to_string();
        assert!(error.ends_with("is larger than 3 bytes, the most such a file may have"), "{error}");
        let error = read(folder.path(), 3).unwrap_err().to_string();
        assert!(error.ends_with("is not a regular file"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn sockets_devices_and_dangling_links_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (link, socket) = (folder.path().join("link"), folder.path().join("socket"));
        std::os::unix::fs::symlink(folder.path().join("blob"), &link).unwrap();
        assert!(
            read_if_there(&link, 9).unwrap_err().to_string().ends_with("which is not there; an interrupted download?")
        );
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for path in [socket.as_path(), Path::new("/dev/zero")] {
            assert!(read(path, 9).unwrap_err().to_string().ends_with("is not a regular file"));
        }
    }

    #[test]
    fn json_as_python_writes_it() {
        let parse = |text: &str| parse_json(Path::new("config.json"), text.as_bytes());
        let found =
            parse(r#"{"a": -Infinity, "b": [NaN, Infinity], "NaN \" Infinity": "-Infinity", "c": null}"#).unwrap();
        let expected =
            serde_json::json!({"a": "-Infinity", "b": ["NaN", "Infinity"], "NaN \" Infinity": "-Infinity", "c": null});
        assert_eq!(found, expected);
        assert_eq!(parse("\u{feff}{}").unwrap(), serde_json::json!({}));
        for wrong in ["{\"a\": NaNs}", "{\"a\": --Infinity}", "{\"a\": \"NaN}", "{", "NaN\"", "\\"] {
            let error = parse(wrong).unwrap_err().to_string();
            assert!(error.starts_with("config.json: ") && !error.contains('\n'), "{error}");
        }
        assert!(parse("<!DOCTYPE html>").unwrap_err().to_string().contains("is a web page (HTML), not JSON"));
    }

    #[test]
    fn files_are_named_as_what_they_are() {
        for (bytes, kind) in [
            (&b"\n <HTML lang=en>"[..], "a web page (HTML)"),
            (b"{\"error\": 401}", JSON),
            (b"\xff\xd8\xff\xe0", "a JPEG image"),
            (b"RIFF....WEBPVP8 ", "a WebP image"),
            (b"PK\x03\x04........archive/data.pkl", "a PyTorch pickle"),
            (b"PK\x03\x04........readme.txt", "a ZIP archive"),
            (b"\x80\x02}q\x00", "a PyTorch pickle"),
            (b"GGUF\x03", "a GGUF file"),
            (b"", "an empty file"),
            (&[0; 9], "a file that begins with zeros (an unfinished download?)"),
        ] {
            assert_eq!(identify(bytes), Some(kind));
        }
        assert_eq!(identify(b"a red star"), None);
    }
}
