//! The header of a safetensors file, checked in full before any tensor is touched; a file that is none is named as what it is.

use crate::input;
use safetensors::tensor::{TensorInfo, TensorView};
use serde::{Deserialize, Deserializer};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Longest header accepted, in bytes; the limit of the format's own library.
const HEADER_CAP: u64 = 100_000_000;

/// Bytes from a file's start that [`place`] and [`not_safetensors`] look at.
pub const START: usize = 4096;

/// The header of a safetensors file.
#[derive(Debug, Deserialize)]
pub struct Header {
    #[serde(default, rename = "__metadata__", deserialize_with = "none_if_null")]
    pub metadata: HashMap<String, String>,
    /// Type, shape and byte range of every tensor; the ranges count from the start of the file.
    #[serde(flatten)]
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl Header {
    /// A tensor of the file `bytes`, whose header this is.
    pub fn tensor<'a>(&self, bytes: &'a [u8], name: &str) -> Option<TensorView<'a>> {
        let TensorInfo { dtype, shape, data_offsets: (start, end) } = self.tensors.get(name)?;
        TensorView::new(*dtype, shape.clone(), bytes.get(*start..*end)?).ok()
    }
}

/// Some tools write `"__metadata__": null` where there is none.
fn none_if_null<'de, D: Deserializer<'de>>(from: D) -> Result<HashMap<String, String>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// Reads and checks the header of a whole safetensors file given as bytes.
///
/// Afterwards every range lies inside `bytes`, has the size its shape and type say, and overlaps no other.
/// The error is one line without the file's name.
pub fn parse_header(bytes: &[u8]) -> Result<Header, String> {
    let total = bytes.len() as u64;
    let range = place(&bytes[..bytes.len().min(START)], total)?;
    checked(&bytes[range], total)
}

/// Where the header's JSON lies in a file of `total` bytes, of which `start` is the first [`START`] or all.
pub fn place(start: &[u8], total: u64) -> Result<Range<usize>, String> {
    let length =
        start.first_chunk::<8>().map(|first| u64::from_le_bytes(*first)).filter(|&length| length <= HEADER_CAP);
    // The format wants a brace right after the length.
    let Some(length) = length.filter(|_| start.get(8).is_none_or(|&byte| byte == b'{')) else {
        return Err(not_safetensors(start));
    };
    let end = 8 + length;
    if end > total {
        return Err(format!("the header needs {end} bytes, the file has {total}: truncated download?"));
    }
    Ok(8..end as usize)
}

/// The header of a file of `total` bytes whose JSON is `json`, which begins at byte 8.
pub fn checked(json: &[u8], total: u64) -> Result<Header, String> {
    let mut header: Header = serde_json::from_slice(json)
        .map_err(|e| format!("malformed safetensors header: {}", e.to_string().replace(char::is_control, " ")))?;
    let end = check_offsets(&mut header.tensors, 8 + json.len())? as u64;
    if total < end {
        return Err(format!("the header says {end} bytes, the file has {total}: truncated download?"));
    }
    if total > end {
        return Err(format!("the header says {end} bytes, the file has {total}: not one safetensors file"));
    }
    Ok(header)
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

/// What a file in the place of a safetensors file is, by its first bytes, and what to do about it: what follows the file's name in a
/// message of one line.
pub fn not_safetensors(start: &[u8]) -> String {
    const ADVICE: [(&str, &str); 9] = [
        ("pickle", "convert it to safetensors"),
        ("GG", "give a safetensors checkpoint of the model"),
        ("Git LFS", "fetch the file it stands for (git lfs pull)"),
        ("web page", "download it again: a server answered with a page"),
        (
            "text",
            "give the file of weights or the folder this belongs to; if it was downloaded, a server answered with text",
        ),
        ("archive", "unpack it"),
        ("an empty file", "download it again"),
        ("begins with zeros", "download it again"),
        ("", "give the file of weights"),
    ];
    let Some(kind) = input::identify(start).or_else(|| is_text(start).then_some("text")) else {
        return "is not a safetensors file: its first bytes are not the length of a header".into();
    };
    let advice = ADVICE.iter().find(|(part, _)| kind.contains(part)).map_or("", |(_, advice)| advice);
    format!("is {kind}, not a safetensors file; {advice}")
}

/// Whether bytes are the start of UTF-8 text, which may end inside a character.
fn is_text(start: &[u8]) -> bool {
    let is_utf8 = std::str::from_utf8(start).map_or_else(|error| error.error_len().is_none(), |_| true);
    is_utf8 && start.iter().all(|&byte| byte >= b' ' || byte.is_ascii_whitespace())
}

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
        for metadata in ["null", "{}"] {
            let bytes = file(&TWO.replace(r#"{"a":"b"}"#, metadata), 26);
            assert!(parse_header(&bytes).unwrap().metadata.is_empty());
        }
    }

    #[test]
    fn truncated_and_padded_files_are_refused() {
        let bytes = file(TWO, 26);
        for n in 0..bytes.len() {
            assert!(parse_header(&bytes[..n]).is_err(), "{n} bytes");
        }
        refused(&bytes[..bytes.len() - 1], "truncated download?");
        refused(&bytes[..20], "truncated download?");
        refused(&bytes[..5], "not a safetensors file");
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
        refused(&file("{", 0), "malformed");
        refused(&file(r#"{"__metadata__":7}"#, 0), "malformed");
        refused(&file("[", 0), "not a safetensors file");
        refused(&file("\u{7f}{}", 0), "not a safetensors file");
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
        for (bytes, kind, advice) in [
            (&b"version https://git-lfs.github.com/spec/v1"[..], "a Git LFS pointer", "git lfs pull"),
            (b"PK\x03\x04............archive/data.pkl", "a PyTorch pickle", "convert"),
            (b"PK\x03\x04\0\0\0\0........archive/data.pkl", "a PyTorch pickle", "convert"),
            (b"\x80\x02}q\x00X\x05\x00", "a PyTorch pickle", "convert"),
            (b"GGUF\x03\0\0\0\0", "a GGUF file", "give a safetensors checkpoint"),
            (b"<!doctype html><title>404</title>", "a web page (HTML)", "server"),
            (b"{\"error\": \"Repository not found\"}", "JSON text", "server"),
            (b"{}", "JSON text", "folder"),
            (b"Not Found", "text", "server"),
            ("Zugriff verweigert für".as_bytes().split_last().unwrap().1, "text", "server"),
            (b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG image", "give"),
            (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "a gzip archive", "unpack"),
            (b"", "an empty file", "download it again"),
            (&[0; 64], "a file that begins with zeros", "download it again"),
        ] {
            refused(bytes, &format!("is {kind}"));
            refused(bytes, "not a safetensors file; ");
            refused(bytes, advice);
        }
        refused(&[0xff; 16], "is not a safetensors file: its first bytes");
    }
}
