//! What is compiled into the binary: the default model `shapes`, its world, and the reader of that world's images.
//!
//! Without the feature `embedded-assets` the two models are not: they are read from the folder that `RAREBIT_ASSETS` names, a copy of
//! `src/assets`, by a program 13 MB smaller.

use crate::Result;
use crate::weights::Model;

/// The world's tables, caption grammar and aesthetic, as JSON; written by `tools/shapes/world.py`.
pub const SHAPES_WORLD: &str = include_str!("shapes/world.json");

/// The embedded model, through the loader every folder goes through.
pub fn shapes() -> Result<Model> {
    models::shapes()
}

/// The reader of the embedded model's images.
pub fn shapes_reader() -> Result<Model> {
    models::shapes_reader()
}

#[cfg(feature = "embedded-assets")]
mod models {
    use super::*;

    macro_rules! shapes_files {
        ($($path:literal),+ $(,)?) => {
            &[$(($path, include_bytes!(concat!("shapes/", $path)) as &[u8])),+]
        };
    }

    /// The diffusers folder of `shapes` with its CLIP pair, aesthetic head and prompt policy, file by file (see `shapes/LICENSE.md`).
    static SHAPES: &[(&str, &[u8])] = shapes_files![
        "aesthetic/config.json",
        "aesthetic/model.safetensors",
        "clip/clip.safetensors",
        "clip/config.json",
        "clip/model.safetensors.index.json",
        "clip/preprocessor_config.json",
        "model_index.json",
        "prompt_policy/config.json",
        "prompt_policy/model.safetensors",
        "recommended.json",
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

    /// The attribute reader, a model of its own: what it is says nothing about how an image was made.
    static SHAPES_READER: &[(&str, &[u8])] = shapes_files!["reader/config.json", "reader/model.safetensors"];

    pub fn shapes() -> Result<Model> {
        Model::embedded(SHAPES)
    }

    pub fn shapes_reader() -> Result<Model> {
        Model::embedded(SHAPES_READER)
    }
}

#[cfg(not(feature = "embedded-assets"))]
mod models {
    use super::*;
    use crate::Error;
    use crate::weights::Component;
    use std::path::PathBuf;

    fn folder() -> Result<PathBuf> {
        let named = std::env::var_os("RAREBIT_ASSETS").filter(|name| !name.is_empty());
        let folder = named.map(|name| PathBuf::from(name).join("shapes")).ok_or_else(|| {
            Error::Usage("no model is compiled in; give --model, or set RAREBIT_ASSETS to a copy of src/assets".into())
        })?;
        match folder.is_dir() {
            true => Ok(folder),
            false => Err(Error::file(&folder, "is no folder; set RAREBIT_ASSETS to a copy of src/assets")),
        }
    }

    pub fn shapes() -> Result<Model> {
        Model::open(&folder()?)
    }

    pub fn shapes_reader() -> Result<Model> {
        Model::network(Component::Reader, &folder()?.join("reader"))
    }
}
