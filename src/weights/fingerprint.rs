//! Fingerprints: of what a model makes images with, and of small things.

use super::{Component, Model};
use crate::Result;
use std::fmt::Write;
use twox_hash::XxHash3_64;

/// The configurations that decide an image besides those of the networks, by their names in [`Model::config`].
const CONFIGS: [&str; 2] = ["model_index", "scheduler"];

/// FNV-1a, 64 bits.
pub fn fingerprint(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

impl Model {
    /// 16 hex digits that tell models apart by all that decides an image: the whole content of the weights files of
    /// [`Component::PIPELINE`], their configurations and the scheduler's, and the tokenizers' files; not where they lie. No cryptography.
    ///
    /// Found at the first call, which reads what no weight was read from yet: call it when the weights are loaded. A file that has
    /// changed since it was opened is an error.
    pub fn fingerprint(&self) -> Result<String> {
        if let Some(known) = self.fingerprint.get() {
            return Ok(known.clone());
        }
        let found = format!("{:016x}", XxHash3_64::oneshot(self.manifest()?.as_bytes()));
        Ok(self.fingerprint.get_or_init(|| found).clone())
    }

    /// 16 hex digits of one network in the same way: the files that hold it, and its configurations.
    pub fn fingerprint_of(&self, c: Component) -> Result<String> {
        let mut found = String::new();
        for (number, file) in self.files.iter().enumerate() {
            if self.tensors[c as usize].values().any(|tensor| tensor.file == number) {
                write!(found, "{:016x} ", file.digest()?).unwrap_or_default();
            }
        }
        for (name, (_, json)) in self.configs.iter().filter(|(name, _)| c.owns(name)) {
            write!(found, "{name} {json} ").unwrap_or_default();
        }
        Ok(format!("{:016x}", XxHash3_64::oneshot(found.as_bytes())))
    }

    /// A line per file that makes images: its role and its content or a hash of that.
    fn manifest(&self) -> Result<String> {
        let mut lines = String::new();
        let mut add = |role: &str, content: String| writeln!(lines, "{role} {content}").unwrap_or_default();
        for (number, file) in self.files.iter().enumerate() {
            let uses = |c: &&Component| self.tensors[**c as usize].values().any(|tensor| tensor.file == number);
            let users: Vec<_> = Component::PIPELINE.iter().filter(uses).map(|c| c.name()).collect();
            if !users.is_empty() {
                add(&users.join("+"), format!("{:016x}", file.digest()?));
            }
        }
        for name in CONFIGS.into_iter().chain(Component::PIPELINE.map(Component::name)) {
            self.config(name).into_iter().for_each(|json| add(name, json.to_string()));
        }
        let of_a_tower = |name: &str| name.starts_with("tokenizer/") || name.starts_with("tokenizer_2/");
        for (name, bytes) in self.tokenizers.iter().filter(|(name, _)| of_a_tower(name)) {
            add(name, format!("{:016x}", XxHash3_64::oneshot(bytes)));
        }
        Ok(lines)
    }
}
