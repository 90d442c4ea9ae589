//! GPT-2 (Radford et al. 2019; `GPT2LMHeadModel`), frozen or trainable: token ids to logits.

use super::config::Gpt2Config;
use super::layers::{Layers, Linear, Weights};
use crate::Result;
use crate::program::{Activation, Attention, Builder, Cols, DType, ValueId};
use crate::weights::{Component, Weight};
use std::collections::HashSet;

const TOKENS: &str = "transformer.wte";

/// The network inside a program.
pub struct Gpt2<'c, 'b> {
    config: &'c Gpt2Config,
    net: Layers<'b>,
}

impl<'c, 'b> Gpt2<'c, 'b> {
    pub fn new(b: &'b mut Builder, config: &'c Gpt2Config, weights: Weights) -> Gpt2<'c, 'b> {
        Gpt2 { config, net: Layers::with(b, Component::Policy, weights) }
    }

    /// Token plus position embeddings: `ids [B, T]` → `[B, T, C]`. Shorter rows end in ids that do not matter: nothing looks right.
    pub fn embed(&mut self, ids: ValueId) -> ValueId {
        let &Gpt2Config { vocab_size, width, max_positions, .. } = self.config;
        let table = self.net.table(TOKENS, vocab_size, width);
        let positions = self.net.table("transformer.wpe", max_positions, width);
        self.net.b.tokens(ids, table, positions)
    }

    /// Embeddings `[B, T, C]` → normalised hidden states `[B, T, C]`.
    pub fn hidden(&mut self, mut x: ValueId) -> ValueId {
        for i in 0..self.config.layers {
            x = self.layer(&format!("transformer.h.{i}"), x);
        }
        self.net.layer_norm("transformer.ln_f", x, self.config.layer_norm_eps)
    }

    fn layer(&mut self, path: &str, x: ValueId) -> ValueId {
        let &Gpt2Config { width, heads, mlp_width, layer_norm_eps: eps, .. } = self.config;
        let add_to = |x| Linear { residual: Some(x), ..Linear::default() };
        let h = self.net.layer_norm(&format!("{path}.ln_1"), x, eps);
        let qkv = self.net.conv1d(&format!("{path}.attn.c_attn"), h, 3 * width, Linear::default());
        let [q, k, v] = [0, 1, 2].map(|i| Cols { value: qkv, at: i * width });
        let h = self.net.b.attention(Attention { q, k, v, heads, head_dim: width / heads, causal: true });
        let x = self.net.conv1d(&format!("{path}.attn.c_proj"), h, width, add_to(x));

        let h = self.net.layer_norm(&format!("{path}.ln_2"), x, eps);
        let gelu = Linear { activation: Activation::GeluTanh, ..Linear::default() };
        let h = self.net.conv1d(&format!("{path}.mlp.c_fc"), h, mlp_width, gelu);
        self.net.conv1d(&format!("{path}.mlp.c_proj"), h, width, add_to(x))
    }

    /// Hidden states `[.., C]` → logits `[.., V]`: of all positions, or of those taken out of `hidden` before.
    pub fn logits(&mut self, hidden: ValueId) -> ValueId {
        self.net.tied(TOKENS, hidden, self.config.vocab_size)
    }
}

/// `log p(target)` at every position: logits `[.., V]`, `targets [..]` → `[..]`, 0 where the target is negative.
pub fn log_probabilities(b: &mut Builder, logits: ValueId, targets: ValueId) -> ValueId {
    let loss = b.cross_entropy(logits, targets);
    b.affine(loss, -1.0, 0.0)
}

/// The weights a trainable network reads from buffers, each under its [`Weight::name`].
pub fn parameters(config: &Gpt2Config) -> Result<Vec<Weight>> {
    let mut b = Builder::new("parameters", DType::F32);
    let ids = b.input_i32("ids", &[1, 1]);
    let mut net = Gpt2::new(&mut b, config, Weights::Frozen);
    let x = net.embed(ids);
    let x = net.hidden(x);
    let logits = net.logits(x);
    b.output("logits", logits);
    let program = b.finish()?;
    // A frozen tied head has the token table once more, packed for the product.
    let mut seen = HashSet::new();
    Ok(program.weights().map(|(_, weight)| weight.clone()).filter(|weight| seen.insert(weight.name())).collect())
}
