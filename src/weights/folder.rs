//! Folders of diffusers and transformers: configs, tokenizer files, and component weights in one file, a variant, or shards.

use super::file::File;
use super::{Component, Model, Tensor, keys_text, keys_vae};
use crate::input::parse_json;
use crate::{Error, Result};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Configuration files by the name they get in [`Model::config`].
const CONFIGS: [(&str, &str); 16] = [
    ("model_index", "model_index.json"),
    ("recommended", "recommended.json"),
    ("unet", "unet/config.json"),
    ("vae", "vae/config.json"),
    ("text_encoder", "text_encoder/config.json"),
    ("text_encoder_2", "text_encoder_2/config.json"),
    ("reader", "reader/config.json"),
    ("clip", "clip/config.json"),
    ("clip_preprocessor", "clip/preprocessor_config.json"),
    ("clip_held_out", "clip_held_out/config.json"),
    ("clip_held_out_preprocessor", "clip_held_out/preprocessor_config.json"),
    ("aesthetic", "aesthetic/config.json"),
    ("prompt_policy", "prompt_policy/config.json"),
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
    let networks = [Component::Clip, Component::HeldOutClip, Component::Policy].map(Component::name);
    for folder in ["tokenizer", "tokenizer_2"].into_iter().chain(networks) {
        load_tokenizer(model, source, folder, folder)?;
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

/// Loads a folder that is one network, with its configuration and what transformers puts beside it.
pub(super) fn load_network(model: &mut Model, source: &Source, c: Component) -> Result<()> {
    load_configs(model, source, c)?;
    load_tokenizer(model, source, "", c.name())?;
    load_component(model, source, "", c)?;
    match model.has(c) {
        true => Ok(()),
        false => Err(Error::file(source.path(""), "has no model.safetensors")),
    }
}

/// Loads a weights file; what its name makes part of a transformers folder brings that folder's configuration.
pub(super) fn load_file(model: &mut Model, path: &Path, c: Component) -> Result<()> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if rank(name).is_some() {
        load_configs(model, &Source::Disk(folder), c)?;
    }
    let number = file_number(model, path, || File::open(path))?;
    add_file(model, number, c, None)?;
    match model.has(c) {
        true => Ok(()),
        false => Err(Error::file(path, "holds no tensors")),
    }
}

/// The configurations in a network's own folder.
fn load_configs(model: &mut Model, source: &Source, c: Component) -> Result<()> {
    let preprocessor = format!("{}_preprocessor", c.name());
    for (name, file) in [(c.name(), "config.json"), (&preprocessor, "preprocessor_config.json")] {
        if let Some(bytes) = source.read(file)? {
            add_config(model, name, source.path(file), &bytes)?;
        }
    }
    Ok(())
}

fn load_tokenizer(model: &mut Model, source: &Source, folder: &str, name: &str) -> Result<()> {
    for file in TOKENIZER_FILES {
        if let Some(bytes) = source.read(&inside(folder, file))? {
            model.tokenizers.insert(format!("{name}/{file}"), bytes);
        }
    }
    Ok(())
}

/// Loads a UNet folder (`config.json` and weights) over the UNet of `model`.
pub(super) fn load_unet(model: &mut Model, source: &Source) -> Result<()> {
    // The folder itself, or one of a pipeline that has it.
    let folder = if source.read("unet/config.json")?.is_some() { "unet" } else { "" };
    let config = inside(folder, "config.json");
    if let Some(bytes) = source.read(&config)? {
        add_config(model, "unet", source.path(&config), &bytes)?;
    }
    load_component(model, source, folder, Component::Unet)?;
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

/// A file's name from the root, given its folder's (`""` is the root).
fn inside(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_string() } else { format!("{folder}/{name}") }
}

/// Loads the weights of one component, where its folder has any.
fn load_component(model: &mut Model, source: &Source, folder: &str, c: Component) -> Result<()> {
    let Some(name) = weight_file(source, folder)? else { return Ok(()) };
    let name = inside(folder, &name);
    let path = source.path(&name);
    if name.ends_with(".safetensors") {
        let number = file_number(model, &path, || source.open(&name))?;
        return add_file(model, number, c, None);
    }
    let index = source.read(&name)?.unwrap_or_default();
    for (shard, keys) in shards(&path, folder, &index)? {
        let number = file_number(model, &source.path(&shard), || source.open(&shard))?;
        add_file(model, number, c, Some(&keys))?;
    }
    Ok(())
}

/// The number of the file at `path`, opened if it is not yet: two components may share one.
fn file_number(model: &mut Model, path: &Path, open: impl FnOnce() -> Result<File>) -> Result<usize> {
    if let Some(number) = model.files.iter().position(|file| file.path() == path) {
        return Ok(number);
    }
    model.files.push(open()?);
    Ok(model.files.len() - 1)
}

/// Chooses among the weight files of a folder: full precision before `fp16` before another variant, one file before
/// shards.
fn weight_file(source: &Source, folder: &str) -> Result<Option<String>> {
    let names = source.list(folder)?;
    if let Some((_, name)) = names.iter().filter_map(|name| Some((rank(name)?, name))).min() {
        return Ok(Some(name.clone()));
    }
    match names.iter().find(|n| n.ends_with(".bin") || n.ends_with(".ckpt") || n.ends_with(".msgpack")) {
        Some(name) => Err(Error::file(source.path(folder).join(name), "only safetensors weights are read; convert it")),
        None => Ok(None),
    }
}

/// The place of a weights file among those of its folder; `None` for one that is none, or only a shard.
fn rank(name: &str) -> Option<usize> {
    let rest = STEMS.iter().find_map(|stem| name.strip_prefix(stem)?.strip_prefix('.'))?;
    match rest {
        "safetensors" => Some(0),
        "safetensors.index.json" => Some(1),
        "fp16.safetensors" => Some(2),
        "safetensors.index.fp16.json" => Some(3),
        _ if rest.contains("-of-") => None,
        _ if rest.ends_with(".safetensors") => Some(4),
        _ if rest.starts_with("safetensors.index.") => Some(5),
        _ => None,
    }
}

/// The shards of the index file of a folder, and the keys each must hold.
fn shards(path: &Path, folder: &str, bytes: &[u8]) -> Result<BTreeMap<String, BTreeSet<String>>> {
    let json = parse_json(path, bytes)?;
    let Some(map) = json.get("weight_map").and_then(|m| m.as_object()) else {
        return Err(Error::file(path, "has no 'weight_map': not an index of shards"));
    };
    let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (key, shard) in map {
        let Some(shard) = shard.as_str().and_then(|shard| shard_name(folder, shard)) else {
            let what = format!("'{key}' is not in a .safetensors file beside the index or in a folder beside its own");
            return Err(Error::file(path, what));
        };
        shards.entry(shard).or_default().insert(key.clone());
    }
    Ok(shards)
}

/// A shard's name from the root, given the index's folder. It may lie in a folder beside that one (`../text_encoder/…`, so that
/// networks share weights), and nowhere else.
fn shard_name(folder: &str, shard: &str) -> Option<String> {
    let (up, rest) = match shard.strip_prefix("../") {
        Some(rest) => (true, rest),
        None => (false, shard),
    };
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    // A backslash or a drive's colon would be a path of its own elsewhere.
    if !rest.ends_with(".safetensors") || rest.contains(['\\', ':']) || !rest.split('/').all(plain) {
        return None;
    }
    Some(match (up, folder.is_empty()) {
        (false, _) => inside(folder, rest),
        (true, false) => rest.to_string(),
        (true, true) => shard.to_string(),
    })
}

/// Enters the tensors of a file under canonical names; `keys` limits it to those an index assigns to this shard.
fn add_file(model: &mut Model, number: usize, c: Component, keys: Option<&BTreeSet<String>>) -> Result<()> {
    let file = &model.files[number];
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
    found.into_iter().try_for_each(|(name, tensor)| model.insert(c, name, tensor))
}

/// The present-day name of a key; `None` for buffers that are not weights.
fn canonical(c: Component, key: &str) -> Option<String> {
    match c {
        Component::TextEncoder | Component::TextEncoder2 => keys_text::from_transformers(key),
        Component::Vae => Some(keys_vae::from_diffusers(key)),
        Component::Clip | Component::HeldOutClip => keys_text::from_clip(key),
        Component::Policy => keys_text::from_gpt2(key),
        Component::Unet | Component::Reader | Component::Aesthetic => Some(key.to_string()),
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
        for shard in ["/a-1", "../../a-1", "x/../a-1", ".././a-1", "..//a-1", "c:a-1", "..\\\\a-1"] {
            let json = format!(r#"{{"weight_map":{{"a":"{shard}.safetensors"}}}}"#);
            refused(json.leak(), "beside the index");
        }
        refused(r#"{"weight_map":{"a":"../a-1.safetensors"}}"#, "embedded model/a-1.safetensors: does not exist");
        refused(r#"{"weight_map":{"a":"a-3.safetensors"}}"#, "a-3.safetensors: does not exist");
        refused(r#"{"weight_map":7}"#, "weight_map");
        refused("{", "malformed JSON");
    }

    #[test]
    fn an_index_may_borrow_from_a_folder_beside_its_own() {
        let index =
            br#"{"weight_map":{"logit_scale":"own.safetensors","text_model.a":"../text_encoder/model.safetensors"}}"#;
        let (shared, own) = (file(&[("text_model.a", &[2])]), file(&[("logit_scale", &[])]));
        let files: [(&str, &[u8]); 3] = [
            ("clip/model.safetensors.index.json", index),
            ("clip/own.safetensors", own),
            ("text_encoder/model.safetensors", shared),
        ];
        assert_eq!(keys(&files, Component::Clip).unwrap(), ["logit_scale", "text_model.a"]);
        // On disk, also where the model is that folder alone; the shared file is opened once.
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        let whole = Model::open(folder.path()).unwrap();
        assert_eq!((whole.keys(Component::Clip).len(), whole.files().count()), (2, 2));
        let alone = Model::network(Component::Clip, &folder.path().join("clip")).unwrap();
        assert_eq!(alone.keys(Component::Clip), whole.keys(Component::Clip));
        assert!(!alone.has(Component::TextEncoder));
    }

    #[test]
    fn pickles_are_named() {
        let e = keys(&[("unet/diffusion_pytorch_model.bin", b"")], Component::Unet).unwrap_err().to_string();
        assert!(e.contains("diffusion_pytorch_model.bin: only safetensors"), "{e}");
    }
}
