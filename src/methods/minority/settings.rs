//! When, how hard and what a MinorityPrompt run optimizes, with the defaults of a model and of the released code.

use super::{Convention, Renoise};
use crate::Result;
use crate::optimize::objective::{self, Objective, loss_scale};
use crate::optimize::variable::Variable;
use crate::optimize::variable::token::{self, Init, PoolAt, TokenSettings};
use crate::pipeline::Pipeline;
use crate::pipeline::generate;
use crate::sampler::fraction_with_signal;
use crate::text::Position;

/// When and how hard is optimized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Adam steps at every optimized sampling step.
    pub iterations: usize,
    /// Adam's learning rate, in the units of what is optimized.
    pub lr: f64,
    /// The learning rate at sampling step `i` is `lr (1 − i · lr_decay)`.
    pub lr_decay: f64,
    /// Steps are optimized while their timestep is above this fraction of the training steps …
    pub t_lo: f64,
    /// … and at most at this one, …
    pub t_hi: f64,
    /// … and if their number is a multiple of this.
    pub every: usize,
    /// Steps that are not optimized read the prompt as it was, not as it was last optimized.
    pub base_prompt_after: bool,
    pub renoise: Renoise,
    pub convention: Convention,
}

/// Least and most `ᾱ` of the steps that are optimized by default: those of Stable Diffusion above 0.9 of its training steps, where the
/// released code optimizes. Beyond them its last step has no more noise; models that go further see nothing there.
const SIGNAL: [f64; 2] = [0.0046, 0.0141512];

/// The default learning rate over the spread of the token embeddings: about 1e-3 for CLIP-L, where the released scripts have that.
const SHARE_OF_SPREAD: f64 = 0.07;

impl Schedule {
    /// The defaults for a model, or those of the released code.
    pub fn of(pipeline: &Pipeline, convention: Convention) -> Result<Schedule> {
        let shared = Schedule {
            iterations: 10,
            lr: 1e-2,
            lr_decay: 0.0,
            t_lo: 0.9,
            t_hi: 1.0,
            every: 1,
            base_prompt_after: false,
            renoise: Renoise::Fixed(0.75),
            convention,
        };
        Ok(match convention {
            Convention::Released => shared,
            Convention::Diffusers => Schedule {
                lr: SHARE_OF_SPREAD * token::spread(pipeline, 0)?,
                t_lo: fraction_with_signal(&pipeline.config.scheduler, SIGNAL[1])?,
                t_hi: fraction_with_signal(&pipeline.config.scheduler, SIGNAL[0])?,
                base_prompt_after: true,
                renoise: Renoise::Annealed,
                ..shared
            },
        })
    }
}

/// Everything that holds for a whole run.
pub struct Settings {
    pub images: generate::Settings,
    pub schedule: Schedule,
    pub variable: Variable,
    /// Each gets `iterations` of its own, in this order.
    pub objectives: Vec<Objective<'static>>,
    /// Report every iteration.
    pub trace: bool,
    /// Gradients are computed times this power of two, which keeps those of f16 above its smallest numbers.
    pub loss_scale: f64,
    /// Bytes of arena the run may take; `None`: as many as the fastest way wants.
    pub budget: Option<usize>,
}

impl Settings {
    /// The method with its defaults for a model.
    pub fn of(pipeline: &Pipeline, images: generate::Settings) -> Result<Settings> {
        Ok(Settings {
            schedule: Schedule::of(pipeline, Convention::Diffusers)?,
            variable: Variable::Token(token(pipeline, Convention::Diffusers)?),
            objectives: vec![objective::minority(objective::Minority::default())],
            trace: false,
            loss_scale: loss_scale(images.dtype),
            budget: None,
            images,
        })
    }
}

/// The word the scripts of the paper begin with.
const FIRST_WORD: &str = "cool";

/// The token's defaults for a model. The released code's are one token of unit variance, pooled where it stands; ours begins at a
/// word, or where the vocabulary lacks it, anywhere in the cloud of words.
pub fn token(pipeline: &Pipeline, convention: Convention) -> Result<TokenSettings> {
    let (init, pool_at) = match convention {
        Convention::Released => (Init::Unit, PoolAt::Placeholder),
        Convention::Diffusers => {
            let counts = pipeline.tokenizers.iter().map(|tokenizer| tokenizer.token_count(FIRST_WORD));
            let is_one = counts.collect::<Result<Vec<_>>>()?.iter().all(|count| *count == 1);
            let init = if is_one { Init::Word(FIRST_WORD.into()) } else { Init::White { scale: 1.0 } };
            (init, PoolAt::Eos)
        }
    };
    Ok(TokenSettings { rows: 1, position: Position::End, init, pool_at })
}
