//! Prompt lists: text files of one prompt per line.

use crate::{Error, Result, input};
use std::path::Path;

/// A million prompts of a page each.
const MOST_BYTES: u64 = 1 << 30;
/// Bytes of a prompt. Models read some hundreds; each prompt is kept, and written into its image.
const MOST_LINE: usize = 1 << 16;

/// Prompts of a file: one per line, blank lines skipped; with their line numbers from 1.
pub fn read(path: &Path) -> Result<Vec<(usize, String)>> {
    let bytes = input::read(path, MOST_BYTES)?;
    // Windows' editors write UTF-16 with a byte order mark, other programs without.
    let has_mark = bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]);
    let is_text = !bytes.contains(&0) && std::str::from_utf8(&bytes).is_ok();
    // A prompt may begin with what other text begins with, but no prompt begins a web page.
    if let Some(kind) = input::identify(&bytes).filter(|kind| !has_mark && (!is_text || *kind == input::WEB_PAGE)) {
        return Err(Error::file(path, format!("is {kind}, no list of prompts")));
    }
    if has_mark || bytes.contains(&0) {
        return Err(Error::file(path, "is UTF-16 text or no text; save it as UTF-8"));
    }
    let text = String::from_utf8(bytes).map_err(|_| Error::file(path, "not UTF-8 text"))?;
    let lines = text.trim_start_matches('\u{feff}').lines().enumerate();
    let prompts: Vec<_> =
        lines.filter(|(_, line)| !line.trim().is_empty()).map(|(i, line)| (i + 1, line.trim().to_string())).collect();
    if let Some((line, _)) = prompts.iter().find(|(_, prompt)| prompt.len() > MOST_LINE) {
        return Err(Error::file(
            path,
            format!("line {line}: is longer than {MOST_LINE} bytes; write one prompt per line"),
        ));
    }
    if prompts.is_empty() {
        return Err(Error::Usage(format!("{}: holds no prompt; write one per line", path.display())));
    }
    Ok(prompts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn lines_and_mistakes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.txt");
        fs::write(&path, "\u{feff}a red star\r\n\n  a blue ring  \n").unwrap();
        assert_eq!(read(&path).unwrap(), [(1, "a red star".to_string()), (3, "a blue ring".to_string())]);
        fs::write(&path, " \n\n").unwrap();
        assert_eq!(read(&path).unwrap_err().exit_code(), 2);
        let refused = |bytes: &[u8], what: &str| {
            fs::write(&path, bytes).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("prompts.txt") && error.contains(what) && !error.contains('\n'), "{error}");
        };
        refused(b"caf\xe9\n", "not UTF-8 text");
        refused(b"<!DOCTYPE html>\n<html>", "a web page (HTML)");
        refused(b"\x80\x02}q\0", "a PyTorch pickle");
        refused(b"\x89PNG\r\n\x1a\n\xff", "a PNG image");
        refused(format!("a\n\n{}\n", "b".repeat(MOST_LINE + 1)).as_bytes(), "line 3: is longer than 65536 bytes");
        fs::write(&path, format!("{}\n", "b".repeat(MOST_LINE))).unwrap();
        assert_eq!(read(&path).unwrap().len(), 1);
        fs::write(&path, "{red|blue} café\n[a star]\n").unwrap();
        assert_eq!(read(&path).unwrap().len(), 2);
        let utf16 =
            |bytes: fn(u16) -> [u8; 2]| "\u{feff}a red star\r\n".encode_utf16().flat_map(bytes).collect::<Vec<u8>>();
        for bytes in [utf16(u16::to_le_bytes), utf16(u16::to_be_bytes)] {
            refused(&bytes, "save it as UTF-8");
            refused(&bytes[2..], "save it as UTF-8");
        }
    }
}
