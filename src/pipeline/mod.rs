//! What diffusers calls a pipeline: an opened model with its configuration and tokenizers, and what makes images of prompts with it.

pub mod conditioning;
pub mod generate;
mod job;
pub mod networks;
pub mod programs;
mod progress;

pub use progress::{Iteration, Observer, Progress};

use crate::data::textual_inversion::LearnedToken;
use crate::models::config::{ClipTextConfig, Family, PipelineConfig, Prediction};
use crate::models::detect;
use crate::text::{self, Encoded, Position, Token, Tokenizer};
use crate::weights::Model;
use crate::{Error, Result};

pub struct Pipeline {
    pub model: Model,
    pub config: PipelineConfig,
    /// One per text tower.
    pub tokenizers: Vec<Tokenizer>,
    /// Tokens that were learned elsewhere; see [`Pipeline::learn`].
    pub learned: Vec<LearnedToken>,
}

impl Pipeline {
    /// Reads configurations and tokenizers; `prediction` overrides what the model says.
    pub fn open(model: Model, prediction: Option<Prediction>) -> Result<Pipeline> {
        let config = detect::pipeline_config(&model, prediction)?;
        let tokenizers =
            (0..config.text.len()).map(|tower| tower_tokenizer(&model, &config, tower)).collect::<Result<Vec<_>>>()?;
        Ok(Pipeline { model, config, tokenizers, learned: vec![] })
    }

    /// Lets a word in prompts stand for learned embeddings. `Error::Usage` where they do not fit this model's towers or the word
    /// is taken.
    pub fn learn(&mut self, token: LearnedToken) -> Result<()> {
        let usage = |what: String| Err(Error::Usage(format!("token '{}': {what}", token.word)));
        if token.embeddings.len() != self.config.text.len() {
            let (found, towers) = (token.embeddings.len(), self.config.text.len());
            return usage(format!("was learned for {found} text towers, this model has {towers}"));
        }
        for (embeddings, tower) in token.embeddings.iter().zip(&self.config.text) {
            if token.rows == 0 || embeddings.len() != token.rows * tower.width {
                let found = embeddings.len() as f64 / token.rows as f64;
                return usage(format!("has rows of {found} numbers, the model's text tower takes {}", tower.width));
            }
        }
        for tokenizer in &mut self.tokenizers {
            tokenizer.add_placeholder(&token.word)?;
        }
        self.learned.push(token);
        Ok(())
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

    /// The learned tokens that a prompt names where `reserved` others take their room; what is cut is not among them.
    pub fn learned_in(&self, prompt: &str, reserved: usize) -> Result<Vec<&LearnedToken>> {
        if self.learned.is_empty() {
            return Ok(vec![]);
        }
        let (encoded, _) = &self.add_special_tokens(prompt, reserved, Position::End)?[0];
        let mut first = self.config.text[0].vocab_size as i32;
        let mut named = vec![];
        for token in &self.learned {
            let rows = first..first + token.rows as i32;
            first = rows.end;
            if encoded.ids.iter().any(|id| rows.contains(id)) {
                named.push(token);
            }
        }
        Ok(named)
    }

    /// Learned words as the rows they stand for: tokenizers number words after the `known` last ones of their vocabulary, the towers
    /// rows after `table`.
    fn expanded(&self, tokens: Vec<Token>, known: usize, table: usize) -> Vec<Token> {
        let first_word = known - self.learned.len();
        let mut expanded = Vec::with_capacity(tokens.len());
        for token in tokens {
            let Some(word) = (token.id as usize).checked_sub(first_word) else {
                expanded.push(token);
                continue;
            };
            let before: usize = self.learned[..word].iter().map(|token| token.rows).sum();
            let first = table + before;
            expanded
                .extend((first..first + self.learned[word].rows).map(|id| Token { id: id as i32, ..token.clone() }));
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
    }
    .and_then(|tokenizer| tokenizer.with_added_tokens(file("added_tokens.json"), special, file("tokenizer.json")))
    .map_err(|error| Error::file(model.path(), format!("{folder}: {error}")))?
    .with_max_length(tower.max_positions);
    if tokenizer.vocab_size() > tower.vocab_size {
        let (tokens, rows) = (tokenizer.vocab_size(), tower.vocab_size);
        let what = format!("{folder} has {tokens} tokens but the text encoder embeds {rows}");
        return Err(Error::file(model.path(), what));
    }
    Ok(tokenizer)
}
