//! Adam on the points of paths. The gradient of a point is a combination of itself and its neighbours, so that of all coordinates only
//! lengths and products are summed, and blocks of coordinates move side by side.

use super::cost::{Cost, Paths, Products};
use crate::{Error, Result};
use rayon::prelude::*;

/// Kingma & Ba 2015 with torch's defaults.
const BETAS: [f64; 2] = [0.9, 0.999];
const EPS: f64 = 1e-8;

/// Coordinates of a block: the points of a path, their gradients and moments then lie in a core's cache.
const WIDTH: usize = 64;

/// When to stop: as soon as the cost has changed by less than `below` that many times in a row, or after `at_most` iterations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stop {
    pub below: f64,
    pub in_a_row: usize,
    pub at_most: usize,
}

/// How a descent ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Descent {
    /// With the penalty.
    pub cost: f64,
    pub penalty: f64,
    pub iterations: usize,
    /// Whether it ended before the last iteration.
    pub converged: bool,
}

/// Some coordinates of all points, `[point, coordinate]`.
struct Block {
    width: usize,
    points: Vec<f64>,
    gradient: Vec<f64>,
    first: Vec<f64>,
    second: Vec<f64>,
}

impl Block {
    /// Coordinates `start .. start + width`.
    fn new(points: &[Vec<f64>], start: usize, width: usize) -> Block {
        let points: Vec<f64> = points.iter().flat_map(|point| &point[start..start + width]).copied().collect();
        let zeros = vec![0.0; points.len()];
        Block { width, points, gradient: zeros.clone(), first: zeros.clone(), second: zeros }
    }

    fn point(&self, index: usize) -> &[f64] {
        &self.points[index * self.width..(index + 1) * self.width]
    }

    /// What these coordinates add to the products.
    fn products(&self, paths: &Paths) -> Products {
        let dot = |a: usize, b: usize| self.point(a).iter().zip(self.point(b)).map(|(a, b)| a * b).sum();
        let points = self.points.len() / self.width;
        Products {
            squares: (0..points).map(|point| dot(point, point)).collect(),
            crossed: paths.segments.iter().map(|&[from, to]| dot(from, to)).collect(),
        }
    }

    /// The gradient of the cost from its derivatives: `∂‖P‖²/∂P = 2P` and `∂(P · Q)/∂P = Q`.
    fn differentiate(&mut self, paths: &Paths, derivatives: &Products) {
        let width = self.width;
        let rows = self.gradient.chunks_exact_mut(width).zip(self.points.chunks_exact(width));
        for ((gradient, point), slope) in rows.zip(&derivatives.squares) {
            gradient.iter_mut().zip(point).for_each(|(g, p)| *g = 2.0 * slope * p);
        }
        for (&[from, to], slope) in paths.segments.iter().zip(&derivatives.crossed) {
            for (at, other) in [(from, to), (to, from)] {
                let other = &self.points[other * width..(other + 1) * width];
                let gradient = &mut self.gradient[at * width..(at + 1) * width];
                gradient.iter_mut().zip(other).for_each(|(g, p)| *g += slope * p);
            }
        }
    }

    /// Update `t`, counted from 1.
    fn update(&mut self, free: &[bool], lr: f64, t: i32) {
        let [b1, b2] = BETAS;
        let (step, scale) = (lr / (1.0 - b1.powi(t)), 1.0 / (1.0 - b2.powi(t)).sqrt());
        for point in free.iter().enumerate().filter_map(|(point, free)| free.then_some(point)) {
            let row = point * self.width..(point + 1) * self.width;
            let moments = self.first[row.clone()].iter_mut().zip(&mut self.second[row.clone()]);
            for ((p, g), (m, v)) in self.points[row.clone()].iter_mut().zip(&self.gradient[row]).zip(moments) {
                *m = b1 * *m + (1.0 - b1) * g;
                *v = b2 * *v + (1.0 - b2) * g * g;
                *p -= step * *m / (v.sqrt() * scale + EPS);
            }
        }
    }
}

/// Moves the free points, `[point][coordinate]`, to where the paths cost least.
pub fn descend(
    points: &mut [Vec<f64>],
    free: &[bool],
    paths: &Paths,
    cost: &Cost,
    lr: f64,
    stop: Stop,
) -> Result<Descent> {
    let dimensions = points.first().map_or(0, Vec::len);
    let block = |start: usize| Block::new(points, start, WIDTH.min(dimensions - start));
    let mut blocks: Vec<Block> = (0..dimensions).step_by(WIDTH).map(block).collect();
    let mut products = summed(blocks.iter().map(|block| block.products(paths)).collect());
    let (mut before, mut calm) = (f64::NAN, 0);
    let mut iterations = 0;
    let found = loop {
        let (total, penalty, derivatives) = cost.evaluate(paths, &products);
        if !total.is_finite() {
            return Err(Error::Numeric(format!("the cost of the path is {total} after {iterations} iterations")));
        }
        calm = if (total - before).abs() < stop.below { calm + 1 } else { 0 };
        let converged = calm >= stop.in_a_row;
        if converged || iterations == stop.at_most {
            break Descent { cost: total, penalty, iterations, converged };
        }
        before = total;
        iterations += 1;
        let t = i32::try_from(iterations).unwrap_or(i32::MAX);
        let moved = |block: &mut Block| {
            block.differentiate(paths, &derivatives);
            block.update(free, lr, t);
            block.products(paths)
        };
        products = match &mut blocks[..] {
            [one] => moved(one),
            blocks => summed(blocks.par_iter_mut().map(moved).collect()),
        };
    };
    for (index, point) in points.iter_mut().enumerate() {
        *point = blocks.iter().flat_map(|block| block.point(index)).copied().collect();
    }
    Ok(found)
}

/// The cost where the points are, the part of it that is penalty, and its gradient to every coordinate of every point.
pub fn evaluate(points: &[Vec<f64>], paths: &Paths, cost: &Cost) -> (f64, f64, Vec<Vec<f64>>) {
    let mut block = Block::new(points, 0, points.first().map_or(0, Vec::len));
    let (total, penalty, derivatives) = cost.evaluate(paths, &block.products(paths));
    block.differentiate(paths, &derivatives);
    (total, penalty, block.gradient.chunks_exact(block.width).map(<[f64]>::to_vec).collect())
}

/// In the order of the blocks, whichever thread made them.
fn summed(parts: Vec<Products>) -> Products {
    let add = |sum: &mut [f64], part: &[f64]| sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    let fold = |mut sum: Products, part: Products| {
        add(&mut sum.squares, &part.squares);
        add(&mut sum.crossed, &part.crossed);
        sum
    };
    parts.into_iter().reduce(fold).unwrap_or_default()
}
