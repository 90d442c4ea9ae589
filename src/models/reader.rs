//! The attribute reader (`AttributeReader`): an image of the `shapes` world to one logit per value of every attribute.

use super::config::ReaderConfig;
use super::layers::{Layers, Linear, ResnetNorm};
use crate::program::{Builder, ValueId};
use crate::weights::Component;

const NORM_EPS: f64 = 1e-5;

/// `image [B, S, S, 3]` in [-1, 1] → logits `[B, 1, 1, values]`: the heads side by side, in the configuration's order.
pub fn logits(b: &mut Builder, config: &ReaderConfig, image: ValueId) -> ValueId {
    let mut net = Layers::new(b, Component::Reader);
    let norm = ResnetNorm { groups: config.norm_groups, eps: NORM_EPS };
    let mut x = net.conv("conv_in", image, config.channels[0], 3, |_| {});
    for (level, &width) in config.channels.iter().enumerate() {
        x = net.resnet(&format!("blocks.{level}"), x, width, &norm, None);
        if let Some(&next) = config.channels.get(level + 1) {
            x = net.conv(&format!("downsamplers.{level}"), x, next, 3, |c| c.stride = 2);
        }
    }
    x = net.group_norm("norm_out", x, config.norm_groups, NORM_EPS, true);
    x = net.conv("conv_out", x, config.squeeze_channels, 1, |_| {});
    // The whole map at once: where a thing lies is one of the attributes.
    x = net.conv("hidden", x, config.hidden_size, config.last_side(), |c| c.padding = [0; 4]);
    x = net.group_norm("hidden_norm", x, config.norm_groups, NORM_EPS, true);
    let heads: Vec<String> = config.heads.iter().map(|(name, _)| format!("heads.{name}")).collect();
    let values = config.heads.iter().map(|(_, values)| values).sum();
    net.fused_linear(&heads, x, values, Linear::default())
}
