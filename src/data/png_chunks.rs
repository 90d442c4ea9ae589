//! The chunks of a PNG file: those that make its pixels, and its text, which is unpacked up to a bound.

use flate2::Crc;
use flate2::read::ZlibDecoder;
use std::io::Read;

pub const SIGNATURE: [u8; 8] = *b"\x89PNG\r\n\x1a\n";

/// Most text chunks of a file: each costs memory however short it is.
const MOST_TEXTS: usize = 10_000;

/// A chunk as it lies in the file.
struct Chunk<'a> {
    kind: [u8; 4],
    data: &'a [u8],
    /// With its length, kind and checksum.
    whole: &'a [u8],
}

impl<'a> Chunk<'a> {
    /// The first chunk of the bytes.
    fn first(bytes: &'a [u8]) -> Result<Chunk<'a>, String> {
        let cut_short = || "it is cut short".to_string();
        let (length, rest) = bytes.split_first_chunk::<4>().ok_or_else(cut_short)?;
        let (kind, rest) = rest.split_first_chunk::<4>().ok_or_else(cut_short)?;
        let length = u32::from_be_bytes(*length) as usize;
        let (data, rest) = rest.split_at_checked(length).ok_or_else(cut_short)?;
        let checksum = rest.first_chunk::<4>().ok_or_else(cut_short)?;
        let chunk = Chunk { kind: *kind, data, whole: &bytes[..length + 12] };
        let mut found = Crc::new();
        found.update(&bytes[4..length + 8]);
        if chunk.matters() && found.sum().to_be_bytes() != *checksum {
            return Err(format!("its chunk {} is damaged", kind.escape_ascii()));
        }
        Ok(chunk)
    }

    /// Whether it makes pixels or is text: of no other is the checksum looked at.
    fn matters(&self) -> bool {
        self.kind[0].is_ascii_uppercase() || self.is_text()
    }

    fn is_text(&self) -> bool {
        [b"tEXt", b"zTXt", b"iTXt"].contains(&&self.kind)
    }
}

/// All chunks to the last one, IEND; what follows that is no part of the PNG. An error says what is broken.
fn chunks(bytes: &[u8]) -> impl Iterator<Item = Result<Chunk<'_>, String>> {
    let mut rest = bytes.strip_prefix(&SIGNATURE).ok_or_else(|| "it is no PNG".to_string());
    let mut done = false;
    std::iter::from_fn(move || {
        if done {
            return None;
        }
        let chunk = rest.clone().and_then(Chunk::first);
        match &chunk {
            Ok(found) => {
                done = found.kind == *b"IEND";
                rest = rest.as_ref().map(|rest| &rest[found.whole.len()..]).map_err(String::clone);
            }
            Err(_) => done = true,
        }
        Some(chunk)
    })
}

/// A PNG without what does not make its pixels.
pub struct Pixels {
    pub width: u32,
    pub height: u32,
    pub is_animated: bool,
    /// A file of the chunks that are left: colours, transparency, pixels and EXIF, which says how it is turned.
    pub bytes: Vec<u8>,
}

/// What of a PNG a decoder has to see: profiles and text, which may unfold to a thousand times their size, are not. An error says what
/// is broken.
pub fn pixels(bytes: &[u8]) -> Result<Pixels, String> {
    const KEPT: [&[u8; 4]; 6] = [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND"];
    let mut sides = None;
    let mut found = Pixels { width: 0, height: 0, is_animated: false, bytes: SIGNATURE.to_vec() };
    for chunk in chunks(bytes) {
        let chunk = chunk?;
        let side = |at: usize| chunk.data.get(at..at + 4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
        match &chunk.kind {
            b"IHDR" if sides.is_none() => sides = side(0).zip(side(4)),
            // The decoder takes the last colour for whole.
            b"PLTE" if !chunk.data.len().is_multiple_of(3) => return Err("its palette ends within a colour".into()),
            b"acTL" => found.is_animated = true,
            _ => {}
        }
        if KEPT.contains(&&chunk.kind) {
            found.bytes.extend_from_slice(chunk.whole);
        }
    }
    (found.width, found.height) = sides.ok_or("it has no header")?;
    Ok(found)
}

/// A text chunk.
pub struct Text<'a> {
    pub keyword: String,
    body: &'a [u8],
    is_packed: bool,
    is_latin1: bool,
}

/// The text chunks of a PNG in file order; one without a keyword is none. An error says what is broken.
pub fn texts(bytes: &[u8]) -> Result<Vec<Text<'_>>, String> {
    let mut found = vec![];
    for chunk in chunks(bytes) {
        let chunk = chunk?;
        if chunk.is_text() {
            found.extend(Text::of(&chunk));
        }
        if found.len() > MOST_TEXTS {
            return Err(format!("it has more than {MOST_TEXTS} text chunks"));
        }
    }
    Ok(found)
}

/// The text chunks before whatever is broken, a few at most.
pub fn texts_before_damage(bytes: &[u8]) -> impl Iterator<Item = Text<'_>> {
    let whole = chunks(bytes).map_while(Result::ok);
    whole.filter(Chunk::is_text).filter_map(|chunk| Text::of(&chunk)).take(MOST_TEXTS)
}

/// What stands before the first NUL, and after it.
fn split_at_nul(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().position(|&byte| byte == 0)?;
    Some((&bytes[..at], &bytes[at + 1..]))
}

/// PNG's own: one byte per character.
fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|&byte| char::from(byte)).collect()
}

impl<'a> Text<'a> {
    fn of(chunk: &Chunk<'a>) -> Option<Text<'a>> {
        let (keyword, rest) = split_at_nul(chunk.data).filter(|(keyword, _)| (1..80).contains(&keyword.len()))?;
        let (body, is_packed) = match &chunk.kind {
            b"zTXt" => (rest.get(1..)?, true),
            b"iTXt" => {
                // Whether it is packed, and how; its language; the keyword in that.
                let (flags, rest) = rest.split_at_checked(2)?;
                (split_at_nul(split_at_nul(rest)?.1)?.1, flags[0] != 0)
            }
            _ => (rest, false),
        };
        Some(Text { keyword: latin1(keyword), body, is_packed, is_latin1: chunk.kind != *b"iTXt" })
    }

    /// The text, of at most `most` bytes in the file or unpacked. An error says what is wrong with it.
    pub fn read(&self, most: usize) -> Result<String, String> {
        let mut unpacked = vec![];
        let bytes = if self.is_packed {
            let read = ZlibDecoder::new(self.body).take(most as u64 + 1).read_to_end(&mut unpacked);
            read.map_err(|_| "cannot be unpacked".to_string())?;
            &unpacked
        } else {
            self.body
        };
        match bytes.len() > most {
            true => Err(format!("is longer than {most} bytes")),
            false if self.is_latin1 => Ok(latin1(bytes)),
            false => String::from_utf8(bytes.to_vec()).map_err(|_| "is not UTF-8".to_string()),
        }
    }
}
