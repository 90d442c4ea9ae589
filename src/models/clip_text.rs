//! CLIP text towers: CLIP-L (Radford et al. 2021), OpenCLIP-H and OpenCLIP-bigG (`CLIPTextModel`, `CLIPTextModelWithProjection`).

use super::config::ClipTextConfig;
use super::layers::{Layers, Linear};
use crate::program::{Activation, Attention, Builder, Cols, Gemm, ValueId};
use crate::weights::{Component, Pack, Weight};

/// One tower inside a program.
pub struct ClipText<'c, 'b> {
    config: &'c ClipTextConfig,
    component: Component,
    net: Layers<'b>,
}

impl<'c, 'b> ClipText<'c, 'b> {
    pub fn new(b: &'b mut Builder, config: &'c ClipTextConfig, component: Component) -> ClipText<'c, 'b> {
        ClipText { config, component, net: Layers::new(b, component) }
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
        let ClipTextConfig { width, heads, mlp_width, layer_norm_eps: eps, activation, .. } = *self.config;
        let add_to = |x| Linear { residual: Some(x), ..Linear::default() };
        for i in from..to {
            let path = format!("text_model.encoder.layers.{i}");
            let h = self.net.layer_norm(&format!("{path}.layer_norm1"), x, eps);
            let paths = ["q_proj", "k_proj", "v_proj"].map(|p| format!("{path}.self_attn.{p}"));
            let qkv = self.net.fused_linear(&paths, h, 3 * width, Linear::default());
            let column = |i: usize| Cols { value: qkv, at: i * width };
            let (q, k, v) = (column(0), column(1), column(2));
            let h = self.net.b.attention(Attention { q, k, v, heads, head_dim: width / heads, causal: true });
            x = self.net.linear(&format!("{path}.self_attn.out_proj"), h, width, add_to(x));

            let h = self.net.layer_norm(&format!("{path}.layer_norm2"), x, eps);
            let h =
                self.net.linear(&format!("{path}.mlp.fc1"), h, mlp_width, Linear { activation, ..Linear::default() });
            x = self.net.linear(&format!("{path}.mlp.fc2"), h, width, add_to(x));
        }
        x
    }

    pub fn final_norm(&mut self, x: ValueId) -> ValueId {
        self.net.layer_norm("text_model.final_layer_norm", x, self.config.layer_norm_eps)
    }

    /// The row at the end-of-text token, projected: `x [B, T, C]` normalised, `eos [B]` → `[B, projection]`.
    pub fn pooled(&mut self, x: ValueId, eos: ValueId, projection: usize) -> ValueId {
        let x = self.net.b.pool(x, eos);
        let keys = vec!["text_projection.weight".to_string()];
        let shape = vec![self.config.width, projection];
        let w = self.net.b.weight(Weight { component: self.component, keys, pack: Pack::Linear, shape });
        self.net.b.gemm(Gemm { x, w, bias: None, residual: None, activation: Activation::None })
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
