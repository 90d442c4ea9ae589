//! p(cell | what a caption states), exactly: marginals, and the distribution of the log-density.
//!
//! Attributes that do not depend on each other, directly or through a parent, are enumerated apart: the world's 6.9 million cells
//! are the products of 11520 combinations of the shape and what hangs on it with a few hundred of the rest.

use super::world::{Cell, Statement, World};

/// The tail of a distribution: this fraction of its mass has the lowest densities.
pub const TAIL: f64 = 0.1;

/// Log-densities closer than this are the same number, added up in another order.
const TIE: f64 = 1e-9;

/// The world under a statement.
pub struct Conditional {
    /// `[attribute][value]`.
    pub marginals: Vec<Vec<f64>>,
    /// Expected natural logarithm of the unconditional density.
    pub mean_log_density: f64,
    /// The log-density below which the [`TAIL`] lies.
    pub tail_edge: f64,
    /// Mass below the edge: [`TAIL`], less what ties with the edge.
    pub tail_mass: f64,
    /// The log-density is the sum of two independent parts: the larger family, and everything else.
    spectra: [Spectrum; 2],
}

/// A distribution of numbers: value and mass, ascending, no two values alike, masses adding up to 1.
struct Spectrum {
    atoms: Vec<(f64, f64)>,
    /// Mass of the atoms before each, and of all.
    before: Vec<f64>,
}

impl Conditional {
    /// `None` where the world holds nothing of the kind.
    pub fn new(world: &World, statement: &Statement) -> Option<Conditional> {
        let mut marginals: Vec<Vec<f64>> = world.attributes.iter().map(|a| vec![0.0; a.values.len()]).collect();
        let mut spectra = Vec::new();
        let mut mean = 0.0;
        for family in families(world) {
            let mut walk =
                Walk { world, statement, family: &family, cell: vec![0; marginals.len()], found: Vec::new() };
            walk.from(0, 1.0);
            let total: f64 = walk.found.iter().map(|(_, p)| p).sum();
            if total == 0.0 {
                return None;
            }
            for (cell, p) in &walk.found {
                mean += p / total * p.ln();
                family.iter().for_each(|&index| marginals[index][cell[index]] += p);
            }
            // Divided last: what is stated then has probability 1 to the last bit.
            family.iter().for_each(|&index| marginals[index].iter_mut().for_each(|p| *p /= total));
            spectra.push(Spectrum::new(walk.found.into_iter().map(|(_, p)| (p.ln(), p / total)).collect()));
        }
        spectra.sort_by_key(|spectrum| spectrum.atoms.len());
        let large = spectra.pop()?;
        let rest = spectra.iter().fold(Spectrum::new(vec![(0.0, 1.0)]), |sum, part| sum.plus(part));
        let mut conditional =
            Conditional { marginals, mean_log_density: mean, tail_edge: 0.0, tail_mass: 0.0, spectra: [large, rest] };
        conditional.tail_edge = conditional.quantile(TAIL);
        conditional.tail_mass = conditional.mass_below(conditional.tail_edge);
        Some(conditional)
    }

    /// The least log-density at or below which a fraction `q` of the mass lies.
    pub fn quantile(&self, q: f64) -> f64 {
        let [large, rest] = &self.spectra;
        let ends = |end: fn(&Spectrum) -> f64| end(large) + end(rest);
        let (mut low, mut high) = (ends(Spectrum::least) - 2.0 * TIE, ends(Spectrum::most));
        // The mass at or below `low` stays under q, at or below `high` reaches it.
        while high - low > TIE / 4.0 {
            let middle = 0.5 * (low + high);
            if self.mass_up_to(middle) < q { low = middle } else { high = middle }
        }
        high
    }

    /// Fraction of the mass with a lower log-density, ties apart.
    pub fn mass_below(&self, log_density: f64) -> f64 {
        self.mass_up_to(log_density - TIE)
    }

    /// Whether a cell of this log-density lies in the tail.
    pub fn in_tail(&self, log_density: f64) -> bool {
        log_density < self.tail_edge - TIE
    }

    fn mass_up_to(&self, log_density: f64) -> f64 {
        let [large, rest] = &self.spectra;
        large.atoms.iter().map(|(value, mass)| mass * rest.up_to(log_density - value)).sum()
    }
}

/// The attributes in families: each root with its descendants, in the world's order.
fn families(world: &World) -> Vec<Vec<usize>> {
    let mut families: Vec<Vec<usize>> = Vec::new();
    for (index, attribute) in world.attributes.iter().enumerate() {
        match attribute.parent.and_then(|parent| families.iter_mut().find(|family| family.contains(&parent))) {
            Some(family) => family.push(index),
            None => families.push(vec![index]),
        }
    }
    families
}

/// Enumerates the possible values of one family under a statement.
struct Walk<'a> {
    world: &'a World,
    statement: &'a Statement,
    family: &'a [usize],
    cell: Cell,
    /// Cells (of which only the family's values count) and their probability within the family.
    found: Vec<(Cell, f64)>,
}

impl Walk<'_> {
    fn from(&mut self, depth: usize, p: f64) {
        let Some(&index) = self.family.get(depth) else { return self.found.push((self.cell.clone(), p)) };
        let values = match self.statement[index] {
            Some(value) => value..value + 1,
            None => 0..self.world.attributes[index].values.len(),
        };
        for value in values {
            self.cell[index] = value;
            let factor = self.world.factor(index, &self.cell);
            if factor > 0.0 {
                self.from(depth + 1, p * factor);
            }
        }
    }
}

impl Spectrum {
    fn new(mut atoms: Vec<(f64, f64)>) -> Spectrum {
        atoms.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        atoms.dedup_by(|next, kept| {
            let tie = next.0 - kept.0 < TIE;
            if tie {
                kept.1 += next.1;
            }
            tie
        });
        let mut sum = 0.0;
        let mut before = vec![0.0];
        before.extend(atoms.iter().map(|(_, mass)| {
            sum += mass;
            sum
        }));
        Spectrum { atoms, before }
    }

    /// The distribution of the sum of two independent numbers.
    fn plus(&self, other: &Spectrum) -> Spectrum {
        let pairs = self.atoms.iter().flat_map(|(a, p)| other.atoms.iter().map(move |(b, q)| (a + b, p * q)));
        Spectrum::new(pairs.collect())
    }

    fn up_to(&self, value: f64) -> f64 {
        self.before[self.atoms.partition_point(|(x, _)| *x <= value)]
    }

    fn least(&self) -> f64 {
        self.atoms.first().map_or(0.0, |(value, _)| *value)
    }

    fn most(&self) -> f64 {
        self.atoms.last().map_or(0.0, |(value, _)| *value)
    }
}
