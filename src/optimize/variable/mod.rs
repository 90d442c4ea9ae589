//! What may change in a run, its parameters, and where they enter the network.

mod names;
pub mod token;

pub use names::Names;

use crate::Result;
use crate::autodiff::{Cotangent, Request, differentiate};
use crate::models::clip_text::{self, Past, Prompt};
use crate::models::config::ClipTextConfig;
use crate::pipeline::Pipeline;
use crate::pipeline::conditioning::Branch;
use crate::pipeline::programs::{Sizes, gradient_of, pooled_width};
use crate::program::{Builder, DType, Program, ValueId};
use crate::sampler::LATENTS;
use token::TokenSettings;

/// Where a variable enters the network, which is what its gradient is taken with respect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Latents `[B, h, w, C]`: the unit-variance noise a run starts from, or what a sampling step starts from.
    Latents,
    /// Text states, `[R, T, D]`: of all rows of a run (under guidance the unconditional ones first), or of one branch.
    Context,
    /// SDXL's pooled text, `[R, P]`.
    Pooled,
    /// Rows of the text towers' embedding tables, `[B · rows, C]` per tower.
    Tokens,
}

/// What is optimized, per image.
#[derive(Clone, Debug, PartialEq)]
pub enum Variable {
    /// Rows of a learnable token beside the prompt.
    Token(TokenSettings),
    /// All text states of a branch; an objective sees those of the unconditional one under guidance only.
    TextStates(Branch),
    /// The latents.
    Latents,
}

impl Variable {
    pub fn entry(&self) -> Entry {
        match self {
            Variable::Token(_) => Entry::Tokens,
            Variable::TextStates(_) => Entry::Context,
            Variable::Latents => Entry::Latents,
        }
    }

    /// The branch whose text states it changes.
    pub fn branch(&self) -> Option<Branch> {
        match self {
            Variable::Token(_) => Some(Branch::Prompt),
            Variable::TextStates(branch) => Some(*branch),
            Variable::Latents => None,
        }
    }

    /// Tokens of the prompt that it takes for itself.
    pub fn reserved_tokens(&self) -> usize {
        match self {
            Variable::Token(token) => token.rows,
            Variable::TextStates(_) | Variable::Latents => 0,
        }
    }
}

/// A buffer of the accumulator type that an optimizer changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    pub name: &'static str,
    /// The first dimension is the batch, or a multiple of it.
    pub shape: Vec<usize>,
}

impl Parameter {
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Buffers of the learnable token, per tower.
pub const ROWS: [&str; 2] = ["token.rows", "token.rows_2"];
/// All text states as a parameter.
pub const STATES: &str = "states.rows";
/// Text states of the branch that is optimized, `[B, T, D]`, and their pooled text, `[B, P]`.
pub const CONTEXT: &str = "optimized.context";
pub const POOLED: &str = "optimized.pooled";

/// The text states that a variable makes of its parameters.
#[derive(Clone, Copy)]
pub struct States {
    /// `[B, T, D]`.
    pub context: ValueId,
    /// `[B, P]`, where the UNet takes it.
    pub pooled: Option<ValueId>,
}

/// What the programs of a variable are built for.
#[derive(Clone, Copy)]
pub struct VariableSpec<'a> {
    pub pipeline: &'a Pipeline,
    pub dtype: DType,
    pub sizes: Sizes,
    pub variable: &'a Variable,
    /// Tokens before the first learnable one in all prompts of the batch; 0 where the variable is no token.
    pub prefix: usize,
}

impl VariableSpec<'_> {
    pub fn parameters(&self) -> Vec<Parameter> {
        let Sizes { batch, height, width, tokens } = self.sizes;
        let config = &self.pipeline.config;
        match self.variable {
            Variable::Token(token) => {
                let row = |(&name, tower): (&&'static str, &ClipTextConfig)| Parameter {
                    name,
                    shape: vec![batch * token.rows, tower.width],
                };
                ROWS.iter().zip(&config.text).map(row).collect()
            }
            Variable::TextStates(_) => {
                vec![Parameter { name: STATES, shape: vec![batch, tokens, config.unet.context_width] }]
            }
            Variable::Latents => {
                vec![Parameter { name: LATENTS, shape: vec![batch, height, width, config.unet.in_channels] }]
            }
        }
    }

    /// Appends the way from the parameters to the text states of the branch they belong to; `None` where they are no text.
    pub fn states(&self, b: &mut Builder) -> Result<Option<States>> {
        let pooled_width = pooled_width(self.pipeline)?;
        let mut rows = || self.parameters().iter().map(|p| b.accumulator_input(p.name, &p.shape)).collect::<Vec<_>>();
        Ok(match self.variable {
            Variable::Token(_) => {
                let rows = rows();
                let states = self.encode(b, &rows);
                // Two towers: a UNet that takes no pooled text has no use for it.
                Some(States { context: states.context, pooled: pooled_width.and(states.pooled) })
            }
            Variable::TextStates(_) => {
                let context = rows()[0];
                Some(States {
                    context: b.to_storage(context),
                    pooled: pooled_width.map(|width| b.input(POOLED, &[self.sizes.batch, width])),
                })
            }
            Variable::Latents => None,
        })
    }

    /// The parameters → [`CONTEXT`] and, of a token, [`POOLED`]; `None` where they are no text.
    pub fn forward(&self) -> Result<Option<Program>> {
        let mut b = Builder::new("variable", self.dtype);
        let Some(states) = self.states(&mut b)? else { return Ok(None) };
        match (self.variable.entry(), states.pooled) {
            (Entry::Tokens, pooled) => {
                b.output(CONTEXT, states.context);
                pooled.into_iter().for_each(|pooled| b.output(POOLED, pooled));
            }
            (Entry::Context | Entry::Pooled | Entry::Latents, _) => {
                // A copy, which an output must be.
                let context = b.affine(states.context, 1.0, 0.0);
                b.output(CONTEXT, context);
            }
        }
        b.finish().map(Some)
    }

    /// Gradients to what [`VariableSpec::forward`] makes → gradients to the parameters: what carries the gradient of a whole run on
    /// to a token. `None` where they are no text.
    pub fn backward(&self) -> Result<Option<Program>> {
        let Some(mut program) = self.forward()? else { return Ok(None) };
        program.name = "variable backward".into();
        let outputs = std::mem::take(&mut program.outputs);
        let objectives = outputs.into_iter().map(|(name, id)| (id, Cotangent::Input(gradient_of(&name)))).collect();
        let leaf = |p: Parameter| Some((program.input(p.name)?, gradient_of(p.name)));
        let leaves = self.parameters().into_iter().filter_map(leaf).collect();
        differentiate(&program, &Request { objectives, leaves }, None).map(Some)
    }

    /// Tokens before the first learnable one → what those after them read: run once per prompt. `None` where there is no token.
    pub fn prefix(&self) -> Result<Option<Program>> {
        if self.variable.entry() != Entry::Tokens {
            return Ok(None);
        }
        let (towers, names) = (&self.pipeline.config.text, Names::of(self.prefix));
        let shape = [self.sizes.batch, self.prefix];
        let mut b = Builder::new("prefix", self.dtype);
        let ids: Vec<ValueId> = (0..towers.len()).map(|tower| b.input_i32(&names.ids(tower)[0], &shape)).collect();
        let states = clip_text::encode(&mut b, towers, &Prompt { ids: &ids, ..Prompt::default() });
        b.output(names.context(), states.context);
        for (tower, layers) in states.kv.iter().enumerate() {
            for (layer, kv) in layers.iter().enumerate() {
                let kv = b.columns(*kv, 2 * towers[tower].width);
                b.output(names.kv(tower, layer), kv);
            }
        }
        b.finish().map(Some)
    }

    /// The tokens from the first learnable one on, through the towers.
    fn encode(&self, b: &mut Builder, rows: &[ValueId]) -> clip_text::TextStates {
        let (config, names, prefix) = (&self.pipeline.config, Names::of(self.prefix), self.prefix);
        let Sizes { batch, tokens, .. } = self.sizes;
        let ids: Vec<ValueId> =
            (0..config.text.len()).map(|tower| b.input_i32(&names.ids(tower)[1], &[batch, tokens - prefix])).collect();
        let pool_at = (config.text.len() > 1).then(|| b.input_i32(names.pool_at(), &[batch]));
        let towers = config.text.len();
        let kv = config.text.iter().enumerate().map(|(tower, clip)| {
            let layers = if towers > 1 && tower == 0 { clip.layers - 1 } else { clip.layers };
            (0..layers).map(|layer| b.input(names.kv(tower, layer), &[batch, prefix, 2 * clip.width])).collect()
        });
        let kv = kv.collect();
        let context = b.input(names.context(), &[batch, prefix, config.unet.context_width]);
        let past = Past { tokens: prefix, kv, context };
        clip_text::encode(b, &config.text, &Prompt { ids: &ids, learnable: rows, pool_at, past: Some(&past) })
    }
}
