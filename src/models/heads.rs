//! Heads that judge a feature: a chain of linear layers (the LAION aesthetic predictor), or an MLP.

use super::config::HeadConfig;
use super::layers::{Layers, Linear};
use crate::program::{Builder, ValueId};
use crate::weights::Component;

/// `x [B, width]` → `[B, outputs]`: 1 output for a score. The heads we know take unit CLIP image features.
pub fn aesthetic(b: &mut Builder, config: &HeadConfig, mut x: ValueId) -> ValueId {
    let mut net = Layers::new(b, Component::Aesthetic);
    for (i, layer) in config.layers.iter().enumerate() {
        x = net.linear(&format!("layers.{}", layer.key), x, layer.width, Linear::default());
        if config.relu && i + 1 < config.layers.len() {
            x = net.b.clamp(x, 0.0, f64::INFINITY);
        }
    }
    x
}
