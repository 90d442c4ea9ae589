//! What diffusers calls a pipeline: an opened model with its configuration and tokenizers, and what makes images of prompts with it.

pub mod conditioning;
pub mod decode;
pub mod generate;
pub mod inversion;
mod job;
mod layout;
pub mod networks;
pub mod programs;
mod progress;
mod remarks;

pub use progress::{AtStep, Iteration, Observer, Progress};

use crate::data::textual_inversion::{LearnedToken, Word};
use crate::models::config::{ClipTextConfig, Family, PipelineConfig, Prediction};
use crate::models::detect;
use crate::text::{self, Encoded, Position, Token, Tokenizer};
use crate::weights::Model;
use crate::{Error, Result};
use std::ops::Range;

pub struct Pipeline {
    pub model: Model,
    pub config: PipelineConfig,
    /// One per text tower.
    pub tokenizers: Vec<Tokenizer>,
    /// Tokens that were learned elsewhere; see [`Pipeline::learn`].
    pub learned: Vec<LearnedToken>,
    /// What a user may not expect of the model, in lines.
    pub remarks: Vec<String>,
}

impl Pipeline {
    /// Reads configurations and tokenizers; `prediction` overrides what the model says. `Error::Tensor` where the model has more inside
    /// its networks than would be run.
    pub fn open(model: Model, prediction: Option<Prediction>) -> Result<Pipeline> {
        let config = detect::pipeline_config(&model, prediction)?;
        let tokenizers =
            (0..config.text.len()).map(|tower| tower_tokenizer(&model, &config, tower)).collect::<Result<Vec<_>>>()?;
        let remarks = remarks::remarks(&model, &config)?;
        Ok(Pipeline { model, config, tokenizers, learned: vec![], remarks })
    }

    /// Lets words in prompts stand for learned embeddings. `Error::Usage` where they do not fit this model's towers or a word is taken;
    /// a plain name that the vocabulary holds keeps its meaning there.
    pub fn learn(&mut self, mut token: LearnedToken) -> Result<()> {
        let name = token.name.clone();
        let usage = |what: String| Err(Error::Usage(format!("token '{name}': {what}")));
        let found = token.embeddings.iter().map(|embeddings| embeddings.len() / token.rows.max(1));
        let towers = self.config.text.iter().map(|tower| tower.width);
        let of_rows =
            token.embeddings.iter().all(|embeddings| token.rows > 0 && embeddings.len().is_multiple_of(token.rows));
        if !of_rows || !found.clone().eq(towers.clone()) {
            let list = |widths: Vec<usize>| widths.iter().map(usize::to_string).collect::<Vec<_>>().join(" and ");
            let (found, towers) = (list(found.collect()), list(towers.collect()));
            return usage(format!("has rows of {found} numbers; this model's text towers take {towers}"));
        }
        let is_ordinary = |word: &Word| self.tokenizers.iter().any(|tokenizer| tokenizer.has_word(&word.text));
        token.words.retain(|word| !word.is_plain || !is_ordinary(word));
        for word in &token.words {
            let mut learned = self.learned.iter().flat_map(|token| &token.words);
            if learned.any(|taken| taken.text.to_lowercase() == word.text.to_lowercase()) {
                return usage(format!("another token has the word '{}' already; rename one of the files", word.text));
            }
            for tokenizer in &mut self.tokenizers {
                tokenizer.add_placeholder(&word.text, word.is_plain)?;
            }
        }
        self.learned.push(token);
        Ok(())
    }

    /// The learned words of a prompt, as it spells them, each with its embeddings in all towers.
    pub fn learned_words(&self, prompt: &str) -> Result<Vec<(String, Vec<f32>)>> {
        let mut words = vec![];
        for token in self.tokenizers[0].tokens(prompt)? {
            let Some((index, rows)) = self.word(&token, self.tokenizers[0].vocab_size()) else { continue };
            let learned = &self.learned[index];
            let first: usize = self.learned[..index].iter().map(|token| token.rows).sum();
            let of_tower = |values: &Vec<f32>| {
                let width = values.len() / learned.rows;
                values[(rows.start - first) * width..(rows.end - first) * width].to_vec()
            };
            words.push((token.text, learned.embeddings.iter().flat_map(of_tower).collect()));
        }
        Ok(words)
    }

    /// Learned tokens that none of the prompts names.
    pub fn unnamed<'a>(&self, prompts: impl IntoIterator<Item = &'a str>) -> Result<Vec<&LearnedToken>> {
        let mut is_named = vec![false; self.learned.len()];
        let (tokenizer, mut before) = (&self.tokenizers[0], None);
        for prompt in prompts {
            if is_named.iter().all(|named| *named) {
                break;
            }
            // Images of one prompt follow each other.
            if before.replace(prompt) == Some(prompt) {
                continue;
            }
            for token in tokenizer.tokens(prompt)? {
                if let Some((learned, _)) = self.word(&token, tokenizer.vocab_size()) {
                    is_named[learned] = true;
                }
            }
        }
        Ok(self.learned.iter().zip(is_named).filter(|(_, named)| !named).map(|(token, _)| token).collect())
    }

    /// What a token stands for, where it is a learned word: which learned token, and which rows of all learned ones. Tokenizers number
    /// the words of those in order, as the last of the `known` tokens.
    fn word(&self, token: &Token, known: usize) -> Option<(usize, Range<usize>)> {
        let words: usize = self.learned.iter().map(|token| token.words.len()).sum();
        let mut number = (token.id as usize).checked_sub(known - words)?;
        let mut first = 0;
        for (index, learned) in self.learned.iter().enumerate() {
            if let Some(word) = learned.words.get(number) {
                return Some((index, first + word.rows.start..first + word.rows.end));
            }
            number -= learned.words.len();
            first += learned.rows;
        }
        None
    }

    /// The prompt's token ids for every tower.
    pub fn tokenize(&self, prompt: &str) -> Result<Vec<Encoded>> {
        self.add_special_tokens(prompt, 0, Position::End)
            .map(|encoded_towers| encoded_towers.into_iter().map(|(encoded, _)| encoded).collect())
    }

    /// The prompt's token ids for every tower, with `learnable` tokens at its start or end whose ids follow those of the vocabulary
    /// and of all learned tokens, and the index of the first of them. Room for them is made before the prompt is truncated.
    pub fn add_special_tokens(
        &self,
        prompt: &str,
        learnable: usize,
        position: Position,
    ) -> Result<Vec<(Encoded, usize)>> {
        let learned: usize = self.learned.iter().map(|token| token.rows).sum();
        let encode = |(tokenizer, tower): (&Tokenizer, &ClipTextConfig)| {
            let tokens = self.expanded(tokenizer.tokens(prompt)?, tokenizer.vocab_size(), tower.vocab_size);
            let first = (tower.vocab_size + learned) as i32;
            let ids: Vec<i32> = (first..).take(learnable).collect();
            Ok(tokenizer.add_special_tokens(&tokens, &ids, position))
        };
        self.tokenizers.iter().zip(&self.config.text).map(encode).collect()
    }

    /// Learned words as the rows they stand for, which the towers number after `table`.
    fn expanded(&self, tokens: Vec<Token>, known: usize, table: usize) -> Vec<Token> {
        let mut expanded = Vec::with_capacity(tokens.len());
        for token in tokens {
            match self.word(&token, known) {
                Some((_, rows)) => {
                    expanded.extend(rows.map(|row| Token { id: (table + row) as i32, ..token.clone() }));
                }
                None => expanded.push(token),
            }
        }
        expanded
    }

    /// Tokens per prompt, the same for every tower.
    pub fn tokens(&self) -> usize {
        self.tokenizers[0].max_length()
    }

    /// Latent height and width of an image size in pixels.
    pub fn latent_size(&self, width: usize, height: usize) -> Result<(usize, usize)> {
        let factor = self.config.vae.factor();
        // One rule for all models, so that a command line that works stays valid when --model changes.
        let multiple = factor.max(8);
        let fits = |side: usize| side > 0 && side.is_multiple_of(multiple);
        if !fits(width) || !fits(height) {
            return Err(Error::Usage(format!(
                "--size {width}x{height}: width and height must be positive multiples of {multiple}"
            )));
        }
        Ok((height / factor, width / factor))
    }
}

/// The tokenizer of one text tower of a pipeline.
fn tower_tokenizer(model: &Model, config: &PipelineConfig, tower: usize) -> Result<Tokenizer> {
    // CLIP-L pads with the end token, the OpenCLIP towers of SD 2 and SDXL with token 0.
    let open_clip = tower == 1 || config.family == Family::Sd2;
    let pad = if open_clip { text::OPEN_CLIP_PAD } else { text::END };
    tokenizer(model, ["tokenizer", "tokenizer_2"][tower.min(1)], pad, &config.text[tower])
}

/// The tokenizer of a text tower: the model's own files under `folder`, else CLIP's vocabulary, padded with `pad`.
pub(crate) fn tokenizer(model: &Model, folder: &str, pad: &str, tower: &ClipTextConfig) -> Result<Tokenizer> {
    let file = |name: &str| model.tokenizer_file(folder, name);
    let (special, map) = (file("tokenizer_config.json"), file("special_tokens_map.json"));
    let tokenizer = match (file("vocab.json"), file("merges.txt"), file("tokenizer.json")) {
        (Some(vocab), Some(merges), _) => Tokenizer::from_bytes(vocab, merges, special, map),
        (_, _, Some(json)) => Tokenizer::from_tokenizer_json(json, special, map),
        _ => Tokenizer::clip(pad),
    };
    let (list, json) = (file("added_tokens.json"), file("tokenizer.json"));
    let tokenizer = tokenizer.and_then(|t| t.with_added_tokens(list, special, json, tower.vocab_size));
    let of_model = |error: Error| Error::file(model.path(), format!("{folder}: {error}"));
    Ok(tokenizer.map_err(of_model)?.with_max_length(tower.max_positions))
}
