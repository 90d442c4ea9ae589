//! The image autoencoder (`AutoencoderKL`): latents to pixels and pixels to latent moments, each in the type that holds its numbers,
//! whatever the program around it computes in.

use super::config::VaeConfig;
use super::layers::{Layers, Linear, ResnetNorm};
use crate::program::{Attention, Builder, Cols, ValueId};
use crate::weights::Component;

const NORM_EPS: f64 = 1e-6;

struct Vae<'c, 'b> {
    config: &'c VaeConfig,
    net: Layers<'b>,
}

/// `latents [B, h, w, L]`, scaled as the UNet sees them → image `[B, f·h, f·w, 3]`, nominally in [-1, 1].
pub fn decode(b: &mut Builder, config: &VaeConfig, latents: ValueId) -> ValueId {
    let image = b.computing_in(config.dtype(b.dtype()), |b| decoder(b, config, latents));
    b.to_storage(image)
}

/// `image [B, H, W, 3]` in [-1, 1] → moments `[B, H/f, W/f, 2L]`: means, then log-variances, before scaling.
pub fn encode(b: &mut Builder, config: &VaeConfig, image: ValueId) -> ValueId {
    let moments = b.computing_in(config.dtype(b.dtype()), |b| encoder(b, config, image));
    b.to_storage(moments)
}

fn decoder(b: &mut Builder, config: &VaeConfig, latents: ValueId) -> ValueId {
    let mut vae = Vae { config, net: Layers::new(b, Component::Vae) };
    let levels = config.channels.len();
    let mut x = vae.net.b.affine(latents, 1.0 / config.scaling_factor, config.shift_factor);
    if config.post_quant_conv {
        x = vae.net.conv("post_quant_conv", x, config.latent_channels, 1, |_| {});
    }
    x = vae.net.conv("decoder.conv_in", x, config.channels[levels - 1], 3, |_| {});
    x = vae.middle("decoder.mid_block", x);
    for block in 0..levels {
        let (path, width) = (format!("decoder.up_blocks.{block}"), config.channels[levels - 1 - block]);
        for j in 0..=config.layers_per_block {
            x = vae.resnet(&format!("{path}.resnets.{j}"), x, width);
        }
        if block + 1 < levels {
            let size = vae.net.b.shape(x);
            if let [_, h, w, _] = size[..] {
                x = vae.net.b.nearest_2x(x, 2 * h, 2 * w);
            }
            x = vae.net.conv(&format!("{path}.upsamplers.0.conv"), x, width, 3, |_| {});
        }
    }
    x = vae.net.group_norm("decoder.conv_norm_out", x, config.norm_groups, NORM_EPS, true);
    vae.net.conv("decoder.conv_out", x, config.image_channels, 3, |_| {})
}

fn encoder(b: &mut Builder, config: &VaeConfig, image: ValueId) -> ValueId {
    let mut vae = Vae { config, net: Layers::new(b, Component::Vae) };
    let levels = config.channels.len();
    let mut x = vae.net.conv("encoder.conv_in", image, config.channels[0], 3, |_| {});
    for (level, &width) in config.channels.iter().enumerate() {
        let path = format!("encoder.down_blocks.{level}");
        for j in 0..config.layers_per_block {
            x = vae.resnet(&format!("{path}.resnets.{j}"), x, width);
        }
        if level + 1 < levels {
            // Padded at the bottom and right only (`Downsample2D` with padding 0).
            x = vae.net.conv(&format!("{path}.downsamplers.0.conv"), x, width, 3, |c| {
                (c.stride, c.padding) = (2, [0, 0, 1, 1]);
            });
        }
    }
    x = vae.middle("encoder.mid_block", x);
    x = vae.net.group_norm("encoder.conv_norm_out", x, config.norm_groups, NORM_EPS, true);
    x = vae.net.conv("encoder.conv_out", x, 2 * config.latent_channels, 3, |_| {});
    if config.quant_conv {
        x = vae.net.conv("quant_conv", x, 2 * config.latent_channels, 1, |_| {});
    }
    x
}

impl Vae<'_, '_> {
    fn resnet(&mut self, path: &str, x: ValueId, width: usize) -> ValueId {
        let norm = ResnetNorm { groups: self.config.norm_groups, eps: NORM_EPS };
        self.net.resnet(path, x, width, &norm, None)
    }

    /// Residual block, single-head self-attention over all pixels, residual block.
    fn middle(&mut self, path: &str, x: ValueId) -> ValueId {
        let width = self.net.b.channels(x);
        let mut x = self.resnet(&format!("{path}.resnets.0"), x, width);
        if self.config.mid_attention {
            let path = format!("{path}.attentions.0");
            let h = self.net.group_norm(&format!("{path}.group_norm"), x, self.config.norm_groups, NORM_EPS, false);
            let paths = ["to_q", "to_k", "to_v"].map(|p| format!("{path}.{p}"));
            let qkv = self.net.fused_linear(&paths, h, 3 * width, Linear::default());
            let column = |i: usize| Cols { value: qkv, at: i * width };
            let (q, k, v) = (column(0), column(1), column(2));
            let h = self.net.b.attention(Attention { q, k, v, heads: 1, head_dim: width, causal: false });
            x = self.net.linear(
                &format!("{path}.to_out.0"),
                h,
                width,
                Linear { residual: Some(x), ..Linear::default() },
            );
        }
        self.resnet(&format!("{path}.resnets.1"), x, width)
    }
}
