//! Textual inversion files: learned embeddings of words, as diffusers, the web UIs and the trainers write them.

use crate::{Error, Result, input, weights};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

/// Embeddings from outside the model, and the words that stand for them (textual inversion).
#[derive(Clone, Debug, PartialEq)]
pub struct LearnedToken {
    /// The file's, for messages.
    pub name: String,
    pub words: Vec<Word>,
    /// Embeddings of each text tower.
    pub rows: usize,
    /// Per text tower, `[rows, C]`.
    pub embeddings: Vec<Vec<f32>>,
    /// Tensors of the file that are not used.
    pub unused: Vec<String>,
}

/// What stands for some of the rows in a prompt, in any case.
#[derive(Clone, Debug, PartialEq)]
pub struct Word {
    pub text: String,
    pub rows: Range<usize>,
    /// It is an ordinary name: it counts as a whole word only, and what a model's vocabulary holds keeps its meaning.
    pub is_plain: bool,
}

impl LearnedToken {
    /// One word for all rows.
    pub fn new(word: &str, rows: usize, embeddings: Vec<Vec<f32>>) -> LearnedToken {
        let words = vec![Word { text: word.to_string(), rows: 0..rows, is_plain: false }];
        LearnedToken { name: word.to_string(), words, rows, embeddings, unused: vec![] }
    }
}

/// The tensors of the two text towers of SDXL: the web UIs and most trainers, diffusers' pivotal tuning.
const TOWERS: [[&str; 2]; 2] = [["clip_l", "clip_g"], ["text_encoders_0", "text_encoders_1"]];
/// What such files hold for a third tower, or for what the towers put out.
const OTHER_TOWERS: [&str; 5] = ["t5xxl", "t5", "clip_l_out", "clip_g_out", "emb_params_out"];
/// Names of the tensor of one text tower that are no words: AUTOMATIC1111's, which calls every word `*`, and converters'.
const UNNAMED: [&str; 8] =
    ["emb_params", "*", "string_to_param", "embedding", "embeddings", "embeds", "learned_embeds", "weight"];
/// The web UI's number of the word in its own vocabulary: nothing of it is of use.
const NUMBERS: &str = "string_to_token";
/// Keys of the file's metadata under which trainers write a word.
const METADATA: [&str; 6] =
    ["token", "name", "trigger", "trigger_word", "placeholder_token", "modelspec.trigger_phrase"];

/// A file of a thousand words for SDXL has 8 MB.
const MOST_BYTES: u64 = 64 << 20;
/// Words of a file: each is looked for in every prompt.
const MOST_WORDS: usize = 1000;
/// Characters of a word.
const MOST_LETTERS: usize = 200;

/// The word of a file whose tensors do not name it: `<stem>`.
pub fn word_of(path: &Path) -> String {
    format!("<{}>", stem(path))
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Reads embeddings `[C]`, `[rows, C]` or `[1, rows, C]`, of one or two text towers, in F16, BF16, F32 or F64.
///
/// A tensor that is named after a word stands for that word, several for one each. Where no tensor names one, the words are `<stem>`
/// and, as whole words, the file's name without extension and what its metadata call it.
pub fn read(path: &Path) -> Result<LearnedToken> {
    let bytes = input::read(path, MOST_BYTES)?;
    let wrong = |what: String| Error::file(path, what);
    let header = weights::parse_header(&bytes).map_err(wrong)?;
    let layout = Layout::of(header.tensors.keys()).map_err(wrong)?;
    let mut token =
        LearnedToken { name: stem(path), words: vec![], rows: 0, embeddings: vec![], unused: layout.unused };
    for keys in &layout.towers {
        let (mut rows, mut embeddings) = (vec![0], vec![]);
        for key in keys {
            let read = header.tensor(&bytes, key).ok_or_else(|| "is not there".to_string()).and_then(numbers);
            let (count, values) = read.map_err(|what| wrong(format!("'{key}' {what}")))?;
            rows.push(rows[rows.len() - 1] + count);
            embeddings.extend(values);
        }
        let (last, is_first) = (rows[rows.len() - 1], token.embeddings.is_empty());
        if !is_first && last != token.rows {
            return Err(wrong(format!("its towers have {} and {last} rows", token.rows)));
        }
        if is_first {
            token.rows = last;
            let ranges = rows.windows(2).map(|pair| pair[0]..pair[1]);
            token.words = layout.words.iter().zip(ranges).map(|(word, rows)| named(word, rows)).collect();
        }
        token.embeddings.push(embeddings);
    }
    if layout.is_pivotal {
        token.words = (0..token.rows).map(|row| named(&format!("<s{row}>"), row..row + 1)).collect();
    }
    if layout.words.is_empty() {
        token.words.extend(names_of_file(path, token.rows, &header.metadata));
    }
    Ok(token)
}

fn named(word: &str, rows: Range<usize>) -> Word {
    Word { text: word.to_string(), rows, is_plain: false }
}

/// `<stem>`, the stem, and what the metadata say.
fn names_of_file(path: &Path, rows: usize, metadata: &HashMap<String, String>) -> Vec<Word> {
    let mut words = vec![named(&word_of(path), 0..rows)];
    let told = METADATA.iter().filter_map(|key| Some(metadata.get(*key)?.trim().to_string()));
    for text in [stem(path)].into_iter().chain(told) {
        let is_new = words.iter().all(|word| word.text.to_lowercase() != text.to_lowercase());
        // Some write lists or objects there.
        if is_new && !text.is_empty() && text.chars().count() <= MOST_LETTERS && !text.starts_with(['[', '{', '*']) {
            words.push(Word { text, rows: 0..rows, is_plain: true });
        }
    }
    words
}

/// Which tensors hold what.
#[derive(Default)]
struct Layout {
    /// Per tower, the tensors whose rows follow each other.
    towers: Vec<Vec<String>>,
    /// The words of the first tower's tensors, where those name them.
    words: Vec<String>,
    /// Each row has a word: `<s0>`, `<s1>`.
    is_pivotal: bool,
    unused: Vec<String>,
}

impl Layout {
    /// An error says why the tensors are no learned token.
    fn of<'a>(sorted: impl Iterator<Item = &'a String>) -> Result<Layout, String> {
        let names: Vec<String> = sorted.filter(|name| !name.starts_with(NUMBERS)).cloned().collect();
        let has = |name: &&str| names.iter().any(|found| found == name);
        let found: Vec<&str> = TOWERS.as_flattened().iter().copied().filter(has).collect();
        let towers = |keys: &[&str]| keys.iter().map(|key| vec![key.to_string()]).collect::<Vec<_>>();
        let (used, words) = match found[..] {
            [one] => (towers(&[one]), vec![]),
            [first, second] if TOWERS.contains(&[first, second]) => (towers(&[first, second]), vec![]),
            [] => {
                let kept = names.iter().filter(|name| !OTHER_TOWERS.contains(&name.as_str()));
                let (unnamed, named): (Vec<&String>, Vec<&String>) = kept.partition(|name| word(name).is_none());
                match (&unnamed[..], &named[..]) {
                    ([key, ..], _) => (towers(&[key]), vec![]),
                    ([], []) => return Err("holds no tensor that is a learned token".into()),
                    ([], all) if all.len() > MOST_WORDS => {
                        return Err(format!(
                            "holds {} tensors; a learned token is one, or 'clip_l' and 'clip_g'",
                            all.len()
                        ));
                    }
                    ([], all) => (
                        vec![all.iter().map(|key| key.to_string()).collect()],
                        all.iter().filter_map(|key| word(key)).collect(),
                    ),
                }
            }
            _ => return Err(format!("holds the towers {}; a learned token has one or two", found.join(", "))),
        };
        let is_pivotal = found.first() == Some(&TOWERS[1][0]);
        let unused = names.into_iter().filter(|name| !used.iter().flatten().any(|key| key == name)).collect();
        Ok(Layout { towers: used, words, is_pivotal, unused })
    }
}

/// The word that a tensor's name says; `None` where it says what the tensor is.
fn word(name: &str) -> Option<String> {
    let name = name.rsplit_once("string_to_param.").map_or(name, |(_, last)| last);
    (!UNNAMED.contains(&name)).then(|| name.to_string())
}

/// Rows and numbers of a tensor; an error says what is wrong with it.
fn numbers(tensor: TensorView<'_>) -> Result<(usize, Vec<f32>), String> {
    let (rows, width) = match *tensor.shape() {
        [width] => (1, width),
        [rows, width] | [1, rows, width] => (rows, width),
        ref shape => return Err(format!("is {shape:?}; embeddings are [rows, width]")),
    };
    if rows == 0 || width == 0 {
        return Err("holds no rows".into());
    }
    let values = floats(&tensor)
        .ok_or_else(|| format!("is {:?} or not finite; embeddings are F16, BF16, F32 or F64", tensor.dtype()))?;
    Ok((rows, values))
}

/// `None` of another type, or of what f32 does not hold as a finite number.
fn floats(tensor: &TensorView<'_>) -> Option<Vec<f32>> {
    fn each<const N: usize>(bytes: &[u8], convert: fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks::<N>().0.iter().map(|bytes| convert(*bytes)).collect()
    }
    let values = match tensor.dtype() {
        Dtype::F16 => each(tensor.data(), |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => each(tensor.data(), |b| bf16::from_le_bytes(b).to_f32()),
        Dtype::F32 => each(tensor.data(), f32::from_le_bytes),
        Dtype::F64 => each(tensor.data(), |b| f64::from_le_bytes(b) as f32),
        _ => return None,
    };
    values.iter().all(|x| x.is_finite()).then_some(values)
}

/// The file of a token of one word: one tensor named after it, or `clip_l` and `clip_g`, F32.
pub fn bytes(token: &LearnedToken) -> Result<Vec<u8>> {
    let data: Vec<Vec<u8>> =
        token.embeddings.iter().map(|rows| rows.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let invalid = |e: safetensors::SafeTensorError| Error::Usage(format!("token '{}': {e}", token.name));
    let names = if data.len() == 1 { vec![token.name.as_str()] } else { TOWERS[0].to_vec() };
    let mut views = Vec::new();
    for (name, data) in names.into_iter().zip(&data) {
        let shape = vec![token.rows, data.len() / 4 / token.rows.max(1)];
        views.push((name, TensorView::new(Dtype::F32, shape, data).map_err(invalid)?));
    }
    safetensors::serialize(views, None).map_err(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    /// Name, type, shape and bytes.
    type Tensor<'a> = (&'a str, Dtype, &'a [usize], Vec<u8>);

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    fn read_as(name: &str, tensors: &[Tensor<'_>], metadata: &[(&str, &str)]) -> Result<LearnedToken> {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join(name);
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            (name.to_string(), TensorView::new(*dtype, shape.to_vec(), data).unwrap())
        });
        let metadata = metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        std::fs::write(&path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
        read(&path)
    }

    /// The words, those that count as whole words only behind a blank.
    fn words(token: &LearnedToken) -> Vec<(String, Range<usize>)> {
        let shown = |word: &Word| if word.is_plain { format!(" {}", word.text) } else { word.text.clone() };
        token.words.iter().map(|word| (shown(word), word.rows.clone())).collect()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("rare.safetensors");
        let one = LearnedToken::new("<odd>", 2, vec![vec![0.5, -1.0, 2.0, 3.0]]);
        std::fs::write(&path, bytes(&one).unwrap()).unwrap();
        let found = read(&path).unwrap();
        assert_eq!((&found.words, found.rows, &found.embeddings), (&one.words, 2, &one.embeddings));
        let two = LearnedToken::new("<rare>", 1, vec![vec![0.5, 1.0], vec![1.0, 2.0, 3.0]]);
        std::fs::write(&path, bytes(&two).unwrap()).unwrap();
        let found = read(&path).unwrap();
        assert_eq!((found.rows, &found.embeddings), (1, &two.embeddings));
        assert_eq!(words(&found), [("<rare>".to_string(), 0..1), (" rare".to_string(), 0..1)]);
    }

    #[test]
    fn layouts_of_one_tower() {
        let rows: Tensor<'_> = ("", Dtype::F32, &[2, 2], f32s(&[1.0, 2.0, 3.0, 4.0]));
        let number: Tensor<'_> = ("string_to_token.*", Dtype::I64, &[], 265i64.to_le_bytes().to_vec());
        let file = |names: &[&str]| {
            let mut tensors: Vec<Tensor<'_>> = vec![number.clone()];
            tensors.extend(names.iter().map(|name| Tensor::from((*name, rows.1, rows.2, rows.3.clone()))));
            let names: Vec<String> = tensors.iter().map(|(name, ..)| name.to_string()).collect();
            let tensors: Vec<Tensor<'_>> =
                names.iter().zip(&tensors).map(|(name, t)| (name.as_str(), t.1, t.2, t.3.clone())).collect();
            read_as("odd.v2.safetensors", &tensors, &[("format", "pt")]).unwrap()
        };
        let unnamed = [("<odd.v2>".to_string(), 0..2), (" odd.v2".to_string(), 0..2)];
        for name in ["emb_params", "string_to_param.*", "*", "bundle_emb.odd.string_to_param.*", "clip_l", "clip_g"] {
            let found = file(&[name]);
            assert_eq!((words(&found).as_slice(), found.rows), (&unnamed[..], 2), "{name}");
            assert_eq!((found.embeddings, found.unused), (vec![vec![1.0, 2.0, 3.0, 4.0]], vec![]), "{name}");
        }
        for (name, word) in [("<odd>", "<odd>"), ("odd thing", "odd thing"), ("string_to_param.<x>", "<x>")] {
            assert_eq!(words(&file(&[name])), [(word.to_string(), 0..2)]);
        }
        let several = file(&["<s1>", "<s0>"]);
        assert_eq!(words(&several), [("<s0>".to_string(), 0..2), ("<s1>".to_string(), 2..4)]);
        assert_eq!((several.rows, several.embeddings[0].len()), (4, 8));
        // What belongs to no tower of ours is told.
        assert_eq!(file(&["emb_params", "emb_params_out"]).unused, ["emb_params_out"]);
        assert_eq!(file(&["emb_params", "step"]).unused, ["step"]);
    }

    #[test]
    fn layouts_of_two_towers() {
        let tower = |name: &'static str, width: usize| -> Tensor<'static> {
            let shape: &'static [usize] = if width == 2 { &[2, 2] } else { &[2, 3] };
            (name, Dtype::F32, shape, f32s(&vec![1.0; 2 * width]))
        };
        let found =
            read_as("odd.safetensors", &[tower("clip_l", 2), tower("clip_g", 3), tower("t5xxl", 3)], &[]).unwrap();
        assert_eq!(found.embeddings.iter().map(Vec::len).collect::<Vec<_>>(), [4, 6]);
        assert_eq!(words(&found), [("<odd>".to_string(), 0..2), (" odd".to_string(), 0..2)]);
        assert_eq!(found.unused, ["t5xxl"]);
        let found =
            read_as("odd.safetensors", &[tower("text_encoders_0", 2), tower("text_encoders_1", 3)], &[]).unwrap();
        let all = [("<s0>", 0..1), ("<s1>", 1..2), ("<odd>", 0..2), (" odd", 0..2)];
        assert_eq!(words(&found), all.map(|(word, rows)| (word.to_string(), rows)));
        let mixed = read_as("odd.safetensors", &[tower("clip_l", 2), tower("text_encoders_1", 3)], &[]).unwrap_err();
        assert!(mixed.to_string().contains("holds the towers clip_l, text_encoders_1"), "{mixed}");
    }

    #[test]
    fn metadata_name_what_tensors_do_not() {
        let rows = |name: &'static str| -> Tensor<'static> { (name, Dtype::F32, &[1, 2], f32s(&[1.0, 2.0])) };
        let told = [("name", "Odd"), ("trigger", " weird thing "), ("token", "[\"a\"]")];
        let found = read_as("odd.safetensors", &[rows("emb_params")], &told).unwrap();
        let all = [("<odd>", 0..1), (" odd", 0..1), (" weird thing", 0..1)];
        assert_eq!(words(&found), all.map(|(word, rows)| (word.to_string(), rows)));
        assert_eq!(words(&read_as("odd.safetensors", &[rows("<x>")], &told).unwrap()), [("<x>".to_string(), 0..1)]);
    }

    #[test]
    fn types_and_shapes() {
        let one =
            |dtype: Dtype, shape: &[usize], data: Vec<u8>| read_as("a.safetensors", &[("x", dtype, shape, data)], &[]);
        let half = f16::from_f32(1.5).to_le_bytes().to_vec();
        assert_eq!(one(Dtype::F16, &[1, 1], half).unwrap().embeddings, [[1.5]]);
        assert_eq!(one(Dtype::BF16, &[1], bf16::from_f32(1.5).to_le_bytes().to_vec()).unwrap().embeddings, [[1.5]]);
        assert_eq!(one(Dtype::F64, &[1, 1, 1], 1.5f64.to_le_bytes().to_vec()).unwrap().embeddings, [[1.5]]);
        for (dtype, shape, data, what) in [
            (Dtype::I32, &[1, 1][..], vec![0; 4], "I32"),
            (Dtype::F32, &[1, 1], f32s(&[f32::NAN]), "not finite"),
            (Dtype::F64, &[1, 1], 1e300f64.to_le_bytes().to_vec(), "not finite"),
            (Dtype::F32, &[2, 1, 1], f32s(&[1.0, 2.0]), "[2, 1, 1]"),
            (Dtype::F32, &[], f32s(&[1.0]), "[]"),
            (Dtype::F32, &[0, 4], vec![], "holds no rows"),
            (Dtype::F32, &[1 << 40, 0], vec![], "holds no rows"),
        ] {
            let error = one(dtype, shape, data).unwrap_err().to_string();
            assert!(error.contains("a.safetensors: 'x' ") && error.contains(what), "{error}");
        }
    }

    #[test]
    fn what_is_no_token_is_named() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("rare.safetensors");
        for (bytes, what) in [
            (&b"\x80\x02}q\0"[..], "is a PyTorch pickle, not a safetensors file"),
            (b"PK\x03\x04........rare/data.pkl", "is a PyTorch pickle"),
            (b"<!DOCTYPE html>", "is a web page (HTML)"),
            (b"{\"detail\": 401}", "is JSON text"),
            (b"", "is an empty file"),
            (b"short", "is text, not a safetensors file"),
            (b"# A page of text\n", "is text, not a safetensors file"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains("rare.safetensors: ") && error.contains(what), "{error}");
        }
        // Some tools write this where there are none.
        let null = br#"{"__metadata__":null,"<odd>":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        let file = [&(null.len() as u64).to_le_bytes()[..], null, &[0; 4]].concat();
        std::fs::write(&path, file).unwrap();
        assert_eq!(words(&read(&path).unwrap()), [("<odd>".to_string(), 0..1)]);
        std::fs::write(&path, b"\x02\0\0\0\0\0\0\0{}").unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("holds no tensor"), "{error}");
    }
}
