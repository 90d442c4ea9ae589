//! The world's tables: attributes, the exact density of a cell, and the synthetic aesthetic.

use super::caption::{Grammar, GrammarTables};
use crate::{Error, Result, assets};
use serde::Deserialize;
use std::collections::BTreeMap;

/// One value of every attribute, in the world's order.
pub type Cell = Vec<usize>;

/// The value a caption states for an attribute, or that it leaves it open; in the world's order.
pub type Statement = Vec<Option<usize>>;

/// A discrete attribute; its probabilities depend on at most one earlier attribute.
pub struct Attribute {
    pub name: String,
    pub values: Vec<String>,
    /// Position of the attribute its probabilities depend on.
    pub parent: Option<usize>,
    /// `[parent's value][value]`; a single row where there is no parent.
    p: Vec<Vec<f64>>,
}

/// Attributes, grammar and aesthetic of the `shapes` world (`tools/shapes/world.py` is where they are decided).
pub struct World {
    pub attributes: Vec<Attribute>,
    /// Side of its images in pixels.
    pub image_size: usize,
    pub(super) grammar: Grammar,
    aesthetic: Aesthetic,
}

/// A base, the contrast of object and background, and a bonus per value.
struct Aesthetic {
    base: f64,
    /// Positions of the attributes that contrast, and `[object's colour][background]`.
    colours: [usize; 2],
    contrast: Vec<Vec<f64>>,
    /// Per attribute and value; empty where an attribute earns none.
    bonus: Vec<Vec<f64>>,
}

/// `world.json`.
#[derive(Deserialize)]
struct Tables {
    image_size: usize,
    attributes: Vec<AttributeTable>,
    grammar: GrammarTables,
    aesthetic: AestheticTables,
}

#[derive(Deserialize)]
struct AttributeTable {
    name: String,
    given: Option<String>,
    values: Vec<String>,
    p: Vec<Vec<f64>>,
}

#[derive(Deserialize)]
struct AestheticTables {
    base: f64,
    contrast: f64,
    /// RGB in [0, 1].
    colour_rgb: Vec<[f64; 3]>,
    bg_rgb: Vec<[f64; 3]>,
    bonus: BTreeMap<String, Vec<f64>>,
}

impl World {
    /// The world of the embedded model.
    pub fn embedded() -> Result<World> {
        let wrong = |what: String| Error::file("embedded model/world.json", what);
        let tables = serde_json::from_str(assets::SHAPES_WORLD).map_err(|e| wrong(e.to_string()))?;
        World::new(tables).map_err(wrong)
    }

    fn new(tables: Tables) -> Result<World, String> {
        let mut attributes: Vec<Attribute> = Vec::new();
        for AttributeTable { name, given, values, p } in tables.attributes {
            // Parents come first, which is what enumeration and sampling rely on.
            let parent = given.map(|given| position(&attributes, &given)).transpose()?;
            let rows = parent.map_or(1, |parent| attributes[parent].values.len());
            if p.len() != rows || p.iter().any(|row| row.len() != values.len()) {
                return Err(format!("'{name}' needs {rows} rows of {} probabilities", values.len()));
            }
            attributes.push(Attribute { name, values, parent, p });
        }
        let grammar = Grammar::new(&attributes, tables.grammar)?;
        let aesthetic = Aesthetic::new(&attributes, tables.aesthetic)?;
        Ok(World { attributes, image_size: tables.image_size, grammar, aesthetic })
    }

    /// Probability of a value of attribute `index`, given the attributes before it.
    pub(super) fn factor(&self, index: usize, cell: &[usize]) -> f64 {
        let attribute = &self.attributes[index];
        attribute.p[attribute.parent.map_or(0, |parent| cell[parent])][cell[index]]
    }

    /// Natural logarithm of the cell's probability; −∞ for a cell that the world does not hold.
    pub fn log_density(&self, cell: &[usize]) -> f64 {
        (0..self.attributes.len()).map(|index| self.factor(index, cell).ln()).sum()
    }

    /// The synthetic aesthetic of a cell: about 3 to 10, mean near 6.
    pub fn aesthetic(&self, cell: &[usize]) -> f64 {
        let Aesthetic { base, colours: [object, background], contrast, bonus } = &self.aesthetic;
        let earned: f64 = bonus.iter().zip(cell).filter_map(|(bonus, &value)| bonus.get(value)).sum();
        base + contrast[cell[*object]][cell[*background]] + earned
    }

    /// What a caption states, or where it leaves the grammar.
    pub fn parse(&self, caption: &str) -> Result<Statement, String> {
        self.grammar.parse(caption, self.attributes.len())
    }
}

impl Aesthetic {
    fn new(attributes: &[Attribute], tables: AestheticTables) -> Result<Aesthetic, String> {
        let colours = [position(attributes, "colour")?, position(attributes, "bg")?];
        let mut bonus = vec![Vec::new(); attributes.len()];
        for (name, values) in tables.bonus {
            bonus[position(attributes, &name)?] = values;
        }
        let counts = |index: usize| attributes[index].values.len();
        let complete = |(index, values): (usize, &Vec<f64>)| values.is_empty() || values.len() == counts(index);
        if [tables.colour_rgb.len(), tables.bg_rgb.len()] != colours.map(counts)
            || !bonus.iter().enumerate().all(complete)
        {
            return Err("the aesthetic does not have one entry per value".into());
        }
        let distance = |a: &[f64; 3], b: &[f64; 3]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / 3.0;
        let against = |colour| tables.bg_rgb.iter().map(|bg| tables.contrast * distance(colour, bg)).collect();
        let contrast = tables.colour_rgb.iter().map(against).collect();
        Ok(Aesthetic { base: tables.base, colours, contrast, bonus })
    }
}

/// Where the attribute of this name stands.
pub(super) fn position(attributes: &[Attribute], name: &str) -> Result<usize, String> {
    attributes.iter().position(|a| a.name == name).ok_or_else(|| format!("there is no attribute '{name}'"))
}
