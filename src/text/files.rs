//! The files of a `tokenizer` folder, read with every surprise turned into an error that names the file.

use super::{END, START};
use crate::{Error, Result, input};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use tokenizers::AddedToken;

/// Lengths above this are transformers' way of saying "none" (1e30).
const LONGEST: u64 = 1 << 20;

/// What byte-pair encoding needs.
pub struct Pairs {
    pub vocab: HashMap<String, u32>,
    pub merges: Vec<(String, String)>,
}

/// The special tokens of a CLIP tokenizer.
pub struct Special {
    pub start: AddedToken,
    pub end: AddedToken,
    pub unknown: AddedToken,
    pub pad: AddedToken,
}

impl Default for Special {
    fn default() -> Special {
        Special { start: token(START), end: token(END), unknown: token(END), pad: token(END) }
    }
}

impl Special {
    /// Each token once; of several spellings of one the last counts, as in transformers.
    pub fn distinct(self) -> Vec<AddedToken> {
        let mut tokens: Vec<AddedToken> = vec![];
        for token in [self.start, self.end, self.unknown, self.pad] {
            tokens.retain(|t| t.content != token.content);
            tokens.push(token);
        }
        tokens
    }
}

/// A special token that is matched as it is written.
pub fn token(content: &str) -> AddedToken {
    AddedToken::from(content, true)
}

/// `vocab.json`: token to id; `merges.txt`: a header, then one `left right` per line.
pub fn vocab_and_merges(folder: &Path, vocab: &[u8], merges: &[u8]) -> Result<Pairs> {
    let vocab: HashMap<String, u32> = parse(folder, "vocab.json", vocab)?;
    let at = || folder.join("merges.txt");
    let text = std::str::from_utf8(merges).map_err(|_| Error::file(at(), "is not UTF-8"))?;
    let mut pairs = vec![];
    for (number, line) in text.lines().enumerate() {
        if line.is_empty() || line.starts_with("#version") {
            continue;
        }
        let pair = line.split_once(' ').ok_or_else(|| Error::file(at(), format!("line {}: is no pair", number + 1)))?;
        pairs.push((pair.0.to_string(), pair.1.to_string()));
    }
    check(folder, "merges.txt", Pairs { vocab, merges: pairs })
}

/// The vocabulary inside a `tokenizer.json`; merges are `"left right"` or `["left", "right"]`.
pub fn tokenizer_json(folder: &Path, json: &[u8]) -> Result<Pairs> {
    const NAME: &str = "tokenizer.json";
    let wrong = |what: &str| Error::file(folder.join(NAME), what);
    let root: Value = parse(folder, NAME, json)?;
    let model = &root["model"];
    if model["type"].as_str().is_some_and(|t| t != "BPE") || model["end_of_word_suffix"].as_str() != Some("</w>") {
        return Err(wrong("is not a CLIP tokenizer (byte pairs with the suffix '</w>')"));
    }
    let vocab =
        serde_json::from_value(model["vocab"].clone()).map_err(|_| wrong("'model.vocab' is not token to id"))?;
    let merges = model["merges"].as_array().ok_or_else(|| wrong("'model.merges' is no list"))?;
    let pair = |merge: &Value| {
        let (a, b) = match merge {
            Value::String(line) => line.split_once(' ')?,
            Value::Array(pair) if pair.len() == 2 => (pair[0].as_str()?, pair[1].as_str()?),
            _ => return None,
        };
        Some((a.to_string(), b.to_string()))
    };
    let merges =
        merges.iter().map(pair).collect::<Option<_>>().ok_or_else(|| wrong("'model.merges' holds no pairs"))?;
    check(folder, NAME, Pairs { vocab, merges })
}

/// Every merge must join known tokens to a known token, and ids must be distinct and fit an i32.
fn check(folder: &Path, name: &str, pairs: Pairs) -> Result<Pairs> {
    for (a, b) in &pairs.merges {
        if let Some(missing) = [a, b, &format!("{a}{b}")].into_iter().find(|t| !pairs.vocab.contains_key(*t)) {
            let what = format!(
                "merge '{}' needs '{}', which the vocabulary lacks",
                short(&format!("{a} {b}")),
                short(missing)
            );
            return Err(Error::file(folder.join(name), what));
        }
    }
    let mut ids: Vec<u32> = pairs.vocab.values().copied().collect();
    ids.sort_unstable();
    if let Some(twice) = ids.windows(2).find(|w| w[0] == w[1]) {
        return Err(Error::file(folder.join(name), format!("two tokens share the id {}", twice[0])));
    }
    if ids.last().is_some_and(|&id| id >= i32::MAX as u32) {
        return Err(Error::file(folder.join(name), "a token id is too large"));
    }
    Ok(pairs)
}

/// Special tokens and `model_max_length`. `special_tokens_map.json` overrides `tokenizer_config.json`, unless that one lists
/// `added_tokens_decoder` (newer transformers); Stable Diffusion 2 depends on it for its pad token.
pub fn special(folder: &Path, config: Option<&[u8]>, map: Option<&[u8]>) -> Result<(Special, Option<usize>)> {
    let read = |name: &str, bytes: Option<&[u8]>| match bytes {
        Some(bytes) => parse::<Value>(folder, name, bytes),
        None => Ok(Value::Null),
    };
    let (config, map) = (read("tokenizer_config.json", config)?, read("special_tokens_map.json", map)?);
    let decoder = config.get("added_tokens_decoder").is_some();
    let find = |key: &str, default: &AddedToken| {
        let named = |v: &Value| v.get(key).and_then(added_token);
        let map = if decoder { None } else { named(&map) };
        map.or_else(|| named(&config)).unwrap_or_else(|| default.clone())
    };
    let default = Special::default();
    let end = find("eos_token", &default.end);
    let special = Special {
        start: find("bos_token", &default.start),
        unknown: find("unk_token", &end),
        pad: find("pad_token", &end),
        end,
    };
    let length = config["model_max_length"].as_u64().filter(|&n| n <= LONGEST);
    if length.is_some_and(|n| n < 2) {
        return Err(Error::file(folder.join("tokenizer_config.json"), "model_max_length must be at least 2"));
    }
    Ok((special, length.map(|n| n as usize)))
}

/// A token that a folder adds to its vocabulary, and the file that does.
pub struct Added {
    pub token: String,
    pub file: &'static str,
}

/// Tokens that a folder adds to its vocabulary, by id: `added_tokens.json` (`{"token": id}`), `tokenizer_config.json`
/// (`added_tokens_decoder: {"id": {"content": ..}}`), `tokenizer.json` (`added_tokens: [{"id": .., "content": ..}]`).
pub fn added(list: Option<&[u8]>, config: Option<&[u8]>, json: Option<&[u8]>) -> Result<BTreeMap<u64, Added>> {
    let read =
        |name: &str, bytes: Option<&[u8]>| bytes.map_or(Ok(Value::Null), |b| input::parse_json(Path::new(name), b));
    let mut tokens = BTreeMap::new();
    let mut add = |file: &'static str, entry: Option<(u64, &str)>| {
        let Some((id, token)) = entry else { return Err(Error::file(file, "an added token lacks its id or text")) };
        match tokens.insert(id, Added { token: token.to_string(), file }) {
            Some(other) if other.token != token => {
                let what =
                    format!("token {id} is '{}', in {} it is '{}'", short(token), other.file, short(&other.token));
                Err(Error::file(file, what))
            }
            Some(_) | None => Ok(()),
        }
    };
    let list = read("added_tokens.json", list)?;
    for (token, id) in object("added_tokens.json", &list)? {
        add("added_tokens.json", id.as_u64().map(|id| (id, token.as_str())))?;
    }
    let config = read("tokenizer_config.json", config)?;
    for (id, token) in object("tokenizer_config.json", &config["added_tokens_decoder"])? {
        add("tokenizer_config.json", id.parse().ok().zip(token["content"].as_str()))?;
    }
    let json = read("tokenizer.json", json)?;
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        add("tokenizer.json", token["id"].as_u64().zip(token["content"].as_str()))?;
    }
    Ok(tokens)
}

/// The entries of a JSON object, of which there are none where it is null.
fn object<'v>(file: &str, value: &'v Value) -> Result<impl Iterator<Item = (&'v String, &'v Value)>> {
    match value {
        Value::Null => Ok(None.into_iter().flatten()),
        Value::Object(entries) => Ok(Some(entries).into_iter().flatten()),
        _ => Err(Error::file(file, "its added tokens are not an object")),
    }
}

/// `"text"`, or an object with `content` and the way it is matched. An empty token matches nothing and counts as none.
fn added_token(value: &Value) -> Option<AddedToken> {
    let content = value.as_str().or_else(|| value["content"].as_str()).filter(|c| !c.is_empty())?;
    let flag = |key: &str| value.get(key).and_then(Value::as_bool).unwrap_or(false);
    let token = token(content).normalized(flag("normalized")).single_word(flag("single_word"));
    Some(token.lstrip(flag("lstrip")).rstrip(flag("rstrip")))
}

fn parse<T: serde::de::DeserializeOwned>(folder: &Path, name: &str, bytes: &[u8]) -> Result<T> {
    input::from_json(&folder.join(name), bytes)
}

/// Enough of a token to recognise it in a message, on one line.
pub fn short(text: &str) -> String {
    const MOST: usize = 40;
    let end = if text.chars().nth(MOST).is_some() { "…" } else { "" };
    let start: String = text.chars().take(MOST).flat_map(char::escape_debug).collect();
    start + end
}
