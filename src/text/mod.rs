//! Prompts to token ids: CLIP's byte-pair tokenizer from a model folder or from the copy inside the binary.

mod clip;
mod files;

use crate::{Error, Result, input};
use std::path::Path;
use tokenizers::AddedToken;

/// Marks the end of a prompt, and pads it for most encoders.
pub const END: &str = "<|endoftext|>";
/// Marks the start of a prompt.
pub const START: &str = "<|startoftext|>";
/// What OpenCLIP encoders (Stable Diffusion 2, the second of SDXL) pad with: id 0.
pub const OPEN_CLIP_PAD: &str = "!";

/// CLIP's context length, where the files name none.
const DEFAULT_LENGTH: usize = 77;

/// Most bytes of a tokenizer file: several times what the largest published vocabularies take.
const FILE_CAP: u64 = 64 << 20;

/// A tokenizer that gives the ids of transformers' `CLIPTokenizer` for the same files: NFC, white space to single spaces,
/// lower case, words split by CLIP's pattern, byte-level pairs merged with `</w>` at the end of a word.
///
/// The pad token is special, as in transformers: an encoder that pads with `!` reads every `!` of a prompt as id 0.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    max_length: usize,
    vocab_size: usize,
    start: i32,
    end: i32,
    pad: i32,
}

/// A token of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    pub id: i32,
    /// What it was in the prompt.
    pub text: String,
}

/// Where learnable tokens stand: after the start of the prompt, or before its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Position {
    Start,
    #[default]
    End,
}

/// A prompt as an encoder reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Start, tokens, end, then padding: always [`Tokenizer::max_length`] ids.
    pub ids: Vec<i32>,
    /// Index of the first end token, where CLIP pools.
    pub eos: usize,
    /// The prompt's text, token by token, that did not fit.
    pub truncated: Vec<String>,
}

impl Tokenizer {
    /// CLIP's own vocabulary (49,408 tokens), context length 77. `pad` is [`END`], or [`OPEN_CLIP_PAD`].
    pub fn clip(pad: &str) -> Result<Tokenizer> {
        let special = files::Special { pad: files::token(pad), ..files::Special::default() };
        Tokenizer::build(clip::embedded()?, special, None, Path::new("embedded CLIP vocabulary"))
    }

    /// From a `tokenizer` folder: `vocab.json` and `merges.txt`, else `tokenizer.json`; `tokenizer_config.json` and
    /// `special_tokens_map.json` where present.
    pub fn from_folder(folder: &Path) -> Result<Tokenizer> {
        let read = |name: &str| input::read_if_there(&folder.join(name), FILE_CAP);
        let (config, map) = (read("tokenizer_config.json")?, read("special_tokens_map.json")?);
        let pairs = match (read("vocab.json")?, read("merges.txt")?) {
            (Some(vocab), Some(merges)) => files::vocab_and_merges(folder, &vocab, &merges)?,
            _ => match read("tokenizer.json")? {
                Some(json) => files::tokenizer_json(folder, &json)?,
                None => return Err(Error::file(folder, "has neither vocab.json and merges.txt nor tokenizer.json")),
            },
        };
        let (special, length) = files::special(folder, config.as_deref(), map.as_deref())?;
        Tokenizer::build(pairs, special, length, folder)
    }

    /// From the bytes of `vocab.json`, `merges.txt` and, where the model has them, the two files that name special tokens.
    /// `Error::File` names the file at fault; no bytes panic.
    pub fn from_bytes(
        vocab: &[u8],
        merges: &[u8],
        tokenizer_config: Option<&[u8]>,
        special_tokens_map: Option<&[u8]>,
    ) -> Result<Tokenizer> {
        let nowhere = Path::new("");
        let pairs = files::vocab_and_merges(nowhere, vocab, merges)?;
        let (special, length) = files::special(nowhere, tokenizer_config, special_tokens_map)?;
        Tokenizer::build(pairs, special, length, Path::new("vocab.json"))
    }

    /// From the bytes of a `tokenizer.json` that holds a CLIP vocabulary; otherwise like [`Tokenizer::from_bytes`].
    pub fn from_tokenizer_json(
        json: &[u8],
        tokenizer_config: Option<&[u8]>,
        special_tokens_map: Option<&[u8]>,
    ) -> Result<Tokenizer> {
        let nowhere = Path::new("");
        let pairs = files::tokenizer_json(nowhere, json)?;
        let (special, length) = files::special(nowhere, tokenizer_config, special_tokens_map)?;
        Tokenizer::build(pairs, special, length, Path::new("tokenizer.json"))
    }

    fn build(pairs: files::Pairs, special: files::Special, length: Option<usize>, at: &Path) -> Result<Tokenizer> {
        let vocab_size = pairs.vocab.values().max().map_or(0, |&id| id as usize + 1);
        let id = |token: &AddedToken| match pairs.vocab.get(&token.content) {
            Some(&id) => i32::try_from(id).map_err(|_| Error::file(at, format!("token id {id} is too large"))),
            None => Err(Error::file(
                at,
                format!("the vocabulary lacks the special token '{}'", files::short(&token.content)),
            )),
        };
        let (start, end, pad) = (id(&special.start)?, id(&special.end)?, id(&special.pad)?);
        let inner = clip::pipeline(pairs, special).map_err(|e| Error::file(at, one_line(&e.to_string())))?;
        let max_length = length.unwrap_or(DEFAULT_LENGTH);
        Ok(Tokenizer { inner, max_length, vocab_size, start, end, pad })
    }

    /// Adds the tokens that a folder lists beside its vocabulary (a saved textual inversion): the bytes of `added_tokens.json`,
    /// `tokenizer_config.json` and `tokenizer.json`, where present. Their ids must continue the vocabulary's.
    ///
    /// `Error::Model` where there are more tokens than the `rows` that the encoder embeds.
    pub fn with_added_tokens(
        mut self,
        list: Option<&[u8]>,
        config: Option<&[u8]>,
        json: Option<&[u8]>,
        rows: usize,
    ) -> Result<Tokenizer> {
        let mut new = vec![];
        for (id, files::Added { token, file }) in files::added(list, config, json)? {
            let wrong = |what: String| Error::file(file, format!("added token '{}' {what}", files::short(&token)));
            let next = (self.vocab_size + new.len()) as u64;
            match self.inner.token_to_id(&token) {
                Some(known) if u64::from(known) == id => continue,
                Some(known) => return Err(wrong(format!("has id {id}, in the vocabulary it has {known}"))),
                None if token.trim().is_empty() => return Err(wrong("is blank".into())),
                None if id != next => return Err(wrong(format!("has id {id}, the next free one is {next}"))),
                None => new.push(token),
            }
        }
        let tokens = self.vocab_size + new.len();
        if tokens > rows {
            return Err(Error::Model(format!("has {tokens} tokens but the text encoder embeds {rows}")));
        }
        self.add_words(&new, false).map_err(|what| Error::Model(format!("its added tokens {what}")))?;
        Ok(self)
    }

    /// Lowers the length to what the encoder has positions for; never below 2, the start and the end.
    pub fn with_max_length(mut self, most: usize) -> Tokenizer {
        self.max_length = self.max_length.min(most).max(2);
        self
    }

    /// Ids per prompt, start and end included.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// One more than the largest id: rows the embedding table must have, placeholders included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    pub fn start(&self) -> i32 {
        self.start
    }

    pub fn end(&self) -> i32 {
        self.end
    }

    pub fn pad(&self) -> i32 {
        self.pad
    }

    /// Tokens of a prompt, start and end not counted, however long it is.
    pub fn token_count(&self, prompt: &str) -> Result<usize> {
        Ok(self.tokens(prompt)?.len())
    }

    /// The prompt between start and end, truncated or padded to [`Tokenizer::max_length`].
    pub fn encode(&self, prompt: &str) -> Result<Encoded> {
        Ok(self.add_special_tokens(&self.tokens(prompt)?, &[], Position::End).0)
    }

    /// Tokens between start and end, truncated or padded to [`Tokenizer::max_length`], with the ids `learnable` before or after them,
    /// for which room is always made; and the index of the first of those.
    pub fn add_special_tokens(&self, tokens: &[Token], learnable: &[i32], position: Position) -> (Encoded, usize) {
        let room = (self.max_length - 2).saturating_sub(learnable.len());
        let (kept, truncated) = tokens.split_at(tokens.len().min(room));
        let kept: Vec<i32> = kept.iter().map(|token| token.id).collect();
        let (parts, at) = match position {
            Position::Start => ([learnable, &kept], 1),
            Position::End => ([&kept[..], learnable], 1 + kept.len()),
        };
        let mut ids = [&[self.start][..], parts[0], parts[1], &[self.end]].concat();
        let eos = ids.iter().position(|&id| id == self.end).unwrap_or(0);
        ids.resize(self.max_length, self.pad);
        (Encoded { ids, eos, truncated: truncated.iter().map(|token| token.text.clone()).collect() }, at)
    }

    /// Adds a word that stands for a learnable token and returns its id, the first free one. Matched anywhere in a prompt, in
    /// any case, or only where it `is_whole`, no part of a longer word. `Error::Usage` when the word is blank or already a token.
    pub fn add_placeholder(&mut self, word: &str, is_whole: bool) -> Result<i32> {
        let usage = |what: String| Error::Usage(format!("placeholder '{}': {what}", files::short(word)));
        if word.trim().is_empty() {
            return Err(usage("must not be blank".into()));
        }
        if self.inner.token_to_id(word).is_some() {
            return Err(usage("is a token already; choose another word".into()));
        }
        let id = i32::try_from(self.vocab_size).map_err(|_| usage("no id is left".into()))?;
        self.add_words(&[word.to_string()], is_whole).map_err(usage)?;
        Ok(id)
    }

    /// Gives new words the next free ids. All at once: the library builds what finds them in a prompt anew at every call.
    fn add_words(&mut self, words: &[String], is_whole: bool) -> Result<(), String> {
        let tokens = words.iter().map(|word| AddedToken::from(word.as_str(), false).single_word(is_whole));
        self.inner.add_tokens(tokens).map_err(|e| format!("cannot be added: {}", one_line(&e.to_string())))?;
        for word in words {
            // The library numbers new tokens by the count of known ones, which is the first free id unless the file skips some.
            if self.inner.token_to_id(word).map(|id| id as usize) != Some(self.vocab_size) {
                return Err("cannot be added to this vocabulary".into());
            }
            self.vocab_size += 1;
        }
        Ok(())
    }

    /// Whether the vocabulary has the text as one token, in any case.
    pub fn has_word(&self, text: &str) -> bool {
        let lower = text.to_lowercase();
        [text, &lower, &format!("{lower}</w>")].into_iter().any(|token| self.inner.token_to_id(token).is_some())
    }

    /// Tokens of a prompt, without start and end.
    pub fn tokens(&self, prompt: &str) -> Result<Vec<Token>> {
        let failed =
            |e: tokenizers::Error| Error::Usage(format!("cannot tokenize the prompt: {}", one_line(&e.to_string())));
        let encoding = self.inner.encode(prompt, false).map_err(failed)?;
        let text = |range: &(usize, usize)| prompt.get(range.0..range.1).unwrap_or("").to_string();
        let tokens = encoding.get_ids().iter().zip(encoding.get_offsets());
        Ok(tokens.map(|(&id, range)| Token { id: id as i32, text: text(range) }).collect())
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
