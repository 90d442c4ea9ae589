//! The denoising UNet of SD 1.x, SD 2.x and SDXL (`UNet2DConditionModel`; Rombach et al. 2022, Podell et al. 2023).
//!
//! What does not change over the sampling steps is computed by programs of its own: [`Unet::context_kv`] projects the text to the
//! keys and values of every cross-attention in one product, [`Unet::time`] projects all timesteps for every residual block in one.

use super::config::{Middle, UnetConfig};
use super::layers::{Layers, Linear, ResnetNorm};
use crate::program::{Activation, Attention, Builder, Cols, ValueId};
use crate::weights::Component;
use std::collections::HashMap;

/// SDXL's added conditions: `pooled [B, P]` text and `size_ids [B, 6]` (original height, width, crop top, left, target height, width).
#[derive(Clone, Copy)]
pub struct Added {
    pub pooled: ValueId,
    pub size_ids: ValueId,
}

/// Side-by-side outputs of many small projections: which columns belong to which layer.
#[derive(Default)]
struct Fused {
    paths: Vec<String>,
    at: HashMap<String, usize>,
    width: usize,
}

impl Fused {
    /// Adds the projections at `paths`, `width` columns each, found again under `name`.
    fn push(&mut self, name: String, paths: &[&str], width: usize) {
        self.at.insert(name.clone(), self.width);
        for path in paths {
            self.paths.push(format!("{name}.{path}"));
            self.width += width;
        }
    }
}

pub struct Unet<'c> {
    config: &'c UnetConfig,
    /// Keys and values of all cross-attentions.
    kv: Fused,
    /// Time projections of all residual blocks.
    shifts: Fused,
}

const TRANSFORMER_NORM_EPS: f64 = 1e-6;

impl<'c> Unet<'c> {
    pub fn new(config: &'c UnetConfig) -> Unet<'c> {
        let mut unet = Unet { config, kv: Fused::default(), shifts: Fused::default() };
        let last = config.channels.len() - 1;
        for (level, depths) in config.down_transformers.iter().enumerate() {
            unet.declare(&format!("down_blocks.{level}"), depths.len(), depths, config.channels[level]);
        }
        match config.middle {
            Middle::Absent => {}
            Middle::Resnet => unet.declare("mid_block", 1, &[], config.channels[last]),
            Middle::Transformer(depth) => unet.declare("mid_block", 2, &[depth], config.channels[last]),
        }
        for (block, depths) in config.up_transformers.iter().rev().enumerate() {
            unet.declare(&format!("up_blocks.{block}"), depths.len(), depths, config.channels[last - block]);
        }
        unet
    }

    /// Notes the fused projections of one block: its residual blocks and its transformers of these depths.
    fn declare(&mut self, path: &str, resnets: usize, depths: &[usize], width: usize) {
        for j in 0..resnets {
            self.shifts.push(format!("{path}.resnets.{j}"), &["time_emb_proj"], width);
        }
        for (j, &depth) in depths.iter().enumerate() {
            for k in 0..depth {
                let name = format!("{path}.attentions.{j}.transformer_blocks.{k}.attn2");
                self.kv.push(name, &["to_k", "to_v"], width);
            }
        }
    }

    /// Columns of [`Unet::context_kv`].
    pub fn kv_width(&self) -> usize {
        self.kv.width
    }

    /// Columns of [`Unet::time`].
    pub fn time_width(&self) -> usize {
        self.shifts.width
    }

    /// Keys and values of every cross-attention: `context [B, T, D]` → `[B, T, kv_width]`.
    pub fn context_kv(&self, b: &mut Builder, context: ValueId) -> ValueId {
        let options = Linear { bias: false, ..Linear::default() };
        Layers::new(b, Component::Unet).fused_linear(&self.kv.paths, context, self.kv.width, options)
    }

    /// Time shifts of every residual block: `timesteps [S]` → `[S, time_width]`, or `[S, B, time_width]` with added conditions.
    pub fn time(&self, b: &mut Builder, timesteps: ValueId, added: Option<Added>) -> ValueId {
        let config = self.config;
        let width = 4 * config.channels[0];
        let silu = Linear { activation: Activation::Silu, ..Linear::default() };
        let mut net = Layers::new(b, Component::Unet);
        let t = net.b.sinusoidal(timesteps, config.channels[0], config.flip_sin_to_cos, config.freq_shift);
        let t = net.linear("time_embedding.linear_1", t, width, silu);
        let mut t = net.linear("time_embedding.linear_2", t, width, Linear::default());
        match (added, &config.added) {
            (None, None) => {}
            (Some(Added { pooled, size_ids }), Some(added)) => {
                let sizes = net.b.sinusoidal(size_ids, added.time_dim, config.flip_sin_to_cos, config.freq_shift);
                let sizes = net.b.to_storage(sizes);
                let a = net.b.concat(pooled, sizes);
                let a = net.linear("add_embedding.linear_1", a, width, silu);
                let a = net.linear("add_embedding.linear_2", a, width, Linear::default());
                t = net.b.outer_add(t, a);
            }
            (None, Some(_)) => net.b.fail("this UNet needs added conditions"),
            (Some(_), None) => net.b.fail("this UNet takes no added conditions"),
        }
        let t = net.b.activate(t, Activation::Silu);
        net.fused_linear(&self.shifts.paths, t, self.shifts.width, Linear::default())
    }

    /// The prediction for `latents [B, H, W, C]`, given `kv [B, T, kv_width]` and one step's `time [B or 1, time_width]`.
    pub fn forward(&self, b: &mut Builder, latents: ValueId, kv: ValueId, time: ValueId) -> ValueId {
        let config = self.config;
        let levels = config.channels.len();
        let mut net = Forward { unet: self, net: Layers::new(b, Component::Unet), kv, time };

        let mut x = net.net.conv("conv_in", latents, config.channels[0], 3, |_| {});
        let mut skips = vec![x];
        for (level, depths) in config.down_transformers.iter().enumerate() {
            let path = format!("down_blocks.{level}");
            for (j, &depth) in depths.iter().enumerate() {
                x = net.resnet(&path, j, x, level);
                x = net.transformer(&path, j, x, level, depth);
                skips.push(x);
            }
            if level + 1 < levels {
                x = net
                    .net
                    .conv(&format!("{path}.downsamplers.0.conv"), x, config.channels[level], 3, |c| c.stride = 2);
                skips.push(x);
            }
        }

        match config.middle {
            Middle::Absent => {}
            Middle::Resnet => x = net.resnet("mid_block", 0, x, levels - 1),
            Middle::Transformer(depth) => {
                x = net.resnet("mid_block", 0, x, levels - 1);
                x = net.transformer("mid_block", 0, x, levels - 1, depth);
                x = net.resnet("mid_block", 1, x, levels - 1);
            }
        }

        for (block, depths) in config.up_transformers.iter().rev().enumerate() {
            let (path, level) = (format!("up_blocks.{block}"), levels - 1 - block);
            for (j, &depth) in depths.iter().enumerate() {
                if let Some(skip) = skips.pop() {
                    x = net.net.b.concat(x, skip);
                }
                x = net.resnet(&path, j, x, level);
                x = net.transformer(&path, j, x, level, depth);
            }
            if let (true, Some(&skip)) = (block + 1 < levels, skips.last()) {
                let size = net.net.b.shape(skip);
                x = net.net.b.nearest_2x(x, size[1], size[2]);
                x = net.net.conv(&format!("{path}.upsamplers.0.conv"), x, config.channels[level], 3, |_| {});
            }
        }
        let x = net.net.group_norm("conv_norm_out", x, config.norm_groups, config.norm_eps, true);
        net.net.conv("conv_out", x, config.out_channels, 3, |_| {})
    }
}

/// The blocks of one forward pass.
struct Forward<'u, 'c, 'b> {
    unet: &'u Unet<'c>,
    net: Layers<'b>,
    kv: ValueId,
    time: ValueId,
}

impl Forward<'_, '_, '_> {
    fn resnet(&mut self, block: &str, j: usize, x: ValueId, level: usize) -> ValueId {
        let config = self.unet.config;
        let path = format!("{block}.resnets.{j}");
        let norm = ResnetNorm { groups: config.norm_groups, eps: config.norm_eps };
        let shift = Cols { value: self.time, at: self.unet.shifts.at[&path] };
        self.net.resnet(&path, x, config.channels[level], &norm, Some(shift))
    }

    /// `Transformer2DModel`: project, `depth` blocks, project back, plus the input.
    fn transformer(&mut self, block: &str, j: usize, x: ValueId, level: usize, depth: usize) -> ValueId {
        if depth == 0 {
            return x;
        }
        let config = self.unet.config;
        let (path, width) = (format!("{block}.attentions.{j}"), config.channels[level]);
        let h = self.net.group_norm(&format!("{path}.norm"), x, config.norm_groups, TRANSFORMER_NORM_EPS, false);
        // A 1x1 convolution (SD 1) and a linear layer (SD 2, SDXL) are the same product.
        let mut h = self.net.linear(&format!("{path}.proj_in"), h, width, Linear::default());
        for k in 0..depth {
            h = self.transformer_block(&format!("{path}.transformer_blocks.{k}"), h, config.heads[level]);
        }
        self.net.linear(&format!("{path}.proj_out"), h, width, Linear { residual: Some(x), ..Linear::default() })
    }

    /// `BasicTransformerBlock`: self-attention, cross-attention, GEGLU feed-forward, each on a layer norm and added back.
    fn transformer_block(&mut self, path: &str, x: ValueId, heads: usize) -> ValueId {
        let width = self.net.b.channels(x);
        let head_dim = width / heads;
        let no_bias = Linear { bias: false, ..Linear::default() };
        let add_to = |x| Linear { residual: Some(x), ..Linear::default() };

        let h = self.net.layer_norm(&format!("{path}.norm1"), x, 1e-5);
        let paths = ["to_q", "to_k", "to_v"].map(|p| format!("{path}.attn1.{p}"));
        let qkv = self.net.fused_linear(&paths, h, 3 * width, no_bias);
        let column = |i: usize| Cols { value: qkv, at: i * width };
        let h = Attention { q: column(0), k: column(1), v: column(2), heads, head_dim, causal: false };
        let h = self.net.b.attention(h);
        let x = self.net.linear(&format!("{path}.attn1.to_out.0"), h, width, add_to(x));

        let h = self.net.layer_norm(&format!("{path}.norm2"), x, 1e-5);
        let q = self.net.linear(&format!("{path}.attn2.to_q"), h, width, no_bias);
        let at = self.unet.kv.at[&format!("{path}.attn2")];
        let (k, v) = (Cols { value: self.kv, at }, Cols { value: self.kv, at: at + width });
        let h = self.net.b.attention(Attention { q: q.into(), k, v, heads, head_dim, causal: false });
        let x = self.net.linear(&format!("{path}.attn2.to_out.0"), h, width, add_to(x));

        let h = self.net.layer_norm(&format!("{path}.norm3"), x, 1e-5);
        let geglu = Linear { activation: Activation::Geglu, ..Linear::default() };
        let h = self.net.linear(&format!("{path}.ff.net.0.proj"), h, 8 * width, geglu);
        self.net.linear(&format!("{path}.ff.net.2"), h, width, add_to(x))
    }
}
