//! CLIP text towers: CLIP-L (Radford et al. 2021), OpenCLIP-H and OpenCLIP-bigG (`CLIPTextModel`, `CLIPTextModelWithProjection`).

use super::config::ClipTextConfig;
use super::layers::{ClipLayer, Layers, Linear};
use crate::program::{Builder, Cols, ValueId};
use crate::weights::Component;

/// One tower inside a program.
pub struct ClipText<'c, 'b> {
    config: &'c ClipTextConfig,
    net: Layers<'b>,
    /// Keys and values of earlier tokens, layer by layer: [`Past::kv`].
    past: &'c [ValueId],
    /// Keys and values of these tokens, layer by layer: `2C` columns.
    kv: Vec<Cols>,
}

impl<'c, 'b> ClipText<'c, 'b> {
    pub fn new(b: &'b mut Builder, config: &'c ClipTextConfig, component: Component) -> ClipText<'c, 'b> {
        ClipText { config, net: Layers::new(b, component), past: &[], kv: vec![] }
    }

    /// The tower of number `index` with its tokens embedded.
    fn begin(
        b: &'b mut Builder,
        config: &'c ClipTextConfig,
        component: Component,
        prompt: &Prompt<'c>,
        index: usize,
    ) -> (ClipText<'c, 'b>, ValueId) {
        let past = prompt.past.map_or(&[][..], |past| &past.kv[index]);
        let mut tower = ClipText { past, ..ClipText::new(b, config, component) };
        let first = prompt.past.map_or(0, |past| past.tokens);
        let x = tower.embed_from(prompt.ids[index], prompt.learnable.get(index).copied(), first);
        (tower, x)
    }

    /// Token plus position embeddings: `ids [B, T]` → `[B, T, C]`.
    pub fn embed(&mut self, ids: ValueId) -> ValueId {
        self.embed_from(ids, None, 0)
    }

    /// The same of tokens at positions `first ..`; ids beyond the vocabulary are rows of `extra [R, C]`, learnable tokens.
    pub fn embed_from(&mut self, ids: ValueId, extra: Option<ValueId>, first: usize) -> ValueId {
        let ClipTextConfig { vocab_size, width, max_positions, .. } = *self.config;
        let table = self.net.table("text_model.embeddings.token_embedding", vocab_size, width);
        let mut positions = self.net.table("text_model.embeddings.position_embedding", max_positions, width);
        if first > 0 {
            let tokens = self.net.b.channels(ids);
            positions = self.net.b.slice(positions, first, tokens);
        }
        match extra {
            None => self.net.b.tokens(ids, table, positions),
            Some(extra) => {
                let extra = self.net.b.to_storage(extra);
                self.net.b.tokens_with(ids, table, extra, positions)
            }
        }
    }

    /// The residual stream after layers `from .. to`.
    pub fn layers(&mut self, mut x: ValueId, from: usize, to: usize) -> ValueId {
        let ClipTextConfig { heads, mlp_width, layer_norm_eps: norm_eps, activation, .. } = *self.config;
        let layer = ClipLayer { heads, mlp_width, activation, norm_eps, causal: true };
        for i in from..to {
            let past = self.past.get(i).copied();
            let (next, kv) = self.net.clip_layer(&format!("text_model.encoder.layers.{i}"), x, &layer, past);
            self.kv.push(kv);
            x = next;
        }
        x
    }

    pub fn final_norm(&mut self, x: ValueId) -> ValueId {
        self.net.layer_norm("text_model.final_layer_norm", x, self.config.layer_norm_eps)
    }

    /// The row at the end-of-text token, projected: `x [B, T, C]` normalised, `eos [B]` → `[B, projection]`.
    pub fn pooled(&mut self, x: ValueId, eos: ValueId, projection: usize) -> ValueId {
        let x = self.net.b.pool(x, eos);
        self.net.linear("text_projection", x, projection, Linear { bias: false, ..Linear::default() })
    }

    /// Everything after [`ClipText::embed`] in a CLIP pair: `x [B, T, C]`, `eos [B]` → features `[B, projection]`.
    pub fn features(&mut self, x: ValueId, eos: ValueId) -> ValueId {
        let x = self.layers(x, 0, self.config.layers);
        let x = self.final_norm(x);
        let Some(projection) = self.config.projection else {
            self.net.b.fail("this text tower has no text_projection");
            return x;
        };
        self.pooled(x, eos, projection)
    }
}

/// What the UNet is conditioned on.
#[derive(Clone)]
pub struct TextStates {
    /// `[B, T, context width]`.
    pub context: ValueId,
    /// SDXL: `[B, projection]`.
    pub pooled: Option<ValueId>,
    /// Keys and values of every layer that is run, per tower: `2C` columns each.
    pub kv: Vec<Vec<Cols>>,
}

/// What the text side of a pipeline reads.
#[derive(Clone, Copy, Default)]
pub struct Prompt<'a> {
    /// Per tower, `[B, T]`.
    pub ids: &'a [ValueId],
    /// Rows of learnable tokens per tower, `[R, C]`: ids beyond the vocabulary are theirs. Empty: there are none.
    pub learnable: &'a [ValueId],
    /// Two towers: which of these tokens the second one is pooled at, `[B]`; CLIP pools at its end-of-text token.
    pub pool_at: Option<ValueId>,
    /// Tokens before these, encoded earlier.
    pub past: Option<&'a Past>,
}

/// What tokens hand on to those after them. The towers are causal: whatever follows, it stays what it is.
#[derive(Clone, Debug)]
pub struct Past {
    pub tokens: usize,
    /// Keys and values of every layer that is run, per tower: `[B, tokens, 2C]` each.
    pub kv: Vec<Vec<ValueId>>,
    /// `[B, tokens, context width]`.
    pub context: ValueId,
}

/// The text side of a pipeline. One tower (SD 1, SD 2): its normalised last hidden state. Two towers (SDXL): their residual
/// streams before the last layer side by side, and the second tower's projection at one token. The context is that of all
/// tokens, past ones first.
pub fn encode<'a>(b: &mut Builder, towers: &'a [ClipTextConfig], prompt: &Prompt<'a>) -> TextStates {
    let (context, pooled, kv) = match towers {
        [config] => {
            let (mut tower, x) = ClipText::begin(b, config, Component::TextEncoder, prompt, 0);
            let x = tower.layers(x, 0, config.layers);
            (tower.final_norm(x), None, vec![tower.kv])
        }
        [first, second] => {
            let (mut tower, x) = ClipText::begin(b, first, Component::TextEncoder, prompt, 0);
            let left = tower.layers(x, 0, first.layers - 1);
            let left_kv = tower.kv;

            let (mut tower, x) = ClipText::begin(b, second, Component::TextEncoder2, prompt, 1);
            let right = tower.layers(x, 0, second.layers - 1);
            let last = tower.layers(right, second.layers - 1, second.layers);
            let last = tower.final_norm(last);
            let pooled = match (second.projection, prompt.pool_at) {
                (Some(projection), Some(at)) => Some(tower.pooled(last, at, projection)),
                (Some(_) | None, _) => None,
            };
            let kv = vec![left_kv, tower.kv];
            (b.concat(left, right), pooled, kv)
        }
        _ => {
            b.fail(format!("{} text towers; one or two are known", towers.len()));
            (prompt.ids[0], None, vec![])
        }
    };
    let context = prompt.past.map_or(context, |past| b.concat_tokens(past.context, context));
    TextStates { context, pooled, kv }
}
