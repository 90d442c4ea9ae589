//! A set of read images against the world: frequencies, rarity, agreement with the prompts, diversity; as plain data.

use super::conditional::Conditional;
use super::reader::Reading;
use super::world::{Statement, World};
use serde::Serialize;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

/// Judges readings; the world under a statement is worked out once.
pub struct Judge<'w> {
    world: &'w World,
    conditionals: HashMap<Statement, Option<Rc<Conditional>>>,
}

/// One image, read and judged.
pub struct Scored {
    pub reading: Reading,
    /// Nats; −∞ for a cell that the world does not hold.
    pub log_density: f64,
    pub aesthetic: f64,
    /// What its prompt states; `None` without a prompt in the world's grammar.
    pub stated: Option<Statement>,
    /// The world under its prompt, the whole world without one; `None` where the prompt states what cannot be.
    pub conditional: Option<Rc<Conditional>>,
}

impl Judge<'_> {
    pub fn new(world: &World) -> Judge<'_> {
        Judge { world, conditionals: HashMap::new() }
    }

    pub fn judge(&mut self, reading: Reading, stated: Option<Statement>) -> Scored {
        let statement = stated.clone().unwrap_or_else(|| vec![None; self.world.attributes.len()]);
        let new = |statement: &Statement| Conditional::new(self.world, statement).map(Rc::new);
        let conditional = self.conditionals.entry(statement).or_insert_with_key(new).clone();
        let (log_density, aesthetic) = (self.world.log_density(&reading.cell), self.world.aesthetic(&reading.cell));
        Scored { reading, log_density, aesthetic, stated, conditional }
    }
}

impl Scored {
    pub fn is_possible(&self) -> bool {
        self.log_density.is_finite()
    }

    /// Whether the prompt states another value of attribute `index` than was read.
    pub fn is_wrong(&self, index: usize) -> bool {
        self.states(index).is_some_and(|value| value != self.reading.cell[index])
    }

    /// Whether nothing that the prompt states is wrong.
    pub fn is_right(&self) -> bool {
        !(0..self.reading.cell.len()).any(|index| self.is_wrong(index))
    }

    /// The value the prompt states for attribute `index`.
    pub fn states(&self, index: usize) -> Option<usize> {
        self.stated.as_ref().and_then(|stated| stated[index])
    }

    /// Whether the cell is among the least probable ones of what the prompt leaves open.
    pub fn in_tail(&self) -> bool {
        self.is_possible() && self.conditional.as_ref().is_some_and(|world| world.in_tail(self.log_density))
    }
}

/// `count` of `of`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Fraction {
    pub count: usize,
    pub of: usize,
}

/// A mean and its standard error, which takes two values at least.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    pub mean: f64,
    pub standard_error: Option<f64>,
}

/// What a set of images shows. Every `expected` is the world's own value under the prompts of the set, which is exact.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub images: usize,
    /// Images whose prompt is a caption of the world.
    pub captioned: usize,
    /// Images held against the world: all but those whose prompt states what cannot be.
    pub compared: usize,
    /// Attribute and value, where all images state the same.
    pub stated: Option<BTreeMap<String, String>>,
    /// Of the possible cells among the compared; nats.
    pub log_density: Option<Estimate>,
    pub expected_log_density: Option<f64>,
    /// Compared images whose cell is possible and in the tail of its own prompt's world.
    pub tail: Fraction,
    pub expected_tail: Option<f64>,
    /// Those of them with all that their prompts state right.
    pub tail_and_right: Fraction,
    /// Captioned images with all that their prompts state right.
    pub right: Fraction,
    pub impossible: Fraction,
    pub distinct_cells: usize,
    pub aesthetic: Option<Estimate>,
    pub attributes: Vec<AttributeReport>,
}

/// One attribute over the compared images.
#[derive(Clone, Debug, Serialize)]
pub struct AttributeReport {
    pub name: String,
    pub values: Vec<String>,
    /// Images per value.
    pub counts: Vec<usize>,
    /// Probability per value, averaged over the images' prompts.
    pub expected: Vec<f64>,
    /// Nats.
    pub entropy: f64,
    pub expected_entropy: f64,
    /// Images whose prompt leaves the attribute open.
    pub open: usize,
    /// Half the L1 distance between frequencies and probabilities, over the open images.
    pub total_variation: Option<f64>,
    /// The distance that as many images drawn from the world itself would have on average.
    pub chance_total_variation: Option<f64>,
    /// Of the images that state it, those that show it.
    pub right: Fraction,
}

/// What `images` show together.
pub fn report(world: &World, images: &[Scored]) -> Report {
    let compared: Vec<(&Scored, &Conditional)> =
        images.iter().filter_map(|image| Some((image, image.conditional.as_deref()?))).collect();
    let over_worlds = |f: fn(&Conditional) -> f64| mean(compared.iter().map(|(_, conditional)| f(conditional)));
    let tail: Vec<&Scored> = compared.iter().map(|(image, _)| *image).filter(|image| image.in_tail()).collect();
    let captioned: Vec<&Scored> = images.iter().filter(|image| image.stated.is_some()).collect();
    let count = |images: &[&Scored], f: fn(&Scored) -> bool| images.iter().filter(|image| f(image)).count();
    let possible = compared.iter().map(|(image, _)| image.log_density).filter(|x| x.is_finite());
    Report {
        images: images.len(),
        captioned: captioned.len(),
        compared: compared.len(),
        stated: common_statement(world, images),
        log_density: estimate(possible.collect()),
        expected_log_density: over_worlds(|world| world.mean_log_density),
        tail: Fraction { count: tail.len(), of: compared.len() },
        expected_tail: over_worlds(|world| world.tail_mass),
        tail_and_right: Fraction { count: count(&tail, Scored::is_right), of: compared.len() },
        right: Fraction { count: count(&captioned, Scored::is_right), of: captioned.len() },
        impossible: Fraction { count: images.iter().filter(|image| !image.is_possible()).count(), of: images.len() },
        distinct_cells: images.iter().map(|image| &image.reading.cell).collect::<HashSet<_>>().len(),
        aesthetic: estimate(images.iter().map(|image| image.aesthetic).collect()),
        attributes: (0..world.attributes.len()).map(|index| attribute(world, index, images, &compared)).collect(),
    }
}

fn attribute(world: &World, index: usize, images: &[Scored], compared: &[(&Scored, &Conditional)]) -> AttributeReport {
    let values = &world.attributes[index].values;
    let histogram = |images: &[(&Scored, &Conditional)]| {
        let (mut counts, mut expected) = (vec![0; values.len()], vec![0.0; values.len()]);
        for (image, conditional) in images {
            counts[image.reading.cell[index]] += 1;
            let fraction = conditional.marginals[index].iter().map(|p| p / images.len() as f64);
            expected.iter_mut().zip(fraction).for_each(|(sum, p)| *sum += p);
        }
        (counts, expected)
    };
    let (counts, expected) = histogram(compared);
    let open: Vec<_> = compared.iter().filter(|(image, _)| image.states(index).is_none()).copied().collect();
    let (open_counts, open_expected) = histogram(&open);
    let any = (!open.is_empty()).then_some(());
    let stating = images.iter().filter(|image| image.states(index).is_some());
    let (wrong, right): (Vec<&Scored>, Vec<&Scored>) = stating.partition(|image| image.is_wrong(index));
    AttributeReport {
        name: world.attributes[index].name.clone(),
        values: values.clone(),
        entropy: entropy(&frequencies(&counts)),
        expected_entropy: entropy(&expected),
        counts,
        expected,
        open: open.len(),
        total_variation: any.map(|()| total_variation(&frequencies(&open_counts), &open_expected)),
        chance_total_variation: any.map(|()| chance_total_variation(open.len(), &open_expected)),
        right: Fraction { count: right.len(), of: right.len() + wrong.len() },
    }
}

/// Names of what the images state, where that is the same for all.
fn common_statement(world: &World, images: &[Scored]) -> Option<BTreeMap<String, String>> {
    let (first, rest) = images.split_first()?;
    if rest.iter().any(|image| image.stated != first.stated) {
        return None;
    }
    let name = |(attribute, value): (&super::Attribute, &Option<usize>)| {
        value.map(|value| (attribute.name.clone(), attribute.values[value].clone()))
    };
    Some(first.stated.iter().flat_map(|stated| world.attributes.iter().zip(stated)).filter_map(name).collect())
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (n, sum) = values.fold((0usize, 0.0), |(n, sum), x| (n + 1, sum + x));
    (n > 0).then(|| sum / n as f64)
}

fn estimate(values: Vec<f64>) -> Option<Estimate> {
    let n = values.len() as f64;
    let mean = mean(values.iter().copied())?;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    let standard_error = (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt());
    Some(Estimate { mean, standard_error })
}

fn frequencies(counts: &[usize]) -> Vec<f64> {
    let total = counts.iter().sum::<usize>().max(1) as f64;
    counts.iter().map(|&n| n as f64 / total).collect()
}

/// Nats.
fn entropy(p: &[f64]) -> f64 {
    // Not a negated sum: that of a certain outcome would be -0.
    p.iter().filter(|p| **p > 0.0).map(|p| p * (1.0 / p).ln()).sum()
}

fn total_variation(a: &[f64], b: &[f64]) -> f64 {
    0.5 * a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>()
}

/// Expected total variation between `p` and the frequencies of `n` draws from it: the mean absolute deviation of binomials,
/// by de Moivre's formula E|X − np| = 2 ν C(n, ν) p^ν (1 − p)^(n − ν + 1), ν = ⌊np⌋ + 1.
fn chance_total_variation(n: usize, p: &[f64]) -> f64 {
    let n = n as f64;
    let deviation = |&p: &f64| {
        let v = (n * p).floor() + 1.0;
        if p <= 0.0 || p >= 1.0 || v > n {
            return 0.0;
        }
        let ln_choose = libm::lgamma(n + 1.0) - libm::lgamma(v + 1.0) - libm::lgamma(n - v + 1.0);
        2.0 * v * (ln_choose + v * p.ln() + (n - v + 1.0) * (1.0 - p).ln()).exp()
    };
    0.5 * p.iter().map(deviation).sum::<f64>() / n
}

#[cfg(test)]
mod tests {
    use super::*;

    /// E|X/n − p| summed over every outcome of one and of three draws.
    #[test]
    fn deviation_by_chance() {
        let p: [f64; 2] = [0.25, 0.75];
        assert!((chance_total_variation(1, &p) - 2.0 * 0.25 * 0.75).abs() < 1e-12);
        let choose = [1.0, 3.0, 3.0, 1.0];
        let exact: f64 = (0..4)
            .map(|k| choose[k] * p[0].powi(k as i32) * p[1].powi(3 - k as i32) * (k as f64 / 3.0 - p[0]).abs())
            .sum();
        assert!((chance_total_variation(3, &p) - exact).abs() < 1e-12);
        assert_eq!(chance_total_variation(5, &[1.0, 0.0]), 0.0);
    }

    #[test]
    fn plain_statistics() {
        assert_eq!(estimate(vec![]), None);
        assert_eq!(estimate(vec![2.0]), Some(Estimate { mean: 2.0, standard_error: None }));
        assert_eq!(estimate(vec![1.0, 3.0]), Some(Estimate { mean: 2.0, standard_error: Some(1.0) }));
        assert!((entropy(&[0.5, 0.5, 0.0]) - 2f64.ln()).abs() < 1e-15);
        assert!(entropy(&[1.0]).is_sign_positive());
        assert_eq!(total_variation(&[1.0, 0.0], &[0.25, 0.75]), 0.75);
    }
}
