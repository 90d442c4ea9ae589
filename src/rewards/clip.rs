//! CLIP similarity: the cosine of the features of an image and of its prompt (Radford et al. 2021).

use super::Reward;
use crate::exec::{Data, Executor};
use crate::models::clip_text::ClipText;
use crate::models::config::{ClipConfig, ClipImageConfig, ClipTextConfig};
use crate::models::preprocess::Preprocess;
use crate::models::{clip_image, detect};
use crate::pipeline;
use crate::program::{Builder, DType, Program, ValueId};
use crate::text::{self, Tokenizer};
use crate::weights::{Component, Model};
use crate::{Error, Result};

/// Similarity by one of a model's CLIPs, between -1 and 1.
pub struct Clip {
    component: Component,
    config: ClipConfig,
    text: ClipTextConfig,
    tokenizer: Tokenizer,
    /// How the image tower is shown an image; at first as CLIP's own preprocessing does.
    pub preprocess: Preprocess,
}

impl Clip {
    /// `component` is [`Component::Clip`] or [`Component::HeldOutClip`]. An error where it lacks a text tower or a tokenizer.
    pub fn new(model: &Model, component: Component) -> Result<Clip> {
        let config = detect::clip_config(model, component)?;
        let Some(text) = config.text.clone() else {
            return Err(Error::file(
                model.source(component),
                "has no text tower, which the similarity to a prompt needs",
            ));
        };
        let tokenizer = tokenizer(model, component, &text)?;
        Ok(Clip { component, preprocess: config.preprocess, config, text, tokenizer })
    }

    /// From what [`Reward::write`] writes to features of the prompts of length 1 in the buffer `output`, `[batch, projection]`.
    pub(crate) fn text(&self, dtype: DType, batch: usize, output: &str) -> Result<Program> {
        let mut b = Builder::new(format!("{} text", self.name()), dtype);
        let ids = b.input_i32(self.buffer("ids", batch), &[batch, self.tokenizer.max_length()]);
        let ends = b.input_i32(self.buffer("ends", batch), &[batch]);
        let mut tower = ClipText::new(&mut b, &self.text, self.component);
        let x = tower.embed(ids);
        let features = tower.features(x, ends);
        let unit = clip_image::unit(&mut b, features);
        b.output(output, unit);
        b.finish()
    }

    /// The name of a buffer for `batch` prompts: another number of them has buffers of its own.
    fn buffer(&self, what: &str, batch: usize) -> String {
        format!("{}.{what} {batch}", self.name())
    }
}

/// The CLIP's own tokenizer; else CLIP's vocabulary, or that of the pipeline it lies in, whichever the tower embeds.
fn tokenizer(model: &Model, component: Component, text: &ClipTextConfig) -> Result<Tokenizer> {
    let own = component.name();
    let has = |file: &str| model.tokenizer_file(own, file).is_some();
    if has("tokenizer.json") || (has("vocab.json") && has("merges.txt")) {
        return pipeline::tokenizer(model, own, text::END, text);
    }
    let clip = Tokenizer::clip(text::END)?.with_max_length(text.max_positions);
    if clip.vocab_size() == text.vocab_size {
        return Ok(clip);
    }
    match pipeline::tokenizer(model, "tokenizer", text::END, text) {
        Ok(tokenizer) if tokenizer.vocab_size() == text.vocab_size => Ok(tokenizer),
        Ok(_) | Err(_) => {
            let what =
                format!("no vocabulary of {} tokens; put its vocab.json and merges.txt beside it", text.vocab_size);
            Err(Error::file(model.source(component), what))
        }
    }
}

/// Features of `image [B, H, W, 3]` in [-1, 1] as unit vectors `[B, projection]`.
pub(crate) fn image_features(
    b: &mut Builder,
    config: &ClipImageConfig,
    component: Component,
    preprocess: &Preprocess,
    image: ValueId,
) -> ValueId {
    // What is left of 256 levels in 16 bits is resized first.
    let image = b.to_accumulator(image);
    let image = preprocess.append(b, image);
    let features = clip_image::features(b, config, component, image);
    clip_image::unit(b, features)
}

impl Reward for Clip {
    fn name(&self) -> &str {
        self.component.name()
    }

    fn append(&self, b: &mut Builder, image: ValueId) -> ValueId {
        let image = image_features(b, &self.config.image, self.component, &self.preprocess, image);
        let shape = b.shape(image);
        let text = b.input(self.buffer("text", shape[0]), &shape);
        b.dot(image, text)
    }

    fn prepare(&self, dtype: DType, batch: usize) -> Result<Option<Program>> {
        self.text(dtype, batch, &self.buffer("text", batch)).map(Some)
    }

    /// Prompts are cut at the tower's length, as CLIP's are.
    fn write(&self, executor: &mut dyn Executor, prompts: &[&str]) -> Result<()> {
        let encoded = prompts.iter().map(|prompt| self.tokenizer.encode(prompt)).collect::<Result<Vec<_>>>()?;
        let ids: Vec<i32> = encoded.iter().flat_map(|prompt| &prompt.ids).copied().collect();
        let ends: Vec<i32> = encoded.iter().map(|prompt| prompt.eos as i32).collect();
        executor.write(&self.buffer("ids", prompts.len()), Data::I32(&ids))?;
        executor.write(&self.buffer("ends", prompts.len()), Data::I32(&ends))
    }
}
