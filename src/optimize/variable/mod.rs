//! What is optimised while sampling, how it enters the network, and where its gradient comes out.

pub mod token;

use crate::Result;
use crate::models::clip_text::{self, Past, Prompt};
use crate::models::config::ClipTextConfig;
use crate::pipeline::Pipeline;
use crate::pipeline::programs::{Sizes, gradient_of, pooled_width};
use crate::program::{Builder, DType, Program, ValueId};
use token::TokenSettings;

/// What is optimised, per image.
#[derive(Clone, Debug, PartialEq)]
pub enum Variable {
    /// Rows of a learnable token beside the prompt.
    Token(TokenSettings),
    /// All text states of the prompt.
    Text,
    /// All text states of the unconditional branch; an objective sees it under guidance only.
    Null,
}

/// A buffer of the wide type that an optimiser changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    pub name: &'static str,
    pub shape: Vec<usize>,
}

/// Buffers of the learnable token, per tower.
pub const ROWS: [&str; 2] = ["token.rows", "token.rows_2"];
/// All text states as a parameter.
pub const STATES: &str = "states.rows";
/// Text states of the branch that is optimised, `[B, T, D]`, and their pooled text, `[B, P]`.
pub const CONTEXT: &str = "learned.context";
pub const POOLED: &str = "learned.pooled";
/// The optimiser's numbers; see [`crate::program::Update::AdamW`].
pub const ADAM: &str = "adam.scalars";

/// The optimiser's moments of a parameter.
pub fn moments_of(parameter: &str) -> [String; 2] {
    ["m", "v"].map(|moment| format!("{parameter}.{moment}"))
}

/// Names of what depends on how many tokens no learnable one stands before.
pub struct Names {
    prefix: usize,
}

impl Names {
    pub fn of(prefix: usize) -> Names {
        Names { prefix }
    }

    fn name(&self, what: &str) -> String {
        format!("token.{what}.{}", self.prefix)
    }

    /// Ids of the first tokens, `[B, P]`, and of the others, `[B, T − P]`.
    pub fn ids(&self, tower: usize) -> [String; 2] {
        [self.name(&format!("first_ids_{tower}")), self.name(&format!("ids_{tower}"))]
    }

    /// Index among the tokens after the first ones, `[B]`.
    pub fn pool_at(&self) -> String {
        self.name("pool_at")
    }

    fn kv(&self, tower: usize, layer: usize) -> String {
        self.name(&format!("kv_{tower}_{layer}"))
    }

    fn context(&self) -> String {
        self.name("context")
    }
}

/// What the programs of a variable are built for.
#[derive(Clone, Copy)]
pub struct Design<'a> {
    pub pipeline: &'a Pipeline,
    pub dtype: DType,
    pub sizes: Sizes,
    pub variable: &'a Variable,
}

/// The text states that a variable makes of its parameters.
pub struct States {
    /// `[B, T, D]`.
    pub context: ValueId,
    /// `[B, P]`, where the UNet takes it.
    pub pooled: Option<ValueId>,
}

impl Design<'_> {
    pub fn parameters(&self) -> Vec<Parameter> {
        let Sizes { batch, tokens, .. } = self.sizes;
        let config = &self.pipeline.config;
        match self.variable {
            Variable::Token(token) => {
                let row = |(&name, tower): (&&'static str, &ClipTextConfig)| Parameter {
                    name,
                    shape: vec![batch * token.rows, tower.width],
                };
                ROWS.iter().zip(&config.text).map(row).collect()
            }
            Variable::Text | Variable::Null => {
                vec![Parameter { name: STATES, shape: vec![batch, tokens, config.unet.context_width] }]
            }
        }
    }

    /// Tokens before the first learnable one → what those after them read: run once per prompt.
    pub fn prefix(&self, prefix: usize) -> Result<Program> {
        let (towers, names) = (&self.pipeline.config.text, Names::of(prefix));
        let mut b = Builder::new("prefix", self.dtype);
        let ids: Vec<ValueId> =
            (0..towers.len()).map(|tower| b.input_i32(&names.ids(tower)[0], &[self.sizes.batch, prefix])).collect();
        let states = clip_text::encode(&mut b, towers, &Prompt { ids: &ids, ..Prompt::default() });
        b.output(names.context(), states.context);
        for (tower, layers) in states.kv.iter().enumerate() {
            for (layer, kv) in layers.iter().enumerate() {
                let kv = b.columns(*kv, 2 * towers[tower].width);
                b.output(names.kv(tower, layer), kv);
            }
        }
        b.finish()
    }

    /// Appends the way from the parameters to the text states of the branch they belong to. `prefix` counts for tokens alone.
    pub fn states(&self, b: &mut Builder, prefix: usize) -> Result<States> {
        let parameters: Vec<ValueId> = self.parameters().iter().map(|p| b.wide_input(p.name, &p.shape)).collect();
        let pooled_width = pooled_width(self.pipeline)?;
        Ok(match self.variable {
            Variable::Token(_) => {
                let states = self.encode(b, &parameters, prefix);
                // Two towers: a UNet that takes no pooled text has no use for it.
                States { context: states.context, pooled: pooled_width.and(states.pooled) }
            }
            Variable::Text | Variable::Null => States {
                context: b.narrow(parameters[0]),
                pooled: pooled_width.map(|width| b.input(POOLED, &[self.sizes.batch, width])),
            },
        })
    }

    /// The parameters → [`CONTEXT`] and [`POOLED`].
    pub fn forward(&self, prefix: usize) -> Result<Program> {
        let mut b = Builder::new("variable", self.dtype);
        let states = self.states(&mut b, prefix)?;
        match (self.variable, states.pooled) {
            (Variable::Token(_), pooled) => {
                b.output(CONTEXT, states.context);
                pooled.into_iter().for_each(|pooled| b.output(POOLED, pooled));
            }
            (Variable::Text | Variable::Null, _) => {
                // A copy, which an output must be.
                let context = b.affine(states.context, 1.0, 0.0);
                b.output(CONTEXT, context);
            }
        }
        b.finish()
    }

    /// The tokens from the first learnable one on, through the towers.
    fn encode(&self, b: &mut Builder, rows: &[ValueId], prefix: usize) -> clip_text::TextStates {
        let (config, names) = (&self.pipeline.config, Names::of(prefix));
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

    /// One step of Adam; `scale` is what the gradients were multiplied with.
    pub fn update(&self, scale: f64) -> Result<Program> {
        let mut b = Builder::new("adam", self.dtype);
        let scalars = b.scalars(ADAM, 7);
        for Parameter { name, shape } in self.parameters() {
            let [m_name, v_name] = moments_of(name);
            let gradient = b.wide_input(gradient_of(name), &shape);
            let gradient = b.affine(gradient, 1.0 / scale, 0.0);
            let [p, m, v] = [name, &m_name, &v_name].map(|name| b.wide_input(name, &shape));
            let [p, m, v] = b.adamw([p, gradient, m, v], scalars);
            b.output(name, p);
            b.output(m_name, m);
            b.output(v_name, v);
        }
        b.finish()
    }
}
