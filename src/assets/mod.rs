//! What is compiled into the binary: the default model `shapes`.

use crate::Result;
use crate::weights::Model;

macro_rules! shapes_files {
    ($($path:literal),+ $(,)?) => {
        &[$(($path, include_bytes!(concat!("shapes/", $path)) as &[u8])),+]
    };
}

/// The diffusers folder of `shapes`, file by file (see `shapes/LICENSE.md`).
static SHAPES: &[(&str, &[u8])] = shapes_files![
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

/// The embedded model, through the loader every folder goes through.
pub fn shapes() -> Result<Model> {
    Model::embedded(SHAPES)
}
