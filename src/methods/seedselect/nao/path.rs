//! Likely paths between noises, and the noise in the middle of several.

use super::chi::Chi;
use super::combine::{self, distance, norm};
use super::cost::{Cost, Paths, Quadrature};
use super::descent::{self, Descent, Stop};
use crate::sampler::{self, draw};
use crate::{Error, Result};

/// In which coordinates the points move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coordinates {
    /// In all of the noise, as in the released code.
    All,
    /// In the space that the given noises span. The cost depends on lengths and distances alone, so that it does not change where a
    /// path is mirrored at that space, and its shortest paths lie in it, as a great circle lies in a plane: two or three coordinates
    /// instead of thousands.
    Span,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Of one path, its ends among them.
    pub points: usize,
    pub quadrature: Quadrature,
    pub coordinates: Coordinates,
    pub lr: f64,
    /// λ of [`Cost`]; its ε is `2/points` of the distance between the noises, of more than two the largest.
    pub penalty: f64,
    pub stop: Stop,
    /// Where a centroid moves too.
    pub stop_of_centroid: Stop,
    /// Of the jitter that the points start with.
    pub seed: u64,
}

impl Default for Settings {
    /// Every point likely, in the coordinates that matter. A step in two coordinates is shorter than one of the released code in
    /// thousands, and changes the cost by less, so that the stops are stricter. Between noises of 1024 numbers an `lr` of 0.1 does not
    /// settle, and 0.01 takes twice as many iterations to the same cost.
    fn default() -> Settings {
        Settings {
            quadrature: Quadrature::Simpson,
            coordinates: Coordinates::Span,
            lr: 0.03,
            stop: Stop { below: 1e-5, in_a_row: 10, at_most: 20_000 },
            stop_of_centroid: Stop { below: 1e-7, in_a_row: 10, at_most: 20_000 },
            ..Settings::released()
        }
    }
}

impl Settings {
    /// The released code's (`nao/norm_aware_optimization.py` of SeedSelect's repository).
    pub fn released() -> Settings {
        Settings {
            points: 50,
            quadrature: Quadrature::Midpoint,
            coordinates: Coordinates::All,
            lr: 0.01,
            penalty: 1.0,
            stop: Stop { below: 0.001, in_a_row: 10, at_most: 10_000 },
            stop_of_centroid: Stop { below: 0.01, in_a_row: 5, at_most: 10_000 },
            seed: 0,
        }
    }

    fn cost(&self, ends: &[&[f32]]) -> Result<Cost> {
        if self.points < 3 {
            return Err(Error::Usage(format!("a path of {} points has none between its ends", self.points)));
        }
        let apart = |(index, a): (usize, &&[f32])| ends[..index].iter().map(|b| distance(a, b)).fold(0.0, f64::max);
        let longest = 2.0 * ends.iter().enumerate().map(apart).fold(0.0, f64::max) / self.points as f64;
        Ok(Cost { chi: Chi::new(ends[0].len())?, quadrature: self.quadrature, penalty: self.penalty, longest })
    }
}

/// A path with both its ends.
#[derive(Clone, Debug)]
pub struct Path {
    pub points: Vec<Vec<f32>>,
    pub descent: Descent,
}

impl Path {
    /// From its start to each point.
    pub fn lengths(&self) -> Vec<f64> {
        let mut length = 0.0;
        let segments = self.points.windows(2).map(|pair| {
            length += distance(&pair[0], &pair[1]);
            length
        });
        [0.0].into_iter().chain(segments).collect()
    }

    /// The noise at a fraction of the whole length, on the straight line between its neighbours; `lengths` are those of the path.
    pub fn at(&self, lengths: &[f64], fraction: f64) -> Vec<f32> {
        let last = lengths.len() - 1;
        let wanted = fraction * lengths[last];
        let after = lengths.partition_point(|length| *length <= wanted).clamp(1, last);
        let (from, to) = (lengths[after - 1], lengths[after]);
        let t = if to > from { (wanted - from) / (to - from) } else { 0.0 };
        combine::lerp(&self.points[after - 1], &self.points[after], t)
    }
}

/// A noise, and the paths to it from each of the given ones, all ends among their points.
#[derive(Clone, Debug)]
pub struct Centroid {
    pub noise: Vec<f32>,
    pub paths: Vec<Vec<Vec<f32>>>,
    pub descent: Descent,
}

/// The path between two noises that costs least. `Error::Usage` where there is none.
pub fn path(a: &[f32], b: &[f32], settings: &Settings) -> Result<Path> {
    let ends = [a, b];
    check(&ends)?;
    let cost = settings.cost(&ends)?;
    let space = Space::of(&ends, settings.coordinates)?;
    let [from, to] = ends.map(|end| space.coordinates(end));
    let mut points = chord(&from, &to, settings, 0);
    let last = points.len() - 1;
    let paths = Paths { segments: (0..last).map(|k| [k, k + 1]).collect(), centroid: None };
    let free: Vec<bool> = (0..points.len()).map(|k| k != 0 && k != last).collect();
    let descent = descent::descend(&mut points, &free, &paths, &cost, settings.lr, settings.stop)?;
    let inner = points[1..last].iter().map(|point| space.noise(point));
    let points = [a.to_vec()].into_iter().chain(inner).chain([b.to_vec()]).collect();
    Ok(Path { points, descent })
}

/// The noise whose paths to the given ones cost least in sum, and which is likely itself. It starts in the direction of their mean, with
/// the likeliest length.
///
/// What is summed are the costs, not their squares: it is the geometric median, and between two noises any point of their path is as
/// good as another, so that the start decides. `Error::Usage` where the mean has no direction.
pub fn centroid(noises: &[&[f32]], settings: &Settings) -> Result<Centroid> {
    check(noises)?;
    let cost = settings.cost(noises)?;
    let space = Space::of(noises, settings.coordinates)?;
    let mut points = vec![space.coordinates(&start(noises, &cost.chi)?)];
    let mut segments = vec![];
    let mut free = vec![true];
    for (index, noise) in noises.iter().enumerate() {
        let mut path = chord(&space.coordinates(noise), &points[0], settings, index);
        path.pop();
        let first = points.len();
        free.extend((0..path.len()).map(|k| k != 0));
        points.extend(path);
        segments.extend((first..points.len()).map(|k| [k, if k + 1 < points.len() { k + 1 } else { 0 }]));
    }
    let paths = Paths { segments, centroid: Some(0) };
    let descent = descent::descend(&mut points, &free, &paths, &cost, settings.lr, settings.stop_of_centroid)?;
    let centroid = space.noise(&points[0]);
    let path = |(noise, points): (&&[f32], &[Vec<f64>])| {
        let inner = points[1..].iter().map(|point| space.noise(point));
        [noise.to_vec()].into_iter().chain(inner).chain([centroid.clone()]).collect()
    };
    let paths = noises.iter().zip(points[1..].chunks(settings.points - 1)).map(path).collect();
    Ok(Centroid { noise: centroid, paths, descent })
}

/// The cost of a given path with its ends under [`Settings`], and the part of it that is penalty.
pub fn cost(points: &[Vec<f32>], settings: &Settings) -> Result<(f64, f64)> {
    let [first, .., last] = points else { return Err(Error::Usage("a path has two ends at least".into())) };
    let ends = [&first[..], &last[..]];
    check(&ends)?;
    let wide: Vec<Vec<f64>> = points.iter().map(|point| point.iter().map(|&x| x.into()).collect()).collect();
    let paths = Paths { segments: (1..points.len()).map(|k| [k - 1, k]).collect(), centroid: None };
    let (cost, penalty, _) = descent::evaluate(&wide, &paths, &settings.cost(&ends)?);
    Ok((cost, penalty))
}

/// Refuses what is not two noises or more, each as many numbers as the others, with a length.
pub fn check(noises: &[&[f32]]) -> Result<()> {
    let usage = |what: String| Err(Error::Usage(what));
    let [first, rest @ ..] = noises else { return usage("no noise is given".into()) };
    if rest.is_empty() {
        return usage("one noise alone: a path or a centroid takes at least two".into());
    }
    if let Some(other) = rest.iter().find(|noise| noise.len() != first.len()) {
        return usage(format!("noises of {} and {} numbers do not go together", first.len(), other.len()));
    }
    match noises.iter().find(|noise| !norm(noise).is_normal()) {
        Some(noise) => usage(format!("a noise of length {} has no direction", norm(noise))),
        None => Ok(()),
    }
}

/// The mean at the likeliest length.
fn start(noises: &[&[f32]], chi: &Chi) -> Result<Vec<f32>> {
    let mean = combine::mean(noises);
    let length = norm(&mean);
    if length < 1e-6 * chi.mode() {
        return Err(Error::Usage("the noises cancel each other: their mean has no direction".into()));
    }
    Ok(combine::sum(&[&mean], &[chi.mode() / length]))
}

/// The straight line from `from` to `to`, its inner points moved by up to 0.01 in every coordinate; no two paths by the same.
fn chord(from: &[f64], to: &[f64], settings: &Settings, path: usize) -> Vec<Vec<f64>> {
    const RESOLUTION: usize = 1 << 24;
    let last = settings.points - 1;
    let jitter = |k: usize, at: usize| {
        let number = ((path * last + k) * from.len() + at) as u64;
        sampler::uniform(settings.seed, draw::JITTER + number, RESOLUTION) as f64 / RESOLUTION as f64 / 100.0
    };
    let point = |k: usize| {
        let t = k as f64 / last as f64;
        let moved = |(at, (a, b)): (usize, (&f64, &f64))| a + t * (b - a) + jitter(k, at);
        from.iter().zip(to).enumerate().map(moved).collect()
    };
    let inner = (1..last).map(point);
    [from.to_vec()].into_iter().chain(inner).chain([to.to_vec()]).collect()
}

/// The space that points move in.
enum Space {
    All,
    /// Orthonormal.
    Basis(Vec<Vec<f64>>),
}

impl Space {
    /// `Error::Usage` where the noises lie on one line and on both sides of 0.
    fn of(noises: &[&[f32]], coordinates: Coordinates) -> Result<Space> {
        if coordinates == Coordinates::All {
            return Ok(Space::All);
        }
        let mut basis: Vec<Vec<f64>> = vec![];
        for noise in noises {
            let mut rest: Vec<f64> = noise.iter().map(|&x| x.into()).collect();
            // Twice: what the first pass leaves by rounding the second removes (Giraud et al. 2005).
            for direction in basis.iter().chain(&basis) {
                let along = product(&rest, direction);
                rest.iter_mut().zip(direction).for_each(|(x, d)| *x -= along * d);
            }
            let length = product(&rest, &rest).sqrt();
            if length > 1e-6 * norm(noise) {
                rest.iter_mut().for_each(|x| *x /= length);
                basis.push(rest);
            }
        }
        if basis.len() == 1 && noises.iter().any(|noise| combine::dot(noises[0], noise) < 0.0) {
            return Err(combine::opposite());
        }
        Ok(Space::Basis(basis))
    }

    fn coordinates(&self, noise: &[f32]) -> Vec<f64> {
        let wide = || noise.iter().map(|&x| f64::from(x));
        match self {
            Space::All => wide().collect(),
            Space::Basis(basis) => {
                basis.iter().map(|direction| wide().zip(direction).map(|(x, d)| x * d).sum()).collect()
            }
        }
    }

    fn noise(&self, coordinates: &[f64]) -> Vec<f32> {
        match self {
            Space::All => coordinates.iter().map(|&x| x as f32).collect(),
            Space::Basis(basis) => {
                let mut noise = vec![0.0; basis[0].len()];
                for (direction, x) in basis.iter().zip(coordinates) {
                    noise.iter_mut().zip(direction).for_each(|(sum, d)| *sum += x * d);
                }
                noise.into_iter().map(|x| x as f32).collect()
            }
        }
    }
}

fn product(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
