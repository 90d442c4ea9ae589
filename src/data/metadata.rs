//! What a PNG says about how it was made: the `parameters` text of the A1111 convention and a JSON record that reproduces it.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Seek, Write};
use std::path::Path;

/// PNG text keywords.
pub const PARAMETERS: &str = "parameters";
pub const RECORD: &str = "rarebit";

/// Everything that decides the pixels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub version: String,
    pub method: String,
    /// What the method was asked for; null where there is nothing to say.
    #[serde(default)]
    pub options: serde_json::Value,
    pub model: String,
    /// [`Model::fingerprint`](crate::weights::Model::fingerprint).
    pub model_hash: String,
    pub prompt: String,
    pub negative: Option<String>,
    pub seed: u64,
    pub rng: String,
    /// Hash of the starting noise, where it came from a file.
    pub noise: Option<String>,
    /// Learned tokens that the prompts name; left out where there is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tokens: Vec<TokenRecord>,
    pub steps: usize,
    pub sampler: String,
    pub spacing: String,
    pub eta: f64,
    pub guidance: f64,
    pub cfg_pp: bool,
    pub prediction: String,
    pub width: usize,
    pub height: usize,
    pub dtype: String,
    /// The kind of device; left out for the CPU. Sums in another order differ in their last bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
}

/// A learned token of a prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenRecord {
    pub word: String,
    /// Of its embeddings.
    pub hash: String,
}

impl Record {
    /// Whether both describe the same image. Another version of this program makes no other image of the same settings, and what a
    /// model is called says nothing: its hash does.
    pub fn same_image(&self, other: &Record) -> bool {
        Record { version: other.version.clone(), model: other.model.clone(), ..self.clone() } == *other
    }

    /// The text that AUTOMATIC1111's web UI writes and the tools around it read.
    pub fn parameters(&self) -> String {
        let negative = match &self.negative {
            Some(negative) if !negative.is_empty() => format!("\nNegative prompt: {negative}"),
            Some(_) | None => String::new(),
        };
        format!(
            "{}{negative}\nSteps: {}, Sampler: {}, CFG scale: {}, Seed: {}, Size: {}x{}, Model: {}, Version: rarebit {}",
            self.prompt,
            self.steps,
            self.sampler,
            self.guidance,
            self.seed,
            self.width,
            self.height,
            self.model,
            self.version
        )
    }
}

/// Refuses names of other formats; `flag` gave this one.
pub fn check_name(flag: &str, path: &Path) -> Result<()> {
    let format = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    match ["jpg", "jpeg", "webp"].contains(&format.to_ascii_lowercase().as_str()) {
        true => Err(Error::Usage(format!("{flag}: images are written as .png, not .{format}"))),
        false => Ok(()),
    }
}

/// Writes an 8-bit RGB PNG; `record` as text chunks, unless the user wants none.
pub fn write_png(
    out: &mut dyn Write,
    width: usize,
    height: usize,
    rgb: &[u8],
    record: Option<&Record>,
) -> std::io::Result<()> {
    let mut encoder = png::Encoder::new(out, width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    if let Some(record) = record {
        add_text(&mut encoder, PARAMETERS, record.parameters())?;
        add_text(&mut encoder, RECORD, serde_json::to_string(record)?)?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(rgb)?;
    writer.finish()?;
    Ok(())
}

/// tEXt holds Latin-1 only; anything else goes into iTXt, as PIL does.
fn add_text<W: Write>(encoder: &mut png::Encoder<'_, W>, key: &str, text: String) -> std::io::Result<()> {
    let latin1 = text.chars().all(|c| (c as u32) < 256);
    let added = if latin1 {
        encoder.add_text_chunk(key.to_string(), text)
    } else {
        encoder.add_itxt_chunk(key.to_string(), text)
    };
    Ok(added?)
}

/// The text chunks of a PNG, in file order, as (keyword, text); `name` is for errors.
pub fn read_text(name: &str, file: impl BufRead + Seek) -> Result<Vec<(String, String)>> {
    let broken = |error: png::DecodingError| Error::file(name, format!("not a readable PNG: {error}"));
    let mut reader = png::Decoder::new(file).read_info().map_err(broken)?;
    // Text may follow the pixels.
    reader.finish().map_err(broken)?;
    texts(reader.info()).map_err(broken)
}

/// The text chunks of a PNG that has been read to its end.
pub fn texts(info: &png::Info<'_>) -> Result<Vec<(String, String)>, png::DecodingError> {
    let mut texts = Vec::new();
    for chunk in &info.uncompressed_latin1_text {
        texts.push((chunk.keyword.clone(), chunk.text.clone()));
    }
    for chunk in &info.compressed_latin1_text {
        texts.push((chunk.keyword.clone(), chunk.get_text()?));
    }
    for chunk in &info.utf8_text {
        texts.push((chunk.keyword.clone(), chunk.get_text()?));
    }
    Ok(texts)
}

/// The prompt an image was made from: the record's, else that of the A1111 parameters, whichever program wrote them.
pub fn prompt(texts: &[(String, String)]) -> Option<String> {
    let find = |keyword: &str| texts.iter().find(|(key, _)| key == keyword).map(|(_, text)| text.as_str());
    // Records of other versions may have other fields; the prompt is in all of them.
    let record = find(RECORD).and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    if let Some(prompt) = record.as_ref().and_then(|record| record.get("prompt")?.as_str()) {
        return Some(prompt.to_string());
    }
    let parameters = find(PARAMETERS)?;
    let settings = ["\nNegative prompt: ", "\nSteps: "].iter().filter_map(|mark| parameters.find(mark)).min();
    Some(parameters[..settings.unwrap_or(parameters.len())].to_string())
}

/// The JSON record among text chunks, if there is one; an error where this version does not understand it.
pub fn record(texts: &[(String, String)]) -> Option<serde_json::Result<Record>> {
    texts.iter().find(|(key, _)| key == RECORD).map(|(_, text)| serde_json::from_str(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(prompt: &str) -> Record {
        Record {
            version: "0.1.0".into(),
            method: "generate".into(),
            options: serde_json::Value::Null,
            model: "shapes".into(),
            model_hash: "0123456789abcdef".into(),
            prompt: prompt.into(),
            negative: Some("blue".into()),
            seed: u64::MAX,
            rng: "philox".into(),
            noise: None,
            tokens: vec![],
            steps: 20,
            sampler: "ddim".into(),
            spacing: "leading".into(),
            eta: 0.0,
            guidance: 7.5,
            cfg_pp: false,
            prediction: "epsilon".into(),
            width: 2,
            height: 1,
            dtype: "f32".into(),
            device: None,
        }
    }

    #[test]
    fn what_decides_an_image() {
        let record = example("a red star");
        let text = serde_json::to_string(&record).unwrap();
        assert!(!text.contains("tokens") && !text.contains("device"), "{text}");
        let token = |hash: &str| vec![TokenRecord { word: "<odd>".into(), hash: hash.into() }];
        let same = Record { version: "9".into(), model: "renamed".into(), ..record.clone() };
        assert!(record.same_image(&same));
        let with_token = Record { tokens: token("1"), ..record.clone() };
        assert!(with_token.same_image(&serde_json::from_str(&serde_json::to_string(&with_token).unwrap()).unwrap()));
        for other in [
            with_token.clone(),
            Record { device: Some("cuda".into()), ..record.clone() },
            Record { model_hash: "other".into(), ..record.clone() },
            Record { noise: Some("1".into()), ..record.clone() },
            Record { options: serde_json::json!({"n": 2}), ..record.clone() },
        ] {
            assert!(!record.same_image(&other), "{other:?}");
        }
        assert!(!with_token.same_image(&Record { tokens: token("2"), ..record }));
    }

    #[test]
    fn round_trip() {
        for prompt in ["a red star", "a café", "星 ☆\nsecond line", ""] {
            let record = example(prompt);
            let mut bytes = Vec::new();
            write_png(&mut bytes, 2, 1, &[1, 2, 3, 4, 5, 6], Some(&record)).unwrap();
            let texts = read_text("test.png", std::io::Cursor::new(&bytes)).unwrap();
            assert_eq!(super::record(&texts).unwrap().unwrap(), record);
            assert_eq!(texts[0], (PARAMETERS.to_string(), record.parameters()), "{prompt}");
        }
    }

    #[test]
    fn parameters_follow_the_convention() {
        let text = example("a red star").parameters();
        assert_eq!(
            text,
            "a red star\nNegative prompt: blue\nSteps: 20, Sampler: ddim, CFG scale: 7.5, Seed: 18446744073709551615, \
             Size: 2x1, Model: shapes, Version: rarebit 0.1.0"
        );
    }

    #[test]
    fn prompts_of_both_chunks() {
        let chunk = |key: &str, text: &str| (key.to_string(), text.to_string());
        let parameters = example("two\nlines").parameters();
        assert_eq!(prompt(&[chunk(PARAMETERS, &parameters)]).as_deref(), Some("two\nlines"));
        let plain = Record { negative: None, ..example("a red star") };
        assert_eq!(prompt(&[chunk(PARAMETERS, &plain.parameters())]).as_deref(), Some("a red star"));
        assert_eq!(prompt(&[chunk(PARAMETERS, "alone"), chunk(RECORD, "{")]).as_deref(), Some("alone"));
        let newer = r#"{"prompt": "a ring", "unheard_of": 1}"#;
        assert_eq!(prompt(&[chunk(PARAMETERS, "other"), chunk(RECORD, newer)]).as_deref(), Some("a ring"));
        assert_eq!(prompt(&[chunk("Comment", "a red star")]), None);
    }

    #[test]
    fn no_metadata_and_broken_files() {
        let mut bytes = Vec::new();
        write_png(&mut bytes, 1, 1, &[0, 0, 0], None).unwrap();
        assert!(read_text("x", std::io::Cursor::new(&bytes)).unwrap().is_empty());
        for length in 0..bytes.len() - 12 {
            assert!(read_text("x", std::io::Cursor::new(&bytes[..length])).is_err(), "{length}");
        }
    }
}
