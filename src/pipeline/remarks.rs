//! What a user may not expect of a model: files that contradict each other, tensors that nothing reads, what stands in for what is
//! missing.

use crate::Result;
use crate::models::config::PipelineConfig;
use crate::models::unread;
use crate::weights::Model;
use serde_json::Value;

/// In lines. An error where the model is not the one that would be run.
pub fn remarks(model: &Model, config: &PipelineConfig) -> Result<Vec<String>> {
    let mut remarks = model.remarks().to_vec();
    remarks.extend(unread::of_pipeline(model, config)?);
    remarks.extend(["unet", "vae", "scheduler"].into_iter().filter_map(|name| other_class(model, name)));
    let towers = ["tokenizer", "tokenizer_2"].into_iter().take(config.text.len());
    remarks.extend(towers.filter_map(|name| missing_tokenizer(model, name)));
    Ok(remarks)
}

/// The class that `model_index.json` gives a component, where the component's own file names another.
fn other_class(model: &Model, name: &str) -> Option<String> {
    let listed = model.config("model_index")?.get(name)?.get(1)?.as_str()?;
    let own = model.config(name)?.get("_class_name").and_then(Value::as_str)?;
    let (index, file) = (model.config_path("model_index")?.display(), model.config_path(name)?.display());
    (listed != own).then(|| format!("{index} says {name} is a {listed}, {file} says {own}, which is followed"))
}

/// A folder without the tokenizer that pipelines are saved with.
fn missing_tokenizer(model: &Model, name: &str) -> Option<String> {
    let has = |file: &str| model.tokenizer_file(name, file).is_some();
    let found = model.is_single_file() || (has("vocab.json") && has("merges.txt")) || has("tokenizer.json");
    (!found).then(|| format!("{}: has no {name}; CLIP's own vocabulary is used", model.path().display()))
}
