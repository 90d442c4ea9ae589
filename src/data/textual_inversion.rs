//! Textual inversion files: learned embeddings of one word, as diffusers and the web UIs read them.

use crate::{Error, Result};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::path::Path;

/// A word whose embeddings come from outside the model (textual inversion).
#[derive(Clone, Debug, PartialEq)]
pub struct LearnedToken {
    /// What stands for it in a prompt.
    pub word: String,
    /// Tokens it takes up.
    pub rows: usize,
    /// Per text tower, `[rows, C]`.
    pub embeddings: Vec<Vec<f32>>,
}

/// The tensors of models with two text towers.
const TOWERS: [&str; 2] = ["clip_l", "clip_g"];
/// AUTOMATIC1111's name for the tensor of models with one.
const A1111: &str = "emb_params";

/// The word of a file whose tensors do not name it: `<stem>`.
pub fn word_of(path: &Path) -> String {
    format!("<{}>", path.file_stem().unwrap_or_default().to_string_lossy())
}

/// Reads embeddings `[rows, C]`: one tensor named after the word, or `emb_params`, or `clip_l` and `clip_g`.
pub fn read(path: &Path) -> Result<LearnedToken> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let wrong = |what: String| Error::file(path, what);
    let file = SafeTensors::deserialize(&bytes).map_err(|e| wrong(format!("not a safetensors file: {e}")))?;
    let names = file.names();
    let (word, keys) = match names[..] {
        [A1111] => (word_of(path), vec![A1111]),
        [_, _] if TOWERS.iter().all(|tower| names.contains(tower)) => (word_of(path), TOWERS.to_vec()),
        [word] => (word.to_string(), vec![word]),
        _ => {
            let what = format!("holds {} tensors; a learned token is one, or 'clip_l' and 'clip_g'", names.len());
            return Err(wrong(what));
        }
    };
    let mut token = LearnedToken { word, rows: 0, embeddings: vec![] };
    for key in keys {
        let tensor = file.tensor(key).map_err(|e| wrong(e.to_string()))?;
        let rows = match *tensor.shape() {
            [_] => 1,
            [rows, _] => rows,
            ref shape => return Err(wrong(format!("'{key}' is {shape:?}; embeddings are [rows, width]"))),
        };
        if token.rows != 0 && token.rows != rows {
            return Err(wrong(format!("its towers have {} and {rows} rows", token.rows)));
        }
        token.rows = rows;
        token.embeddings.push(floats(&tensor).ok_or_else(|| {
            wrong(format!("'{key}' is {:?} or not finite; embeddings are F32, F16 or BF16", tensor.dtype()))
        })?);
    }
    if token.rows == 0 {
        return Err(wrong("holds no rows".into()));
    }
    Ok(token)
}

fn floats(tensor: &TensorView<'_>) -> Option<Vec<f32>> {
    let halves = |convert: fn([u8; 2]) -> f32| tensor.data().chunks_exact(2).map(|b| convert([b[0], b[1]])).collect();
    let values: Vec<f32> = if tensor.dtype() == Dtype::F32 {
        tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    } else if tensor.dtype() == Dtype::F16 {
        halves(|b| f16::from_le_bytes(b).to_f32())
    } else if tensor.dtype() == Dtype::BF16 {
        halves(|b| bf16::from_le_bytes(b).to_f32())
    } else {
        return None;
    };
    values.iter().all(|x| x.is_finite()).then_some(values)
}

/// The file of a token: one tensor named after the word, or `clip_l` and `clip_g`, F32.
pub fn bytes(token: &LearnedToken) -> Result<Vec<u8>> {
    let data: Vec<Vec<u8>> =
        token.embeddings.iter().map(|rows| rows.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let invalid = |e: safetensors::SafeTensorError| Error::Usage(format!("token '{}': {e}", token.word));
    let names = if data.len() == 1 { vec![token.word.as_str()] } else { TOWERS.to_vec() };
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

    #[test]
    fn round_trip_and_mistakes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rare.safetensors");
        let one = LearnedToken { word: "<odd>".into(), rows: 2, embeddings: vec![vec![0.5, -1.0, 2.0, 3.0]] };
        std::fs::write(&path, bytes(&one).unwrap()).unwrap();
        assert_eq!(read(&path).unwrap(), one);
        let two =
            LearnedToken { word: "<rare>".into(), rows: 1, embeddings: vec![vec![0.5, 1.0], vec![1.0, 2.0, 3.0]] };
        std::fs::write(&path, bytes(&two).unwrap()).unwrap();
        assert_eq!(read(&path).unwrap(), two, "two towers: the word is the file's name");

        let write = |name: &str, dtype: Dtype, shape: &[usize], data: &[u8]| {
            let view = TensorView::new(dtype, shape.to_vec(), data).unwrap();
            std::fs::write(&path, safetensors::serialize([(name, view)], None).unwrap()).unwrap();
            read(&path)
        };
        let half = f16::from_f32(1.5).to_le_bytes();
        let found = write(A1111, Dtype::F16, &[1, 1], &half).unwrap();
        assert_eq!((found.word.as_str(), &found.embeddings[0][..]), ("<rare>", &[1.5][..]));
        assert!(write("x", Dtype::I32, &[1, 1], &[0; 4]).unwrap_err().to_string().contains("I32"));
        assert!(write("x", Dtype::F32, &[1, 1], &f32::NAN.to_le_bytes()).is_err());
        assert!(write("x", Dtype::F32, &[1, 1, 1], &[0; 4]).is_err());
        std::fs::write(&path, b"short").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("rare.safetensors"));
    }
}
