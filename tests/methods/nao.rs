//! NAO: the chi law, the cost of paths and its gradient, paths and centroids beside the closed forms.

use crate::common::inputs;
use rarebit::methods::seedselect::nao::chi::Chi;
use rarebit::methods::seedselect::nao::combine::{distance, dot, lerp, lol, mean, norm, slerp};
use rarebit::methods::seedselect::nao::cost::{Cost, Paths, Quadrature};
use rarebit::methods::seedselect::nao::descent::{Stop, evaluate};
use rarebit::methods::seedselect::nao::path::{Coordinates, centroid, cost, path};
use rarebit::methods::seedselect::nao::{Interpolation, Middle, Settings, frames, middle};
use rarebit::{Error, sampler};

const D: usize = 16384;
/// `√(D - 1)`.
const MODE: f64 = 127.996_093_690_393_54;

fn noise(seed: u64, dimensions: usize) -> Vec<f32> {
    let mut noise = vec![0.0; dimensions];
    sampler::normal(seed, 0, &mut noise);
    noise
}

fn of_length(seed: u64, dimensions: usize, length: f64) -> Vec<f32> {
    let noise = noise(seed, dimensions);
    let scale = length / norm(&noise);
    noise.into_iter().map(|x| (f64::from(x) * scale) as f32).collect()
}

fn slices(noises: &[Vec<f32>]) -> Vec<&[f32]> {
    noises.iter().map(|noise| &noise[..]).collect()
}

fn released_quadrature() -> Settings {
    Settings { quadrature: Quadrature::Midpoint, ..Settings::default() }
}

/// Norms of the points between the ends.
fn inner_norms(points: &[Vec<f32>]) -> Vec<f64> {
    points[1..points.len() - 1].iter().map(|point| norm(point)).collect()
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

fn largest(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

/// Values of mpmath at 40 digits.
#[test]
fn log_density_of_the_chi_law() {
    let golden = [
        (D, MODE, -0.572_359_856_351_223_9),
        (D, 127.0, -1.567_151_459_437_939_6),
        (D, 129.0, -1.577_568_253_264_508),
        (D, 120.0, -65.906_966_912_279_24),
        (D, 90.51, -1_582.457_458_560_900_7),
        (D, 141.0, -164.350_904_845_007_86),
        (D, 1.0, -71_299.884_188_910_54),
        (1024, 1023f64.sqrt(), -0.572_283_483_183_983_2),
        (1024, 0.75 * 1023f64.sqrt(), -71.089_793_601_355_87),
        (2, 1.0, -0.5),
        (2, 2.0, -1.306_852_819_440_054_7),
        (3, 2f64.sqrt(), -0.532_644_172_084_782_2),
        (4, 1.0 + 3f64.sqrt(), -1.410_040_371_901_679_6),
    ];
    for (dimensions, r, expected) in golden {
        let found = Chi::new(dimensions).unwrap().log_density(r);
        assert!((found / expected - 1.0).abs() < 1e-9, "d {dimensions}, r {r}: {found}, not {expected}");
    }
    let chi = Chi::new(D).unwrap();
    assert!((chi.mode() - MODE).abs() < 1e-12 && chi.derivative(chi.mode()).abs() < 1e-12);
    assert!((chi.derivative(127.0) - 2.0).abs() < 1e-12 && (chi.derivative(129.0) + 2.0).abs() < 1e-12);
    assert!(Chi::new(1).is_err());
}

/// The noises are f32: what their rounding does to the density of their length.
#[test]
fn log_density_of_rounded_noises() {
    let chi = Chi::new(D).unwrap();
    for length in [125.0, 126.5, MODE, 128.7, 131.0] {
        let found = chi.log_density(norm(&of_length(3, D, length)));
        assert!((found - chi.log_density(length)).abs() < 1e-4, "{length}: {found}");
    }
}

/// Three paths that meet, every coordinate of every point, the centroid included.
#[test]
fn the_gradient_of_the_cost_is_its_central_difference() {
    const DIMENSIONS: usize = 12;
    let segments = [[1, 2], [2, 3], [3, 0], [4, 5], [5, 0], [6, 0]].to_vec();
    let paths = Paths { segments, centroid: Some(0) };
    let wide = |point: usize| -> Vec<f64> { inputs::noise("nao", point, DIMENSIONS) };
    let points: Vec<Vec<f64>> = (0..7).map(wide).collect();
    for quadrature in [Quadrature::Midpoint, Quadrature::Simpson] {
        // Some segments are longer than 5.5 and some are not.
        let cost = Cost { chi: Chi::new(DIMENSIONS).unwrap(), quadrature, penalty: 1.3, longest: 5.5 };
        let (_, penalty, gradient) = evaluate(&points, &paths, &cost);
        assert!(penalty > 0.0);
        for (point, at) in (0..7).flat_map(|point| (0..DIMENSIONS).map(move |at| (point, at))) {
            let moved = |by: f64| {
                let mut points = points.clone();
                points[point][at] += by;
                evaluate(&points, &paths, &cost).0
            };
            let (h, found) = (1e-5, gradient[point][at]);
            let expected = (moved(h) - moved(-h)) / (2.0 * h);
            let error = (found - expected).abs() / expected.abs().max(1.0);
            assert!(error < 1e-7, "{quadrature:?}, point {point}: {found}, not {expected}");
        }
    }
}

#[test]
fn a_path_between_likely_noises_stays_likely() {
    let (a, b) = (of_length(5, D, 127.28), of_length(6, D, 127.12));
    let found = path(&a, &b, &Settings::default()).unwrap();
    assert!(found.points.len() == 50 && found.points[0] == a && found.points[49] == b);
    assert!(found.descent.converged && found.descent.penalty == 0.0, "{:?}", found.descent);
    let norms = inner_norms(&found.points);
    assert!(least(&norms) > 127.0 && largest(&norms) < 129.0, "{} to {}", least(&norms), largest(&norms));

    let of = |how| frames(&a, &b, 50, how).unwrap();
    let (lerp, slerp) = (of(Interpolation::Lerp), of(Interpolation::Slerp));
    let middle = least(&inner_norms(&lerp));
    assert!((middle - 90.5).abs() < 1.5, "{middle}");
    for settings in [Settings::default(), Settings::released()] {
        let cost = |points: &[Vec<f32>]| cost(points, &settings).unwrap();
        let ((nao, _), (slerp, _), (lerp, penalty)) = (cost(&found.points), cost(&slerp), cost(&lerp));
        assert!((114.0..122.0).contains(&nao) && nao < slerp && slerp < lerp, "{nao}, {slerp}, {lerp}");
        assert!((200.0..300.0).contains(&slerp) && lerp > 1e5, "{slerp}, {lerp}");
        assert_eq!(penalty, 0.0, "a chord of 50 points has segments of half the length that costs more");
    }
}

/// The released code measures a segment in its middle, and the point next to an unlikely end goes as far beyond the mode as that lies
/// before it.
#[test]
fn unlikely_ends_overshoot_where_only_middles_are_measured() {
    for (ends, side) in [([114.55, 120.76], 1.0), ([133.64, 133.47], -1.0)] {
        let [a, b] = [of_length(5, D, ends[0]), of_length(6, D, ends[1])];
        let beyond = |settings: &Settings| {
            let found = path(&a, &b, settings).unwrap();
            let off: Vec<f64> = inner_norms(&found.points).iter().map(|norm| side * (norm - MODE)).collect();
            (largest(&off), found.descent)
        };
        let (middles, descent) = beyond(&released_quadrature());
        assert!(middles > 3.0 && descent.penalty > 1.0, "{ends:?}: {middles}, {descent:?}");
        let (simpson, descent) = beyond(&Settings::default());
        assert!(simpson < 0.5 && descent.penalty < 1e-3, "{ends:?}: {simpson}, {descent:?}");
    }
}

/// In all coordinates a path gets to where it gets in the two of the plane, at the pace of the released code.
#[test]
fn the_plane_of_the_ends_is_all_a_path_needs() {
    let released = Settings { stop: Stop { at_most: 1000, ..Settings::released().stop }, ..Settings::released() };
    let mode = 1023f64.sqrt();
    let of = |lengths: [f64; 2], settings: &Settings| {
        path(&of_length(5, 1024, lengths[0]), &of_length(6, 1024, lengths[1]), settings).unwrap()
    };
    for quadrature in [Quadrature::Midpoint, Quadrature::Simpson] {
        let likely = [mode - 0.7, mode - 0.9];
        let all = of(likely, &Settings { quadrature, ..released }).descent;
        let plane = of(likely, &Settings { quadrature, ..Settings::default() }).descent;
        assert!(all.converged && all.cost > plane.cost && all.cost < 1.02 * plane.cost, "{all:?}, {plane:?}");
    }
    let overshoot = of([mode - 13.5, mode - 7.2], &released);
    assert!(largest(&inner_norms(&overshoot.points)) > mode + 10.0 && !overshoot.descent.converged);
}

#[test]
fn the_same_seed_gives_the_same_bits_on_any_number_of_threads() {
    let (a, b) = (noise(1, 1024), noise(2, 1024));
    let stop = Stop { at_most: 30, ..Settings::released().stop };
    let with = |threads: usize, seed: u64| {
        let settings = Settings { stop, seed, ..Settings::released() };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| path(&a, &b, &settings).unwrap().points)
    };
    let one = with(1, 7);
    assert!(with(3, 7) == one);
    assert!(with(1, 8) != one, "the seed decides where points start");
}

#[test]
fn a_centroid_does_not_depend_on_the_order_of_its_noises() {
    let noises: Vec<Vec<f32>> = (0..3).map(|seed| noise(20 + seed, D)).collect();
    let found = centroid(&slices(&noises), &Settings::default()).unwrap();
    assert!((norm(&found.noise) - MODE).abs() < 0.1 && found.descent.penalty == 0.0, "{:?}", found.descent);
    for (noise, path) in noises.iter().zip(&found.paths) {
        assert!(path.len() == 50 && path[0] == *noise && path[49] == found.noise);
        let norms = inner_norms(path);
        assert!(least(&norms) > 127.0 && largest(&norms) < 129.0);
    }
    for order in [[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let permuted = order.map(|index| &noises[index][..]);
        let other = middle(&permuted, Middle::Nao(Settings::default())).unwrap();
        let off = distance(&other, &found.noise) / norm(&found.noise);
        assert!(off < 1e-2, "{order:?}: {off}");
    }
}

/// Paths to the middle start with segments 2.0 long, and only those above 7.24 cost more.
#[test]
fn no_penalty_at_the_start() {
    let noises = [of_length(5, D, 128.0), of_length(6, D, 128.0)];
    let still = Stop { at_most: 0, ..Settings::default().stop };
    let found = centroid(&slices(&noises), &Settings { stop_of_centroid: still, ..Settings::default() }).unwrap();
    assert_eq!((found.descent.penalty, found.descent.iterations), (0.0, 0));
    for path in &found.paths {
        let lengths: Vec<f64> = path.windows(2).map(|pair| distance(&pair[0], &pair[1])).collect();
        assert!(least(&lengths) > 1.9 && largest(&lengths) < 2.1, "{} to {}", least(&lengths), largest(&lengths));
    }
    assert!((2.0 / 50.0 * distance(&noises[0], &noises[1]) - 7.24).abs() < 0.1);
    let moved = middle(&slices(&noises), Middle::Nao(Settings::default())).unwrap();
    let between = slerp(&noises[0], &noises[1], 0.5).unwrap();
    assert!(
        distance(&moved, &between) < 0.01 * MODE,
        "of two noises the middle of their arc is as good as any point of it"
    );
}

#[test]
fn frames_have_both_ends_and_equal_distances() {
    // Of the likeliest length, so that no path turns at its ends.
    let (a, b) = (of_length(1, 1024, 1023f64.sqrt()), of_length(2, 1024, 1023f64.sqrt()));
    for how in [Interpolation::Nao(Settings::default()), Interpolation::Slerp, Interpolation::Lerp] {
        for count in [2, 3, 8] {
            let found = frames(&a, &b, count, how).unwrap();
            assert!(found.len() == count && found[0] == a && found[count - 1] == b, "{how:?}");
            let lengths: Vec<f64> = found.windows(2).map(|pair| distance(&pair[0], &pair[1])).collect();
            assert!(largest(&lengths) < 1.02 * least(&lengths), "{how:?}: {lengths:?}");
        }
    }
    let same = frames(&a, &a, 4, Interpolation::Nao(Settings::default())).unwrap();
    assert!(same.iter().all(|frame| distance(frame, &a) < 0.01 * norm(&a)));
}

#[test]
fn closed_forms() {
    let (a, b, c) = (noise(1, D), noise(2, D), noise(3, D));
    let close = |found: &[f32], expected: &[f32]| assert!(distance(found, expected) < 1e-4 * norm(&a));
    close(&slerp(&a, &b, 0.0).unwrap(), &a);
    close(&slerp(&a, &b, 1.0).unwrap(), &b);
    let (from, to) = (of_length(1, D, 128.0), of_length(2, D, 128.0));
    let quarter = slerp(&from, &to, 0.25).unwrap();
    let angle = (dot(&from, &to) / 128f64.powi(2)).acos();
    assert!((norm(&quarter) - 128.0).abs() < 1e-3);
    assert!(((dot(&from, &quarter) / 128f64.powi(2)).acos() - angle / 4.0).abs() < 1e-6);
    let nearby: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + 0.01 * b).collect();
    assert!(slerp(&a, &nearby, 0.3).unwrap() == lerp(&a, &nearby, 0.3));

    let all = [&a[..], &b, &c];
    close(&mean(&all).iter().map(|x| x * 3f32.sqrt()).collect::<Vec<_>>(), &lol(&all, &[1.0; 3]));
    assert!((norm(&lol(&all, &[0.2, 3.0, 1.0])) - MODE).abs() < 3.0, "a noise like any other");
    assert!((norm(&middle(&all, Middle::Mean).unwrap()) - MODE / 3f64.sqrt()).abs() < 3.0);
    close(&middle(&all, Middle::Lol).unwrap(), &lol(&all, &[2.0; 3]));
}

#[test]
fn what_has_no_way_or_middle() {
    let a = noise(1, 64);
    let opposite: Vec<f32> = a.iter().map(|x| -x).collect();
    let refused = |found: rarebit::Result<()>, what: &str| match found {
        Err(Error::Usage(message)) => assert!(message.contains(what), "{message}"),
        other => panic!("{what}: {other:?}"),
    };
    let nao = Interpolation::Nao(Settings::default());
    for how in [nao, Interpolation::Slerp] {
        refused(frames(&a, &opposite, 5, how).map(drop), "opposite directions");
    }
    refused(frames(&a, &a, 1, nao).map(drop), "1 frames");
    refused(frames(&a, &a[..32], 5, nao).map(drop), "64 and 32 numbers");
    refused(frames(&a, &[0.0; 64], 5, nao).map(drop), "length 0");
    refused(frames(&a, &[f32::NAN; 64], 5, nao).map(drop), "length NaN");
    refused(middle(&[&a], Middle::Lol).map(drop), "at least two");
    refused(middle(&[], Middle::Lol).map(drop), "no noise");
    let b = noise(2, 64);
    let third: Vec<f32> = a.iter().zip(&b).map(|(a, b)| -a - b).collect();
    refused(middle(&[&a, &b, &third], Middle::Nao(Settings::default())).map(drop), "cancel");
    refused(middle(&[&a, &opposite], Middle::Nao(Settings::default())).map(drop), "opposite directions");
    let short = Settings { points: 2, ..Settings::default() };
    refused(path(&a, &b, &short).map(drop), "2 points");
    refused(cost(&[a], &Settings::default()).map(drop), "two ends");
    assert_eq!(Settings::released().coordinates, Coordinates::All);
}
