//! The caption grammar, read backwards: from a sentence to the attributes it states.
//!
//! ```text
//! [PREFIX] a(n) [size] [finish] [texture] [colour] SHAPE [position] [on a(n) [bgstyle] [bg] background]
//! ```

use super::world::{Attribute, Statement, position};
use serde::Deserialize;
use std::collections::BTreeMap;

/// The grammar as `world.json` has it.
#[derive(Deserialize)]
pub(super) struct GrammarTables {
    prefixes: Vec<String>,
    before_shape: Vec<String>,
    before_background: Vec<String>,
    /// Attribute → value → phrases with the chance of each.
    lexicon: BTreeMap<String, Vec<Vec<(String, f64)>>>,
}

/// Slots are positions of attributes.
pub(super) struct Grammar {
    prefixes: Vec<Phrase>,
    before_shape: Vec<usize>,
    shape: usize,
    position: usize,
    before_background: Vec<usize>,
    /// Per attribute: every phrase and the value it names; none for an attribute that captions never mention.
    phrases: Vec<Vec<(Phrase, usize)>>,
}

/// The words of a phrase.
type Phrase = Vec<String>;

fn words(text: &str) -> Phrase {
    text.to_lowercase().split_whitespace().map(str::to_string).collect()
}

impl Grammar {
    pub(super) fn new(attributes: &[Attribute], tables: GrammarTables) -> Result<Grammar, String> {
        let slots = |names: &[String]| -> Result<Vec<usize>, String> {
            names.iter().map(|name| position(attributes, name)).collect()
        };
        let mut phrases = vec![Vec::new(); attributes.len()];
        for (name, values) in &tables.lexicon {
            let index = position(attributes, name)?;
            if values.len() != attributes[index].values.len() {
                return Err(format!("the lexicon of '{name}' does not have one entry per value"));
            }
            let named = |(value, options): (usize, &Vec<(String, f64)>)| {
                options.iter().map(|(phrase, _)| (words(phrase), value)).collect::<Vec<_>>()
            };
            phrases[index] = values.iter().enumerate().flat_map(named).collect();
        }
        Ok(Grammar {
            prefixes: tables.prefixes.iter().map(|prefix| words(prefix)).collect(),
            before_shape: slots(&tables.before_shape)?,
            shape: position(attributes, "shape")?,
            position: position(attributes, "position")?,
            before_background: slots(&tables.before_background)?,
            phrases,
        })
    }

    /// What `caption` states about `attributes` attributes, or where it leaves the grammar.
    pub(super) fn parse(&self, caption: &str, attributes: usize) -> Result<Statement, String> {
        let words = words(caption);
        let prefix = self.prefixes.iter().find(|prefix| words.starts_with(prefix)).map_or(0, Vec::len);
        let mut walk = Walk { grammar: self, words: &words, at: prefix, stated: vec![None; attributes] };
        walk.expect(&["a", "an"])?;
        walk.slots(&self.before_shape);
        walk.slots(&[self.shape]);
        if walk.stated[self.shape].is_none() {
            return Err(format!("no shape at word {}", walk.at + 1));
        }
        walk.slots(&[self.position]);
        if walk.at < words.len() {
            walk.expect(&["on"])?;
            walk.expect(&["a", "an"])?;
            walk.slots(&self.before_background);
            walk.expect(&["background"])?;
        }
        match words.get(walk.at) {
            None => Ok(walk.stated),
            Some(word) => Err(format!("'{word}' after the end")),
        }
    }
}

/// A caption half read.
struct Walk<'a> {
    grammar: &'a Grammar,
    words: &'a [String],
    at: usize,
    stated: Statement,
}

impl Walk<'_> {
    fn expect(&mut self, options: &[&str]) -> Result<(), String> {
        match self.words.get(self.at) {
            Some(word) if options.contains(&word.as_str()) => {
                self.at += 1;
                Ok(())
            }
            Some(word) => Err(format!("expected '{}', found '{word}'", options.join("' or '"))),
            None => Err(format!("expected '{}', found the end", options.join("' or '"))),
        }
    }

    /// Takes the longest phrase of each attribute in turn, where there is one.
    fn slots(&mut self, attributes: &[usize]) {
        for &attribute in attributes {
            let ahead = &self.words[self.at..];
            let phrases = self.grammar.phrases[attribute].iter().filter(|(phrase, _)| ahead.starts_with(phrase));
            if let Some((phrase, value)) = phrases.max_by_key(|(phrase, _)| phrase.len()) {
                self.stated[attribute] = Some(*value);
                self.at += phrase.len();
            }
        }
    }
}
