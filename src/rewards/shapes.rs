//! Attributes of the `shapes` world: the reader's log-probability of what a prompt asks for.

use super::Reward;
use crate::exec::{Data, Executor};
use crate::models::config::ReaderConfig;
use crate::models::{detect, reader};
use crate::program::{Builder, Over, ValueId};
use crate::weights::Model;
use crate::{Error, Result};

/// Which value of each of the reader's attributes a prompt asks for; `None` leaves one open.
type Asked = Vec<Option<usize>>;

/// Natural logarithm of the probability that an image shows what its prompt asks for, attribute by attribute: at most 0.
pub struct Attributes {
    config: ReaderConfig,
    parse: Box<dyn Fn(&str) -> Result<Asked>>,
}

impl Attributes {
    /// The attributes of the model's reader; `parse` is the grammar of prompts, or gives the same wish for every one.
    pub fn new(model: &Model, parse: impl Fn(&str) -> Result<Asked> + 'static) -> Result<Attributes> {
        Ok(Attributes { config: detect::reader_config(model)?, parse: Box::new(parse) })
    }

    /// The buffer of the values asked for of an attribute; see [`Reward`].
    fn buffer(&self, attribute: &str, batch: usize) -> String {
        format!("{}.{attribute} {batch}", self.name())
    }

    fn asked(&self, prompt: &str) -> Result<Asked> {
        let asked = (self.parse)(prompt)?;
        let heads = &self.config.heads;
        let is_value = |(value, (_, values)): (&Option<usize>, &(String, usize))| value.is_none_or(|v| v < *values);
        match asked.len() == heads.len() && asked.iter().zip(heads).all(is_value) {
            true => Ok(asked),
            false => Err(Error::Usage(format!("'{prompt}' asks for {asked:?}, no values of {heads:?}"))),
        }
    }
}

impl Reward for Attributes {
    fn name(&self) -> &str {
        "shapes"
    }

    fn append(&self, b: &mut Builder, image: ValueId) -> ValueId {
        let side = self.config.sample_size;
        if b.shape(image)[1..3] != [side; 2] {
            b.fail(format!("the reader of the `shapes` world takes {side}x{side} images, not {:?}", b.shape(image)));
        }
        let batch = b.shape(image)[0];
        let logits = reader::logits(b, &self.config, image);
        let logits = b.sum(logits, Over::Middle);
        let (mut loss, mut at) = (None, 0);
        for (attribute, values) in &self.config.heads {
            let head = b.columns(crate::program::Cols { value: logits, at }, *values);
            let asked = b.input_i32(self.buffer(attribute, batch), &[batch]);
            let term = b.cross_entropy(head, asked);
            loss = Some(loss.map_or(term, |loss| b.add(loss, term)));
            at += values;
        }
        b.affine(loss.unwrap_or(logits), -1.0, 0.0)
    }

    fn write(&self, executor: &mut dyn Executor, prompts: &[&str]) -> Result<()> {
        let asked = prompts.iter().map(|prompt| self.asked(prompt)).collect::<Result<Vec<_>>>()?;
        for (index, (attribute, _)) in self.config.heads.iter().enumerate() {
            // A negative target counts nothing.
            let values: Vec<i32> = asked.iter().map(|asked| asked[index].map_or(-1, |value| value as i32)).collect();
            executor.write(&self.buffer(attribute, prompts.len()), Data::I32(&values))?;
        }
        Ok(())
    }
}
