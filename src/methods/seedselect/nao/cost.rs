//! The cost of paths of noises: length, weighed by how unlikely the noises on the way are.

use super::chi::Chi;

/// At which noises of a segment its likelihood is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quadrature {
    /// In its middle alone, as the released code does. Next to an end that is far from the mode, the first free point then goes as far
    /// beyond the mode as the end lies before it, so that the middle is likely and the point is not.
    Midpoint,
    /// Simpson's rule over both ends and the middle, which keeps every point likely.
    Simpson,
}

/// What a set of paths is: which points are neighbours, and which point is the centroid that the paths meet in, if they do.
#[derive(Clone, Debug, PartialEq)]
pub struct Paths {
    pub segments: Vec<[usize; 2]>,
    pub centroid: Option<usize>,
}

/// What the cost depends on, and, in another value, its derivative to each of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Products {
    /// `‖P‖²` per point.
    pub squares: Vec<f64>,
    /// `P · Q` per segment.
    pub crossed: Vec<f64>,
}

/// Samuel et al. 2023 (NAO, arXiv 2306.08687) in its released code: `Σ -l f + λ max(0, l - ε)` over the segments of length `l`, `f` the
/// [log-density](Chi::log_density) of the norm along it, and `-f(‖c‖)` for a centroid `c`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    pub chi: Chi,
    pub quadrature: Quadrature,
    /// λ.
    pub penalty: f64,
    /// ε.
    pub longest: f64,
}

/// Segments that are shorter than this have no direction: their length has derivative 0.
const SHORTEST: f64 = 1e-5;

impl Cost {
    /// The cost, the part of it that is penalty, and its derivatives.
    pub fn evaluate(&self, paths: &Paths, products: &Products) -> (f64, f64, Products) {
        let (mut cost, mut penalty) = (0.0, 0.0);
        let mut derivatives =
            Products { squares: vec![0.0; products.squares.len()], crossed: vec![0.0; products.crossed.len()] };
        for (segment, &[from, to]) in paths.segments.iter().enumerate() {
            let squares = [products.squares[from], products.squares[to]];
            let found = self.segment(squares, products.crossed[segment]);
            cost += found.cost + found.penalty;
            penalty += found.penalty;
            derivatives.squares[from] += found.to_squares[0];
            derivatives.squares[to] += found.to_squares[1];
            derivatives.crossed[segment] = found.to_crossed;
        }
        if let Some(centroid) = paths.centroid {
            let r = products.squares[centroid].sqrt();
            cost -= self.chi.log_density(r);
            derivatives.squares[centroid] -= self.chi.derivative(r) / (2.0 * r);
        }
        (cost, penalty, derivatives)
    }

    /// One segment from `‖P‖²`, `‖Q‖²` and `P · Q`: `l² = ‖P‖² + ‖Q‖² - 2 P·Q`, and its middle has `‖M‖² = (‖P‖² + ‖Q‖² + 2 P·Q)/4`.
    fn segment(&self, squares: [f64; 2], crossed: f64) -> Segment {
        let sum = squares[0] + squares[1];
        let length = (sum - 2.0 * crossed).max(0.0).sqrt();
        let middle = ((sum + 2.0 * crossed) / 4.0).sqrt();
        let ends = squares.map(f64::sqrt);
        let (weight_of_end, weight_of_middle) = match self.quadrature {
            Quadrature::Midpoint => (0.0, 1.0),
            Quadrature::Simpson => (1.0 / 6.0, 4.0 / 6.0),
        };
        let mut likelihood = weight_of_middle * self.chi.log_density(middle);
        if weight_of_end > 0.0 {
            likelihood += weight_of_end * (self.chi.log_density(ends[0]) + self.chi.log_density(ends[1]));
        }
        let excess = length - self.longest;
        let to_length = -likelihood + if excess > 0.0 { self.penalty } else { 0.0 };
        let to_length_squared = if length > SHORTEST { to_length / (2.0 * length) } else { 0.0 };
        let to_middle_squared = -length * weight_of_middle * self.chi.derivative(middle) / (2.0 * middle);
        let to_end_squared = |r: f64| match weight_of_end {
            0.0 => 0.0,
            weight => -length * weight * self.chi.derivative(r) / (2.0 * r),
        };
        Segment {
            cost: -length * likelihood,
            penalty: self.penalty * excess.max(0.0),
            to_squares: ends.map(|end| to_length_squared + to_middle_squared / 4.0 + to_end_squared(end)),
            to_crossed: -2.0 * to_length_squared + to_middle_squared / 2.0,
        }
    }
}

struct Segment {
    cost: f64,
    penalty: f64,
    to_squares: [f64; 2],
    to_crossed: f64,
}
