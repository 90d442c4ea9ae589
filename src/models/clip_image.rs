//! CLIP image towers: ViT-B/32 and L/14 (Radford et al. 2021; Dosovitskiy et al. 2021), OpenCLIP's H/14 (`CLIPVisionModelWithProjection`).

use super::config::ClipImageConfig;
use super::layers::{ClipLayer, Layers, Linear};
use crate::program::{Builder, ValueId};
use crate::weights::Component;

/// Shortest length that is divided by: only a zero vector is shorter.
const UNIT_EPS: f64 = 1e-12;

/// `image [B, S, S, 3]`, normalised (see [`super::preprocess`]) → features `[B, projection]`, of any length.
pub fn features(b: &mut Builder, config: &ClipImageConfig, component: Component, image: ValueId) -> ValueId {
    let &ClipImageConfig { width, layer_norm_eps: eps, .. } = config;
    let mut net = Layers::new(b, component);
    let patches = net.patches("vision_model.embeddings.patch_embedding", image, width, config.patch_size);
    let class = net.vector("vision_model.embeddings.class_embedding", width);
    let positions = net.table("vision_model.embeddings.position_embedding", config.positions(), width);
    let mut x = net.b.patches(patches, class, positions);
    // Spelt like this in every checkpoint.
    x = net.layer_norm("vision_model.pre_layrnorm", x, eps);
    let layer = ClipLayer {
        heads: config.heads,
        mlp_width: config.mlp_width,
        activation: config.activation,
        norm_eps: eps,
        causal: false,
    };
    for i in 0..config.layers {
        (x, _) = net.clip_layer(&format!("vision_model.encoder.layers.{i}"), x, &layer, None);
    }
    let class = net.b.row(x, 0);
    let class = net.layer_norm("vision_model.post_layernorm", class, eps);
    net.linear("visual_projection", class, config.projection, Linear { bias: false, ..Linear::default() })
}

/// Features of either tower as unit vectors, whose inner product is CLIP's similarity.
pub fn unit(b: &mut Builder, features: ValueId) -> ValueId {
    b.unit(features, UNIT_EPS)
}
