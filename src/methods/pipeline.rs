//! A pipeline: an opened model, its configuration and its tokenizers; nothing is loaded yet.

use crate::models::config::{Family, PipelineConfig, Prediction};
use crate::models::detect;
use crate::text::{self, Encoded, Tokenizer};
use crate::weights::Model;
use crate::{Error, Result};

pub struct Pipeline {
    pub model: Model,
    pub config: PipelineConfig,
    /// One per text tower.
    pub tokenizers: Vec<Tokenizer>,
}

impl Pipeline {
    /// Reads configurations and tokenizers; `prediction` overrides what the model says.
    pub fn open(model: Model, prediction: Option<Prediction>) -> Result<Pipeline> {
        let config = detect::pipeline_config(&model, prediction)?;
        let tokenizers =
            (0..config.text.len()).map(|tower| tokenizer(&model, &config, tower)).collect::<Result<Vec<_>>>()?;
        Ok(Pipeline { model, config, tokenizers })
    }

    /// The prompt's token ids for every tower.
    pub fn tokenize(&self, prompt: &str) -> Result<Vec<Encoded>> {
        self.tokenizers.iter().map(|tokenizer| tokenizer.encode(prompt)).collect()
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

/// The tokenizer of one text tower: the model's own files, else CLIP's vocabulary.
fn tokenizer(model: &Model, config: &PipelineConfig, tower: usize) -> Result<Tokenizer> {
    let folder = ["tokenizer", "tokenizer_2"][tower.min(1)];
    let file = |name: &str| model.tokenizer_file(folder, name);
    let (special, map) = (file("tokenizer_config.json"), file("special_tokens_map.json"));
    let tokenizer = match (file("vocab.json"), file("merges.txt"), file("tokenizer.json")) {
        (Some(vocab), Some(merges), _) => Tokenizer::from_bytes(vocab, merges, special, map),
        (_, _, Some(json)) => Tokenizer::from_tokenizer_json(json, special, map),
        _ => {
            // CLIP-L pads with the end token, the OpenCLIP towers of SD 2 and SDXL with token 0.
            let open_clip = tower == 1 || config.family == Family::Sd2;
            Tokenizer::clip(if open_clip { text::OPEN_CLIP_PAD } else { text::END })
        }
    }
    .and_then(|tokenizer| tokenizer.with_added_tokens(file("added_tokens.json"), special, file("tokenizer.json")))
    .map_err(|error| Error::file(model.path(), format!("{folder}: {error}")))?
    .with_max_length(config.text[tower].max_positions);
    if tokenizer.vocab_size() > config.text[tower].vocab_size {
        return Err(Error::file(
            model.path(),
            format!(
                "{folder} has {} tokens but the text encoder embeds {}",
                tokenizer.vocab_size(),
                config.text[tower].vocab_size
            ),
        ));
    }
    Ok(tokenizer)
}
