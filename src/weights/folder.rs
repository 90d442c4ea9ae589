//! The diffusers folder layout: configs, tokenizer files, and component weights in one file, a variant, or shards.

use super::file::{File, parse_json};
use super::{Component, Model, Tensor, keys_text, keys_vae};
use crate::{Error, Result};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Configuration files by the name they get in [`Model::config`].
const CONFIGS: [(&str, &str); 9] = [
    ("model_index", "model_index.json"),
    ("unet", "unet/config.json"),
    ("vae", "vae/config.json"),
    ("text_encoder", "text_encoder/config.json"),
    ("text_encoder_2", "text_encoder_2/config.json"),
    ("reader", "reader/config.json"),
    ("scheduler", "scheduler/scheduler_config.json"),
    ("tokenizer", "tokenizer/tokenizer_config.json"),
    ("tokenizer_2", "tokenizer_2/tokenizer_config.json"),
];

const TOKENIZER_FILES: [&str; 6] = [
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "added_tokens.json",
];

/// The names diffusers and transformers give weight files.
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];

/// A folder, on disk or compiled in.
pub(super) enum Source<'a> {
    Disk(&'a Path),
    Embedded(&'static [(&'static str, &'static [u8])]),
}

impl Source<'_> {
    /// The path of a file of the folder, for opening and for messages.
    fn path(&self, name: &str) -> PathBuf {
        match self {
            Source::Disk(root) => root.join(name),
            Source::Embedded(_) => Path::new("embedded model").join(name),
        }
    }

    /// The names of the files in a subfolder (`""` for the folder itself), sorted; none where there is no such folder.
    fn list(&self, folder: &str) -> Result<Vec<String>> {
        let mut names = Vec::new();
        match self {
            Source::Disk(root) => {
                let path = root.join(folder);
                if path.is_dir() {
                    for entry in std::fs::read_dir(&path).map_err(Error::io("read", &path))? {
                        let entry = entry.map_err(Error::io("read", &path))?;
                        names.extend(entry.file_name().into_string().ok());
                    }
                }
            }
            Source::Embedded(files) => {
                let inside = |name: &'static str| name.strip_prefix(folder)?.strip_prefix('/');
                names.extend(files.iter().filter_map(|(name, _)| inside(name)).map(str::to_string));
            }
        }
        names.sort();
        Ok(names)
    }

    /// The content of a small file; `None` where there is none.
    fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        match self {
            Source::Disk(root) => match std::fs::read(root.join(name)) {
                Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(Error::io("read", root.join(name))(e)),
            },
            Source::Embedded(files) => Ok(files.iter().find(|(n, _)| *n == name).map(|(_, b)| Cow::Borrowed(*b))),
        }
    }

    fn open(&self, name: &str) -> Result<File> {
        match self {
            Source::Disk(root) => File::open(&root.join(name)),
            Source::Embedded(files) => match files.iter().find(|(n, _)| *n == name) {
                Some((_, bytes)) => File::embedded(self.path(name), bytes),
                None => Err(Error::file(self.path(name), "does not exist")),
            },
        }
    }
}

/// Loads every component of a pipeline folder.
pub(super) fn load(model: &mut Model, source: &Source) -> Result<()> {
    for (name, file) in CONFIGS {
        if let Some(bytes) = source.read(file)? {
            add_config(model, name, source.path(file), &bytes)?;
        }
    }
    for folder in ["tokenizer", "tokenizer_2"] {
        for file in TOKENIZER_FILES {
            let name = format!("{folder}/{file}");
            if let Some(bytes) = source.read(&name)? {
                model.tokenizers.insert(name, bytes);
            }
        }
    }
    for component in Component::ALL {
        load_component(model, source, component.name(), component)?;
    }
    match Component::ALL.iter().any(|c| model.has(*c)) {
        true => Ok(()),
        false => Err(Error::file(
            model.path(),
            "is not a diffusers folder: expected model_index.json and weights in unet/, vae/, text_encoder/",
        )),
    }
}

/// Loads a UNet folder (`config.json` and weights) over the UNet of `model`.
pub(super) fn load_unet(model: &mut Model, source: &Source) -> Result<()> {
    if let Some(bytes) = source.read("config.json")? {
        add_config(model, "unet", source.path("config.json"), &bytes)?;
    }
    load_component(model, source, "", Component::Unet)?;
    match model.keys(Component::Unet).iter().any(|key| key.starts_with("down_blocks.")) {
        true => Ok(()),
        false => {
            Err(Error::file(source.path(""), "is not a UNet folder: expected diffusion_pytorch_model.safetensors"))
        }
    }
}

fn add_config(model: &mut Model, name: &str, path: PathBuf, bytes: &[u8]) -> Result<()> {
    let json = parse_json(&path, bytes)?;
    model.configs.insert(name.to_string(), (path, json));
    Ok(())
}

/// Loads the weights of one component, where its folder has any.
fn load_component(model: &mut Model, source: &Source, folder: &str, c: Component) -> Result<()> {
    let inside = |name: &str| if folder.is_empty() { name.to_string() } else { format!("{folder}/{name}") };
    let Some(name) = weight_file(source, folder)? else { return Ok(()) };
    if name.ends_with(".safetensors") {
        return add_file(model, source.open(&inside(&name))?, c, None);
    }
    let index = inside(&name);
    let path = source.path(&index);
    let bytes = source.read(&index)?.unwrap_or_default();
    for (shard, keys) in shards(&path, &bytes)? {
        add_file(model, source.open(&inside(&shard))?, c, Some(&keys))?;
    }
    Ok(())
}

/// Chooses among the weight files of a folder: full precision before `fp16` before another variant, one file before
/// shards.
fn weight_file(source: &Source, folder: &str) -> Result<Option<String>> {
    let names = source.list(folder)?;
    let stem = |name: &str| STEMS.iter().find_map(|s| Some(name.strip_prefix(s)?.strip_prefix('.')?.to_string()));
    // What follows the stem: `safetensors`, `fp16.safetensors`, `safetensors.index.json`,
    // `safetensors.index.fp16.json`.
    let rank = |name: &String| match stem(name)?.as_str() {
        "safetensors" => Some(0),
        "safetensors.index.json" => Some(1),
        "fp16.safetensors" => Some(2),
        "safetensors.index.fp16.json" => Some(3),
        rest if rest.contains("-of-") => None,
        rest if rest.ends_with(".safetensors") => Some(4),
        rest if rest.starts_with("safetensors.index.") => Some(5),
        _ => None,
    };
    if let Some((_, name)) = names.iter().filter_map(|name| Some((rank(name)?, name))).min() {
        return Ok(Some(name.clone()));
    }
    match names.iter().find(|n| n.ends_with(".bin") || n.ends_with(".ckpt") || n.ends_with(".msgpack")) {
        Some(name) => Err(Error::file(source.path(folder).join(name), "only safetensors weights are read; convert it")),
        None => Ok(None),
    }
}

/// The shards of an index file and the keys each must hold.
fn shards(path: &Path, bytes: &[u8]) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let json = parse_json(path, bytes)?;
    let Some(map) = json.get("weight_map").and_then(|m| m.as_object()) else {
        return Err(Error::file(path, "has no 'weight_map': not an index of shards"));
    };
    let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (key, shard) in map {
        match shard.as_str() {
            Some(shard) if shard.ends_with(".safetensors") && !shard.contains(['/', '\\']) => {
                shards.entry(shard.to_string()).or_default().insert(key.clone());
            }
            _ => return Err(Error::file(path, format!("'{key}' is not in a .safetensors file beside the index"))),
        }
    }
    Ok(shards)
}

/// Enters the tensors of a file under canonical names; `keys` limits it to those an index assigns to this shard.
fn add_file(model: &mut Model, file: File, c: Component, keys: Option<&BTreeSet<String>>) -> Result<()> {
    let number = model.files.len();
    let mut found = Vec::new();
    for (key, info) in &file.header().tensors {
        if keys.is_none_or(|keys| keys.contains(key))
            && let Some(name) = canonical(c, key)
        {
            found.push((name, Tensor::whole(number, info)));
        }
    }
    if let Some(key) = keys.and_then(|keys| keys.iter().find(|k| !file.header().tensors.contains_key(*k))) {
        let what = "the index of shards puts it in this file, which lacks it".to_string();
        return Err(Error::Tensor { path: file.path().to_path_buf(), key: key.clone(), what });
    }
    model.files.push(file);
    found.into_iter().try_for_each(|(name, tensor)| model.insert(c, name, tensor))
}

/// The present-day name of a key; `None` for buffers that are not weights.
fn canonical(c: Component, key: &str) -> Option<String> {
    match c {
        Component::TextEncoder | Component::TextEncoder2 => keys_text::from_transformers(key),
        Component::Vae => Some(keys_vae::from_diffusers(key)),
        Component::Unet | Component::Reader => Some(key.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::file;
    use super::*;

    fn keys(files: &[(&'static str, &'static [u8])], c: Component) -> Result<Vec<String>> {
        let files: &'static [(&str, &[u8])] = Box::leak(files.to_vec().into_boxed_slice());
        Model::embedded(files).map(|m| m.keys(c).into_iter().map(str::to_string).collect())
    }

    #[test]
    fn old_names_and_missing_prefixes_are_brought_up_to_date() {
        let text =
            ("text_encoder/model.fp16.safetensors", file(&[("final_layer_norm.bias", &[2]), ("position_ids", &[1])]));
        let vae = ("vae/diffusion_pytorch_model.safetensors", file(&[("d.attentions.0.proj_attn.bias", &[2])]));
        assert_eq!(keys(&[text, vae], Component::TextEncoder).unwrap(), ["text_model.final_layer_norm.bias"]);
        assert_eq!(keys(&[text, vae], Component::Vae).unwrap(), ["d.attentions.0.to_out.0.bias"]);
    }

    #[test]
    fn full_precision_comes_first() {
        let full = ("unet/diffusion_pytorch_model.safetensors", file(&[("full", &[1])]));
        let half = ("unet/diffusion_pytorch_model.fp16.safetensors", file(&[("half", &[1])]));
        let other = ("unet/other.safetensors", file(&[("other", &[1])]));
        assert_eq!(keys(&[other, half, full], Component::Unet).unwrap(), ["full"]);
        assert_eq!(keys(&[other, half], Component::Unet).unwrap(), ["half"]);
        assert!(keys(&[other], Component::Unet).is_err());
    }

    #[test]
    fn shards_are_joined_and_checked() {
        let index = |json: &'static str| ("unet/diffusion_pytorch_model.safetensors.index.json", json.as_bytes());
        let first = ("unet/a-1.safetensors", file(&[("a", &[1]), ("stale", &[1])]));
        let second = ("unet/a-2.safetensors", file(&[("b", &[1])]));
        let good = index(r#"{"weight_map":{"a":"a-1.safetensors","b":"a-2.safetensors"}}"#);
        assert_eq!(keys(&[good, first, second], Component::Unet).unwrap(), ["a", "b"]);
        let refused = |json, why: &str| {
            let e = keys(&[index(json), first, second], Component::Unet).unwrap_err().to_string();
            assert!(e.contains(why), "{e}");
        };
        refused(r#"{"weight_map":{"c":"a-1.safetensors"}}"#, "tensor 'c': the index");
        refused(r#"{"weight_map":{"a":"../a-1.safetensors"}}"#, "beside the index");
        refused(r#"{"weight_map":{"a":"a-3.safetensors"}}"#, "a-3.safetensors: does not exist");
        refused(r#"{"weight_map":7}"#, "weight_map");
        refused("{", "malformed JSON");
    }

    #[test]
    fn pickles_are_named() {
        let e = keys(&[("unet/diffusion_pytorch_model.bin", b"")], Component::Unet).unwrap_err().to_string();
        assert!(e.contains("diffusion_pytorch_model.bin: only safetensors"), "{e}");
    }
}
