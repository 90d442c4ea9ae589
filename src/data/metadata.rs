//! What a PNG says about how it was made: the `parameters` text of the A1111 convention and a JSON record that reproduces it.

use crate::data::{parameters, png_chunks};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::{Cursor, Read, Write};
use std::path::Path;

pub use crate::data::png_chunks::SIGNATURE;

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
        let settings = [
            ("Steps", self.steps.to_string()),
            ("Sampler", self.sampler.clone()),
            ("CFG scale", self.guidance.to_string()),
            ("Seed", self.seed.to_string()),
            ("Size", format!("{}x{}", self.width, self.height)),
            ("Model", self.model.clone()),
            ("Version", format!("rarebit {}", self.version)),
        ];
        parameters::write(&self.prompt, self.negative.as_deref().unwrap_or_default(), &settings)
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

/// Most bytes of text in one PNG, packed or not: whole workflows take a few hundred thousand. A file of a few kilobytes may unfold to
/// gigabytes.
pub const MOST_TEXT: usize = 8 << 20;

/// A text chunk's keyword, and its text or what is wrong with it.
pub type Text = (String, Result<String>);

/// The text chunks of a PNG whose keyword is `wanted`, in file order; `path` is for errors. An error of the whole is a broken file.
pub fn texts(path: &Path, bytes: &[u8], wanted: impl Fn(&str) -> bool) -> Result<Vec<Text>> {
    let broken = |what: String| Error::file(path, format!("not a readable PNG: {what}"));
    let mut left = MOST_TEXT;
    let mut found = vec![];
    for text in png_chunks::texts(bytes).map_err(broken)?.into_iter().filter(|text| wanted(&text.keyword)) {
        let read = text.read(left).map_err(|what| match left < MOST_TEXT {
            true => Error::file(path, format!("text '{}' {what}, what others have left of {MOST_TEXT}", text.keyword)),
            false => Error::file(path, format!("text '{}' {what}", text.keyword)),
        });
        left -= read.as_ref().map_or(0, String::len).min(left);
        found.push((text.keyword, read));
    }
    Ok(found)
}

/// The text chunks of a PNG, in file order, as (keyword, text); `name` is for errors.
pub fn read_text(name: &str, mut file: impl Read) -> Result<Vec<(String, String)>> {
    let mut bytes = vec![];
    file.read_to_end(&mut bytes).map_err(Error::io("read", name))?;
    let found = texts(name.as_ref(), &bytes, |_| true)?;
    found.into_iter().map(|(keyword, text)| Ok((keyword, text?))).collect()
}

/// The prompt an image was made from: the record's, else that of the `parameters`, whichever program wrote them.
pub fn prompt(texts: &[(String, String)]) -> Option<String> {
    let find = |keyword: &str| texts.iter().find(|(key, _)| key == keyword).map(|(_, text)| text.as_str());
    let json = |text: &str| serde_json::from_str::<Value>(text).ok().filter(Value::is_object);
    let string = |value: &Value, at: &str| value.pointer(at)?.as_str().map(String::from);
    // Records of other versions may have other fields; the prompt is in all of them.
    if let Some(prompt) = find(RECORD).and_then(json).and_then(|record| string(&record, "/prompt")) {
        return Some(prompt);
    }
    let parameters = find(PARAMETERS)?;
    match json(parameters) {
        // Fooocus and SwarmUI write JSON under the same keyword.
        Some(object) => string(&object, "/prompt").or_else(|| string(&object, "/sui_image_params/prompt")),
        None => Some(parameters::parse(parameters).prompt),
    }
}

/// The JSON record among text chunks, if there is one; an error where this version does not understand it.
pub fn record(texts: &[(String, String)]) -> Option<serde_json::Result<Record>> {
    texts.iter().find(|(key, _)| key == RECORD).map(|(_, text)| serde_json::from_str(text))
}

/// As [`record`] of a PNG's bytes, which may be damaged behind it.
pub fn record_before_damage(bytes: &[u8]) -> Option<serde_json::Result<Record>> {
    let text = png_chunks::texts_before_damage(bytes).find(|text| text.keyword == RECORD)?;
    Some(serde_json::from_str(&text.read(MOST_TEXT).unwrap_or_default()))
}

/// Whether these are all bytes of a PNG, every chunk as it was written, with all its pixels; its width and height.
pub fn whole_png(bytes: &[u8]) -> Option<[usize; 2]> {
    const END: &[u8] = b"\0\0\0\0IEND\xaeB`\x82";
    // That looks at the checksums.
    let pixels = png_chunks::pixels(bytes).ok().filter(|_| bytes.ends_with(END))?;
    let mut reader = png::Decoder::new(Cursor::new(&pixels.bytes)).read_info().ok()?;
    let mut buffer = vec![0; reader.output_buffer_size().filter(|size| *size <= MOST_PIXEL_BYTES)?];
    reader.next_frame(&mut buffer).ok()?;
    Some([pixels.width as usize, pixels.height as usize])
}

/// 16384 × 16384 pixels of three bytes, the largest image that is made.
const MOST_PIXEL_BYTES: usize = 3 << 28;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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

    /// Any value of any field: what is written is read back, bit by bit.
    fn any_record() -> impl Strategy<Value = Record> {
        let text = || "(\\PC|[\\x00-\\x1f\"\\\\,:]|\nNegative prompt: |\nSteps: 1, Sampler: x, Seed: 2){0,24}";
        let number = || any::<u64>().prop_map(f64::from_bits).prop_filter("finite", |x| x.is_finite());
        let option =
            (text(), number(), any::<i64>()).prop_map(|(text, x, n)| serde_json::json!({"a": text, "b": [x, n]}));
        let texts = prop::array::uniform9(text());
        let numbers = prop::array::uniform2(number());
        let counts = (any::<u64>(), any::<usize>(), any::<usize>(), any::<usize>(), any::<bool>());
        (texts, numbers, counts, option, prop::option::of(text()), prop::option::of(text())).prop_map(
            |(texts, [eta, guidance], (seed, steps, width, height, cfg_pp), options, negative, noise)| {
                let [version, method, model, model_hash, prompt, rng, sampler, spacing, dtype] = texts;
                let prediction = model.clone();
                let tokens = vec![TokenRecord { word: rng.clone(), hash: sampler.clone() }];
                let device = noise.clone();
                Record {
                    version,
                    method,
                    options,
                    model,
                    model_hash,
                    prompt,
                    negative,
                    seed,
                    rng,
                    noise,
                    tokens,
                    steps,
                    sampler,
                    spacing,
                    eta,
                    guidance,
                    cfg_pp,
                    prediction,
                    width,
                    height,
                    dtype,
                    device,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn every_record_survives_its_image(record in any_record()) {
            let mut bytes = Vec::new();
            write_png(&mut bytes, 2, 1, &[1, 2, 3, 4, 5, 6], Some(&record)).unwrap();
            let texts = read_text("test.png", std::io::Cursor::new(&bytes)).unwrap();
            let found = super::record(&texts).unwrap().unwrap();
            prop_assert_eq!(found.eta.to_bits(), record.eta.to_bits());
            prop_assert_eq!(found.guidance.to_bits(), record.guidance.to_bits());
            prop_assert_eq!(prompt(&texts), Some(record.prompt.clone()));
            let parameters = texts.iter().find(|(key, _)| key == PARAMETERS).unwrap();
            prop_assert_eq!(&parameters.1, &record.parameters());
            prop_assert!(!parameters.1.contains('\0'));
            prop_assert_eq!(found, record);
        }
    }

    /// A chunk of a PNG: length, kind, data, checksum.
    fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
        let body = [&kind[..], data].concat();
        let mut crc = flate2::Crc::new();
        crc.update(&body);
        [&(data.len() as u32).to_be_bytes()[..], &body, &crc.sum().to_be_bytes()].concat()
    }

    fn packed(text: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::ZlibEncoder::new(vec![], flate2::Compression::best());
        out.write_all(text).unwrap();
        out.finish().unwrap()
    }

    /// A PNG with these chunks before its end.
    fn with(chunks: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_png(&mut bytes, 1, 1, &[0, 0, 0], None).unwrap();
        let end = bytes.len() - 12;
        [&bytes[..end], &chunks.concat(), &bytes[end..]].concat()
    }

    #[test]
    fn every_kind_of_text_wherever_it_stands() {
        let latin1 = [b"a\0caf\xe9 \0 ".to_vec()].concat();
        let compressed =
            [b"b\0\0".to_vec(), packed("caf\u{e9}".chars().map(|c| c as u8).collect::<Vec<_>>().as_slice())].concat();
        let utf8 = [b"c\0\0\0de\0w\xc3\xb6rter\0".to_vec(), "星\0".as_bytes().to_vec()].concat();
        let utf8_compressed = [b"d\0\x01\0\0\0".to_vec(), packed("星".as_bytes())].concat();
        let nameless = b"no end of the keyword".to_vec();
        let bytes = with(&[
            chunk(b"tEXt", &latin1),
            chunk(b"zTXt", &compressed),
            chunk(b"iTXt", &utf8),
            chunk(b"iTXt", &utf8_compressed),
            chunk(b"tEXt", &nameless),
        ]);
        let found = read_text("x", &bytes[..]).unwrap();
        let expected = [("a", "café \0 "), ("b", "café"), ("c", "星\0"), ("d", "星")];
        assert_eq!(found, expected.map(|(key, text)| (key.to_string(), text.to_string())));
    }

    #[test]
    fn bombs_and_damage_are_named_and_stop_no_other_text() {
        let bomb = packed(&vec![b'x'; 4 * MOST_TEXT]);
        let kinds = [
            (chunk(b"zTXt", &[b"k\0\0".to_vec(), bomb.clone()].concat()), "text 'k' is longer than 8388608 bytes"),
            (chunk(b"iTXt", &[b"k\0\x01\0\0\0".to_vec(), bomb].concat()), "text 'k' is longer than 8388608 bytes"),
            (chunk(b"zTXt", b"k\0\0not packed"), "text 'k' cannot be unpacked"),
            (chunk(b"iTXt", b"k\0\0\0\0\0\xff"), "text 'k' is not UTF-8"),
        ];
        for (wrong, what) in kinds {
            let bytes = with(&[wrong, chunk(b"tEXt", b"parameters\0a star")]);
            let found = texts("x.png".as_ref(), &bytes, |_| true).unwrap();
            assert_eq!(found[0].1.as_ref().unwrap_err().to_string(), format!("x.png: {what}"));
            assert_eq!(found[1].1.as_ref().unwrap(), "a star");
            assert_eq!(texts("x.png".as_ref(), &bytes, |key| key == PARAMETERS).unwrap().len(), 1);
        }
        // Many that each unfold to less share one bound.
        let half = [b"k\0\0".to_vec(), packed(&vec![b'x'; MOST_TEXT / 2 + 1])].concat();
        let found = texts("x.png".as_ref(), &with(&vec![chunk(b"zTXt", &half); 100]), |_| true).unwrap();
        assert!(found[0].1.is_ok() && found[1..].iter().all(|(_, text)| text.is_err()));
        let many = with(&vec![chunk(b"tEXt", b"k\0"); 10_001]);
        assert!(read_text("x", &many[..]).unwrap_err().to_string().contains("more than 10000 text chunks"));
        let mut damaged = with(&[chunk(b"tEXt", b"parameters\0a star")]);
        let at = damaged.len() - 12 - 5;
        damaged[at] ^= 1;
        assert!(read_text("x", &damaged[..]).unwrap_err().to_string().contains("its chunk tEXt is damaged"));
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
        for text in [r#"{"prompt": "a ring", "seed": "1"}"#, r#"{"sui_image_params": {"prompt": "a ring"}}"#] {
            assert_eq!(prompt(&[chunk(PARAMETERS, text)]).as_deref(), Some("a ring"));
        }
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
