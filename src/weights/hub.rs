//! Folders around a model's own: the cache in which the Hugging Face hub keeps versions of one, and those given by mistake.

use super::folder::entries;
use crate::input;
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// Most bytes of the files this looks into: a commit's name, a component's `config.json`.
const SMALL: u64 = 1 << 20;

/// The folder that holds the files of a model: `path` itself, or in a cache folder of the hub (`models--ORG--NAME`, with `refs/` and
/// `snapshots/`) the version that `refs/main` names, else the only one.
pub(super) fn snapshot(path: &Path) -> Result<PathBuf> {
    let snapshots = path.join("snapshots");
    if !snapshots.is_dir() {
        return Ok(path.to_path_buf());
    }
    if let Some(bytes) = input::read_if_there(&path.join("refs").join("main"), SMALL)? {
        let name = String::from_utf8_lossy(&bytes).trim().to_string();
        // A name, not a way out of the folder.
        let found = snapshots.join(&name);
        let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric());
        return match is_name && found.is_dir() {
            true => Ok(found),
            false => {
                Err(Error::file(path, format!("refs/main names the version '{name}', which is not in snapshots/")))
            }
        };
    }
    let mut names = entries(&snapshots)?;
    names.sort();
    match &names[..] {
        [only] => Ok(snapshots.join(only)),
        [] => Err(Error::file(path, "is a cache of the hub without a version in snapshots/: an unfinished download?")),
        several => Err(Error::file(path, format!("holds several versions; give one: {}", listed(&snapshots, several)))),
    }
}

/// What a folder that is no pipeline is instead, and what to give in its place.
pub(super) fn other_folder(path: &Path) -> Option<String> {
    if let Some(class) = class_of(path) {
        return Some(match class.as_str() {
            "UNet2DConditionModel" => "this is a UNet's folder, which goes over a base model with --unet".to_string(),
            class => format!("its config.json is for {class} alone; give the folder around it"),
        });
    }
    let mut names = entries(path).ok()?;
    names.sort();
    let is_model = |name: &&String| {
        let inner = path.join(name);
        inner.join("model_index.json").exists() || inner.join("snapshots").is_dir() || inner.join("unet").is_dir()
    };
    let models: Vec<String> = names.iter().filter(is_model).cloned().collect();
    if !models.is_empty() {
        return Some(format!("there is a model inside; give {}", listed(path, &models)));
    }
    let is_weights = |name: &&String| [".safetensors", ".ckpt", ".gguf"].iter().any(|end| name.ends_with(end));
    let files: Vec<String> = names.iter().filter(is_weights).cloned().collect();
    (!files.is_empty()).then(|| format!("a checkpoint in one file is given as that file: {}", listed(path, &files)))
}

/// The class a component's own `config.json` names.
fn class_of(path: &Path) -> Option<String> {
    let config = path.join("config.json");
    let json = input::parse_json(&config, &input::read(&config, SMALL).ok()?).ok()?;
    let class = json.get("_class_name").or_else(|| json.get("architectures")?.get(0))?;
    Some(class.as_str()?.to_string())
}

/// The first of several names as paths.
fn listed(folder: &Path, names: &[String]) -> String {
    const SHOWN: usize = 3;
    let paths = names.iter().take(SHOWN).map(|name| folder.join(name).display().to_string()).collect::<Vec<_>>();
    match names.len() {
        n if n > SHOWN => format!("{} or one of {} more", paths.join(", "), n - SHOWN),
        _ => paths.join(" or "),
    }
}
