//! CLIP text towers: CLIP-L (Radford et al. 2021), OpenCLIP-H and OpenCLIP-bigG (`CLIPTextModel`, `CLIPTextModelWithProjection`).

use super::config::ClipTextConfig;
use super::layers::{ClipLayer, Layers, Linear};
use crate::program::{Builder, ValueId};
use crate::weights::Component;

/// One tower inside a program.
pub struct ClipText<'c, 'b> {
    config: &'c ClipTextConfig,
    net: Layers<'b>,
}

impl<'c, 'b> ClipText<'c, 'b> {
    pub fn new(b: &'b mut Builder, config: &'c ClipTextConfig, component: Component) -> ClipText<'c, 'b> {
        ClipText { config, net: Layers::new(b, component) }
    }

    /// Token plus position embeddings: `ids [B, T]` → `[B, T, C]`.
    pub fn embed(&mut self, ids: ValueId) -> ValueId {
        let ClipTextConfig { vocab_size, width, max_positions, .. } = *self.config;
        let table = self.net.table("text_model.embeddings.token_embedding", vocab_size, width);
        let positions = self.net.table("text_model.embeddings.position_embedding", max_positions, width);
        self.net.b.tokens(ids, table, positions)
    }

    /// The residual stream after layers `from .. to`.
    pub fn layers(&mut self, mut x: ValueId, from: usize, to: usize) -> ValueId {
        let ClipTextConfig { heads, mlp_width, layer_norm_eps: norm_eps, activation, .. } = *self.config;
        let layer = ClipLayer { heads, mlp_width, activation, norm_eps, causal: true };
        for i in from..to {
            x = self.net.clip_layer(&format!("text_model.encoder.layers.{i}"), x, &layer);
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
#[derive(Clone, Copy)]
pub struct TextStates {
    /// `[B, T, context width]`.
    pub context: ValueId,
    /// SDXL: `[B, projection]`.
    pub pooled: Option<ValueId>,
}

/// The text side of a pipeline. One tower (SD 1, SD 2): its normalised last hidden state. Two towers (SDXL): their residual
/// streams before the last layer side by side, and the second tower's projection at its end-of-text token `eos [B]`.
/// `ids [B, T]` per tower.
pub fn encode(b: &mut Builder, towers: &[ClipTextConfig], ids: &[ValueId], eos: Option<ValueId>) -> TextStates {
    match towers {
        [config] => {
            let mut tower = ClipText::new(b, config, Component::TextEncoder);
            let x = tower.embed(ids[0]);
            let x = tower.layers(x, 0, config.layers);
            TextStates { context: tower.final_norm(x), pooled: None }
        }
        [first, second] => {
            let mut tower = ClipText::new(b, first, Component::TextEncoder);
            let x = tower.embed(ids[0]);
            let left = tower.layers(x, 0, first.layers - 1);

            let mut tower = ClipText::new(b, second, Component::TextEncoder2);
            let x = tower.embed(ids[1]);
            let right = tower.layers(x, 0, second.layers - 1);
            let last = tower.layers(right, second.layers - 1, second.layers);
            let last = tower.final_norm(last);
            let pooled = match (second.projection, eos) {
                (Some(projection), Some(eos)) => Some(tower.pooled(last, eos, projection)),
                (Some(_) | None, _) => None,
            };
            TextStates { context: b.concat(left, right), pooled }
        }
        _ => {
            b.fail(format!("{} text towers; one or two are known", towers.len()));
            TextStates { context: ids[0], pooled: None }
        }
    }
}
