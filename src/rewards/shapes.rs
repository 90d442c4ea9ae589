//! Attributes of the `shapes` world: the reader's log-probability of what a prompt states.

use super::Reward;
use crate::exec::{Data, Executor};
use crate::models::config::ReaderConfig;
use crate::models::{detect, reader};
use crate::program::{Builder, Cols, Over, ValueId};
use crate::weights::Model;
use crate::{Error, Result};

/// The value a prompt states for each of the reader's attributes; `None` where it leaves one open.
type Statement = Vec<Option<usize>>;
/// A grammar of prompts.
type Parse = dyn Fn(&str) -> Result<Statement>;

/// Natural logarithm of the probability that an image shows what its prompt states, attribute by attribute: at most 0.
pub struct Attributes {
    config: ReaderConfig,
    parse: Box<Parse>,
}

impl Attributes {
    /// The attributes of the model's reader. `parse` is the grammar of prompts, or gives the same values whatever the prompt.
    pub fn new(model: &Model, parse: impl Fn(&str) -> Result<Statement> + 'static) -> Result<Attributes> {
        Ok(Attributes { config: detect::reader_config(model)?, parse: Box::new(parse) })
    }

    /// The buffer of the values stated for an attribute, `[batch]`.
    fn buffer(&self, attribute: &str, batch: usize) -> String {
        format!("{}.{attribute} {batch}", self.name())
    }

    fn statement(&self, prompt: &str) -> Result<Statement> {
        let statement = (self.parse)(prompt)?;
        let heads = &self.config.heads;
        let is_value = |(value, (_, values)): (&Option<usize>, &(String, usize))| value.is_none_or(|v| v < *values);
        match statement.len() == heads.len() && statement.iter().zip(heads).all(is_value) {
            true => Ok(statement),
            false => Err(Error::Usage(format!("'{prompt}' states {statement:?}, no values of {heads:?}"))),
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
            let head = b.columns(Cols { value: logits, at }, *values);
            let stated = b.input_i32(self.buffer(attribute, batch), &[batch]);
            let term = b.cross_entropy(head, stated);
            loss = Some(loss.map_or(term, |loss| b.add(loss, term)));
            at += values;
        }
        b.affine(loss.unwrap_or(logits), -1.0, 0.0)
    }

    fn write(&self, executor: &mut dyn Executor, prompts: &[&str]) -> Result<()> {
        let stated = prompts.iter().map(|prompt| self.statement(prompt)).collect::<Result<Vec<_>>>()?;
        for (index, (attribute, _)) in self.config.heads.iter().enumerate() {
            // A negative target counts nothing.
            let values: Vec<i32> = stated.iter().map(|stated| stated[index].map_or(-1, |value| value as i32)).collect();
            executor.write(&self.buffer(attribute, prompts.len()), Data::I32(&values))?;
        }
        Ok(())
    }
}
