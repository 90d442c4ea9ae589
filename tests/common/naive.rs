//! A second opinion on what a program means: every op as plain loops in f64, written from the formulas in `program`.

#[path = "naive_backward.rs"]
mod backward;

use rarebit::program::*;
use rarebit::sampler::{Noise, Rng};
use std::collections::HashMap;

/// Contents of the named buffers.
#[derive(Clone, Debug, Default)]
pub struct Buffers {
    pub floats: HashMap<String, Vec<f64>>,
    pub ints: HashMap<String, Vec<i32>>,
}

/// All values of a program, by index (empty for i32 inputs).
pub fn evaluate(program: &Program, buffers: &Buffers) -> Vec<Vec<f64>> {
    evaluate_rounded(program, buffers, |_, x| x)
}

/// The same with everything that has to be stored rounded to its type: every op's outputs, and of attention what one product
/// hands to the next, the probabilities and in the gradient those of the scores.
pub fn evaluate_rounded(program: &Program, buffers: &Buffers, round: impl Fn(DType, f64) -> f64) -> Vec<Vec<f64>> {
    let mut values: Vec<Vec<f64>> = vec![vec![]; program.values.len()];
    for (value, slot) in program.values.iter().zip(&mut values) {
        if let Origin::Input(name) = &value.origin {
            *slot = buffers.floats.get(name).cloned().unwrap_or_default();
        }
    }
    for node in &program.nodes {
        let made = op(program, &node.op, &values, buffers, &round);
        for (id, mut value) in node.outputs.iter().zip(made) {
            value.iter_mut().for_each(|x| *x = round(program.value(*id).dtype, *x));
            assert_eq!(value.len(), program.value(*id).len(), "{}", program.show_op(&node.op));
            values[id.index()] = value;
        }
    }
    values
}

fn op(
    program: &Program,
    op: &Op,
    values: &[Vec<f64>],
    buffers: &Buffers,
    round: &impl Fn(DType, f64) -> f64,
) -> Vec<Vec<f64>> {
    let v = |id: ValueId| &values[id.index()][..];
    let shape = |id: ValueId| program.shape(id);
    let width = |id: ValueId| program.shape(id)[program.shape(id).len() - 1];
    let ints = |id: ValueId| match &program.value(id).origin {
        Origin::Input(name) => &buffers.ints[name][..],
        Origin::Weight(_) | Origin::Op(_) => panic!("no integers"),
    };
    match op {
        Op::Gemm(g) => vec![gemm(g, shape(g.w), v(g.x), v(g.w), g.bias.map(v), g.residual.map(v))],
        Op::Conv2d(c) => {
            let shift = c.shift.map(|s| (v(s.value), shape(s.value), s.at));
            vec![conv2d(c, shape(c.x), shape(c.w), v(c.x), v(c.w), c.bias.map(v), shift, c.residual.map(v))]
        }
        Op::Attention(a) => {
            let shapes = [a.q, a.k, a.v].map(|cols| shape(cols.value));
            let store = |x| round(program.value(a.q.value).dtype, x);
            attention(a, shapes, [a.q, a.k, a.v].map(|cols| v(cols.value)), store)
        }
        Op::Norm(Norm::Group { x, gamma, beta, groups, eps, silu }) => {
            let s = shape(*x);
            let channels = s[s.len() - 1];
            let member = |i: usize| {
                let sample = i / (v(*x).len() / s[0]);
                (sample * groups + i % channels / (channels / groups), i % channels)
            };
            let mut out = norm(v(*x), s[0] * groups, member, v(*gamma), v(*beta), *eps);
            if *silu {
                out[0].iter_mut().for_each(|x| *x = activate(*x, Activation::Silu));
            }
            out
        }
        Op::Norm(Norm::Layer { x, gamma, beta, eps }) => {
            let width = v(*gamma).len();
            norm(v(*x), v(*x).len() / width, |i| (i / width, i % width), v(*gamma), v(*beta), *eps)
        }
        Op::Rowwise(Rowwise::Softmax { x }) => {
            let rows = v(*x).chunks_exact(width(*x));
            vec![rows.flat_map(|row| row.iter().map(|x| (x - log_sum_exp(row)).exp())).collect()]
        }
        Op::Rowwise(Rowwise::Unit { x, eps }) => {
            let rows = v(*x).chunks_exact(width(*x));
            let norm = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>().sqrt();
            let y = rows.clone().flat_map(|row| row.iter().map(move |x| x / norm(row).max(*eps))).collect();
            vec![y, rows.map(norm).collect()]
        }
        Op::Norm(Norm::Dot { a, b }) => {
            let size = v(*a).len() / shape(*a)[0];
            let samples = v(*a).chunks_exact(size).zip(v(*b).chunks_exact(size));
            vec![samples.map(|(a, b)| a.iter().zip(b).map(|(a, b)| a * b).sum()).collect()]
        }
        Op::Rowwise(Rowwise::CrossEntropy { logits, targets }) => {
            let rows = v(*logits).chunks_exact(width(*logits));
            let lse: Vec<f64> = rows.clone().map(log_sum_exp).collect();
            let loss = |((row, lse), &target): ((&[f64], &f64), &i32)| {
                if target < 0 { 0.0 } else { lse - row[target as usize] }
            };
            vec![rows.zip(&lse).zip(ints(*targets)).map(loss).collect(), lse]
        }
        Op::Norm(Norm::Sum { x, over }) => {
            let sets = if *over == Over::Middle { shape(*x)[0] } else { 1 };
            let mut out = vec![0.0; sets * width(*x)];
            for (i, value) in v(*x).iter().enumerate() {
                out[i / (v(*x).len() / sets) * width(*x) + i % width(*x)] += value;
            }
            vec![out]
        }
        Op::Elementwise(e) => vec![elementwise(e, &shape, &v)],
        Op::Resample(Resample::Nearest2x { x, height, width }) => {
            let [b, h, w, c] = *shape(*x) else { panic!("no image") };
            let mut out = vec![];
            for b in 0..b {
                for y in 0..*height {
                    for x_out in 0..*width {
                        let at = ((b * h + y / 2) * w + x_out / 2) * c;
                        out.extend_from_slice(&v(*x)[at..at + c]);
                    }
                }
            }
            vec![out]
        }
        Op::Resample(Resample::Resize { x, height, width, how }) => {
            vec![resize(v(*x), shape(*x), [*height, *width], *how)]
        }
        Op::Resample(Resample::Crop { x, top, left, height, width }) => {
            let [b, h, w, c] = *shape(*x) else { panic!("no image") };
            let pixel = |b: usize, y: usize, x: usize| ((b * h + top + y) * w + left + x) * c;
            let pixels = (0..b).flat_map(|b| (0..height * width).map(move |i| (b, i / width, i % width)));
            vec![pixels.flat_map(|(b, i, j)| v(*x)[pixel(b, i, j)..][..c].to_vec()).collect()]
        }
        Op::Embedding(Embedding::Tokens { ids, table, extra, positions }) => {
            let (length, width) = (shape(*ids)[1], shape(*table)[1]);
            let rows = [v(*table), extra.map(v).unwrap_or_default()].concat();
            let mut out = vec![];
            for (i, &id) in ints(*ids).iter().enumerate() {
                for c in 0..width {
                    out.push(rows[id as usize * width + c] + v(*positions)[i % length * width + c]);
                }
            }
            vec![out]
        }
        Op::Embedding(Embedding::Mix { weights, ids, table }) => {
            let (choices, width) = (shape(*ids)[1], shape(*table)[1]);
            let mut out = vec![0.0; shape(*ids)[0] * width];
            for (i, (&id, weight)) in ints(*ids).iter().zip(v(*weights)).enumerate().filter(|(_, (id, _))| **id >= 0) {
                for c in 0..width {
                    out[i / choices * width + c] += weight * v(*table)[id as usize * width + c];
                }
            }
            vec![out]
        }
        Op::Embedding(Embedding::Patches { x, class, positions }) => {
            let samples = v(*x).chunks_exact(v(*x).len() / shape(*x)[0]);
            let rows = samples.flat_map(|patches| [v(*class), patches].concat());
            vec![rows.zip(v(*positions).iter().cycle()).map(|(x, position)| x + position).collect()]
        }
        Op::Embedding(Embedding::Row { x, row }) => {
            let (length, width) = (shape(*x)[1], shape(*x)[2]);
            vec![v(*x).chunks_exact(length * width).flat_map(|x| x[row * width..][..width].to_vec()).collect()]
        }
        Op::Embedding(Embedding::Sinusoidal { x, dim, flip_sin_to_cos, freq_shift }) => {
            let half = dim / 2;
            let mut out = vec![];
            for &x in v(*x) {
                let angle = |i: usize| x * (-(10000f64.ln()) * i as f64 / (half as f64 - freq_shift)).exp();
                let sin: Vec<f64> = (0..half).map(|i| angle(i).sin()).collect();
                let cos: Vec<f64> = (0..half).map(|i| angle(i).cos()).collect();
                out.extend(if *flip_sin_to_cos { [cos, sin].concat() } else { [sin, cos].concat() });
            }
            vec![out]
        }
        Op::Embedding(Embedding::Pool { x, at }) => {
            let (length, width) = (shape(*x)[1], shape(*x)[2]);
            let row = |b: usize, at: i32| (b * length + at as usize) * width;
            let rows = ints(*at).iter().enumerate();
            vec![rows.flat_map(|(b, &at)| v(*x)[row(b, at)..row(b, at) + width].to_vec()).collect()]
        }
        Op::Embedding(Embedding::Select { x, at }) => {
            let size = v(*x).len() / shape(*x)[0];
            vec![v(*x)[ints(*at)[0] as usize * size..][..size].to_vec()]
        }
        Op::Update(Update::Combine { terms, coefficients }) => {
            let mut out = vec![0.0; v(terms[0].value).len()];
            let row = out.len() / shape(terms[0].value)[0];
            for (&term, &c) in terms.iter().zip(v(*coefficients)).filter(|(_, c)| **c != 0.0) {
                out.iter_mut().zip(&v(term.value)[term.at * row..]).for_each(|(out, x)| *out += c * x);
            }
            vec![out]
        }
        Op::Update(Update::AdamW { p, g, m, v: second, scalars }) => {
            let [lr, gain1, gain2, eps, decay, c1, c2] = v(*scalars)[..] else { panic!("seven scalars") };
            let average = |old: ValueId, gain: f64, power: i32| -> Vec<f64> {
                v(old).iter().zip(v(*g)).map(|(x, g)| (1.0 - gain) * x + gain * g.powi(power)).collect()
            };
            let (m, second) = (average(*m, gain1, 1), average(*second, gain2, 2));
            let steps = m.iter().zip(&second).map(|(m, v)| lr * (m / c1) / ((v / c2).sqrt() + eps));
            vec![v(*p).iter().zip(steps).map(|(p, step)| p * (1.0 - lr * decay) - step).collect(), m, second]
        }
        Op::Update(Update::RmsProp { p, g, v: second, b, scalars }) => {
            let [lr, alpha, momentum, eps, bound, low, high] = v(*scalars)[..] else { panic!("seven scalars") };
            let g: Vec<f64> = v(*g).iter().map(|g| g.clamp(-bound, bound)).collect();
            let second: Vec<f64> =
                v(*second).iter().zip(&g).map(|(v, g)| alpha * v + (1.0 - alpha) * g.powi(2)).collect();
            let pushes = g.iter().zip(&second).map(|(g, v)| g / (v.sqrt() + eps));
            let b: Vec<f64> = v(*b).iter().zip(pushes).map(|(b, push)| momentum * b + push).collect();
            vec![v(*p).iter().zip(&b).map(|(p, b)| (p - lr * b).clamp(low, high)).collect(), second, b]
        }
        Op::Update(Update::Nesterov { p, g, b, scalars }) => {
            let [lr, momentum] = v(*scalars)[..] else { panic!("two scalars") };
            let b: Vec<f64> = v(*b).iter().zip(v(*g)).map(|(b, g)| momentum * b + g).collect();
            let directions = v(*g).iter().zip(&b).map(|(g, b)| g + momentum * b);
            vec![v(*p).iter().zip(directions).map(|(p, d)| p - lr * d).collect(), b]
        }
        Op::Update(Update::Noise { counter, shape }) => {
            let (sample, channels) = (shape[1..].iter().product::<usize>(), shape[shape.len() - 1]);
            let draws = ints(*counter).chunks_exact(4).flat_map(|words| {
                let [seed_low, seed_high, draw, _] = std::array::from_fn(|i| u64::from(words[i] as u32));
                let (mut noise, mut drawn) = (Noise::new(Rng::Philox, seed_low | seed_high << 32), vec![0.0; sample]);
                (0..=draw).for_each(|_| noise.normal(&mut drawn));
                let positions = sample / channels;
                (0..sample).map(|i| drawn[i % channels * positions + i / channels].into()).collect::<Vec<f64>>()
            });
            vec![draws.collect()]
        }
        _ => backward::op(program, op, v, ints, round),
    }
}

/// Every output pixel as torch's kernels compute it: taps clamped to the image, or with antialias cut and renormalised.
fn resize(x: &[f64], shape: &[usize], [height, width]: [usize; 2], how: Interpolation) -> Vec<f64> {
    let &[batch, h, w, channels] = shape else { panic!("no image") };
    let cubic = how.filter == Filter::Bicubic;
    let filter = |x: f64, a: f64| match x.abs() {
        x if !cubic => (1.0 - x).max(0.0),
        x if x <= 1.0 => (a + 2.0) * x.powi(3) - (a + 3.0) * x.powi(2) + 1.0,
        x if x < 2.0 => a * x.powi(3) - 5.0 * a * x.powi(2) + 8.0 * a * x - 4.0 * a,
        _ => 0.0,
    };
    let taps = |from: usize, to: usize, o: usize| -> Vec<(usize, f64)> {
        let scale = from as f64 / to as f64;
        let center = scale * (o as f64 + 0.5);
        if !how.antialias {
            let real = if cubic { center - 0.5 } else { (center - 0.5).max(0.0) };
            let (first, count) = if cubic { (real.floor() - 1.0, 4) } else { (real.floor(), 2) };
            let tap = |j: f64| (j.clamp(0.0, from as f64 - 1.0) as usize, filter(j - real, -0.75));
            return (0..count).map(|k| tap(first + k as f64)).collect();
        }
        let support = if cubic { 2.0 } else { 1.0 } * scale.max(1.0);
        let first = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(from);
        let weight = |j: usize| filter((j as f64 - center + 0.5) / scale.max(1.0), -0.5);
        let total: f64 = (first..end).map(weight).sum();
        (first..end).map(|j| (j, weight(j) / total)).collect()
    };
    let mut out = vec![];
    for b in 0..batch {
        for row in 0..height {
            for column in 0..width {
                let (vertical, horizontal) = (taps(h, height, row), taps(w, width, column));
                for c in 0..channels {
                    let pixel = |i: usize, j: usize| x[((b * h + i) * w + j) * channels + c];
                    let line = |i: usize| horizontal.iter().map(|&(j, weight)| weight * pixel(i, j)).sum::<f64>();
                    out.push(vertical.iter().map(|&(i, weight)| weight * line(i)).sum());
                }
            }
        }
    }
    out
}

fn log_sum_exp(row: &[f64]) -> f64 {
    let top = row.iter().cloned().fold(f64::MIN, f64::max);
    top + row.iter().map(|x| (x - top).exp()).sum::<f64>().ln()
}

pub fn activate(x: f64, activation: Activation) -> f64 {
    match activation {
        Activation::None => x,
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => 0.5 * x * erfc(-x / 2f64.sqrt()),
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Activation::Geglu => panic!("not elementwise"),
    }
}

/// erfc by its series near zero and its continued fraction elsewhere.
pub fn erfc(x: f64) -> f64 {
    if x.abs() < 2.5 {
        let (mut term, mut sum) = (x, x);
        for n in 1..120 {
            term *= -x * x / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        1.0 - 2.0 / std::f64::consts::PI.sqrt() * sum
    } else {
        let z = x.abs();
        let fraction = (1..200).rev().fold(z, |f, n| z + n as f64 / 2.0 / f);
        let tail = (-z * z).exp() / std::f64::consts::PI.sqrt() / fraction;
        if x > 0.0 { tail } else { 2.0 - tail }
    }
}

fn gemm(g: &Gemm, w_shape: &[usize], x: &[f64], w: &[f64], bias: Option<&[f64]>, residual: Option<&[f64]>) -> Vec<f64> {
    let (k, n) = (w_shape[0], w_shape[1]);
    let mut out = vec![];
    for x in x.chunks_exact(k) {
        let product = |j: usize| (0..k).map(|i| x[i] * w[i * n + j]).sum::<f64>() + bias.map_or(0.0, |b| b[j]);
        if g.activation == Activation::Geglu {
            out.extend((0..n / 2).map(|j| product(j) * activate(product(j + n / 2), Activation::Gelu)));
        } else {
            out.extend((0..n).map(|j| activate(product(j), g.activation)));
        }
    }
    if let Some(residual) = residual {
        out.iter_mut().zip(residual).for_each(|(out, r)| *out += r);
    }
    out
}

#[allow(clippy::too_many_arguments)]
fn conv2d(
    c: &Conv2d,
    x_shape: &[usize],
    w_shape: &[usize],
    x: &[f64],
    w: &[f64],
    bias: Option<&[f64]>,
    shift: Option<(&[f64], &[usize], usize)>,
    residual: Option<&[f64]>,
) -> Vec<f64> {
    let (&[batch, h, wide, i], &[kh, kw, _, o]) = (x_shape, w_shape) else { panic!("no image") };
    let [top, left, bottom, right] = c.padding;
    let (ho, wo) = ((h + top + bottom - kh) / c.stride + 1, (wide + left + right - kw) / c.stride + 1);
    let mut out = vec![];
    for b in 0..batch {
        for y in 0..ho {
            for xo in 0..wo {
                for channel in 0..o {
                    let mut sum = bias.map_or(0.0, |b| b[channel]);
                    if let Some((values, shape, at)) = shift {
                        sum += values[if shape[0] == 1 { 0 } else { b } * shape[1] + at + channel];
                    }
                    for ky in 0..kh {
                        for kx in 0..kw {
                            let (iy, ix) = (y * c.stride + ky, xo * c.stride + kx);
                            if iy < top || ix < left || iy - top >= h || ix - left >= wide {
                                continue;
                            }
                            let pixel = ((b * h + iy - top) * wide + ix - left) * i;
                            let tap = (ky * kw + kx) * i;
                            sum += (0..i).map(|i| x[pixel + i] * w[(tap + i) * o + channel]).sum::<f64>();
                        }
                    }
                    out.push(sum + residual.map_or(0.0, |r| r[out.len()]));
                }
            }
        }
    }
    out
}

fn attention(
    a: &Attention,
    [q_shape, k_shape, v_shape]: [&[usize]; 3],
    [q, k, v]: [&[f64]; 3],
    store: impl Fn(f64) -> f64,
) -> Vec<Vec<f64>> {
    let tokens = |s: &[usize]| s[1..s.len() - 1].iter().product::<usize>();
    let (batch, queries, keys) = (q_shape[0], tokens(q_shape), tokens(k_shape));
    let [qw, kw, vw] = [q_shape, k_shape, v_shape].map(|s| s[s.len() - 1]);
    let (heads, dim) = (a.heads, a.head_dim);
    let mut out = vec![0.0; batch * queries * heads * dim];
    let mut lse = vec![0.0; batch * heads * queries];
    for b in 0..batch {
        for head in 0..heads {
            for row in 0..queries {
                let q = &q[(b * queries + row) * qw + a.q.at + head * dim..][..dim];
                let visible = if a.causal { row + 1 + keys - queries } else { keys };
                let score = |key: usize| {
                    let k = &k[(b * keys + key) * kw + a.k.at + head * dim..][..dim];
                    q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (dim as f64).sqrt()
                };
                let scores: Vec<f64> = (0..visible).map(score).collect();
                let top = scores.iter().cloned().fold(f64::MIN, f64::max);
                let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                lse[(b * heads + head) * queries + row] = top + total.ln();
                for (key, score) in scores.iter().enumerate() {
                    let p = store((score - top).exp() / total);
                    for d in 0..dim {
                        out[((b * queries + row) * heads + head) * dim + d] +=
                            p * v[(b * keys + key) * vw + a.v.at + head * dim + d];
                    }
                }
            }
        }
    }
    vec![out, lse]
}

/// Normalises within sets; `member` gives an element's set and channel.
fn norm(
    x: &[f64],
    sets: usize,
    member: impl Fn(usize) -> (usize, usize),
    gamma: &[f64],
    beta: &[f64],
    eps: f64,
) -> Vec<Vec<f64>> {
    let count = (x.len() / sets) as f64;
    let (mut mean, mut variance) = (vec![0.0; sets], vec![0.0; sets]);
    x.iter().enumerate().for_each(|(i, x)| mean[member(i).0] += x / count);
    x.iter().enumerate().for_each(|(i, x)| variance[member(i).0] += (x - mean[member(i).0]).powi(2) / count);
    let rstd: Vec<f64> = variance.iter().map(|v| 1.0 / (v + eps).sqrt()).collect();
    let y = |(i, x): (usize, &f64)| {
        let (set, channel) = member(i);
        (x - mean[set]) * rstd[set] * gamma[channel] + beta[channel]
    };
    vec![x.iter().enumerate().map(y).collect(), mean, rstd]
}

fn elementwise<'a>(
    e: &Elementwise,
    shape: &impl Fn(ValueId) -> &'a [usize],
    v: &impl Fn(ValueId) -> &'a [f64],
) -> Vec<f64> {
    match *e {
        Elementwise::Activate { x, activation } => v(x).iter().map(|&x| activate(x, activation)).collect(),
        Elementwise::Geglu { x } => {
            let width = shape(x).last().unwrap() / 2;
            let row =
                |x: &[f64]| (0..width).map(|i| x[i] * activate(x[width + i], Activation::Gelu)).collect::<Vec<_>>();
            v(x).chunks_exact(2 * width).flat_map(row).collect()
        }
        Elementwise::Map { x, f } => {
            let f = |x: &f64| match f {
                Scalar::Sqrt => x.sqrt(),
                Scalar::Square => x.powi(2),
                Scalar::Ln => x.ln(),
                Scalar::Exp => x.exp(),
                Scalar::Reciprocal => x.recip(),
                Scalar::Spherical => x.clamp(-1.0, 1.0).acos().powi(2) / 2.0,
            };
            v(x).iter().map(f).collect()
        }
        Elementwise::Mul { a, b } => v(a).iter().zip(v(b)).map(|(a, b)| a * b).collect(),
        Elementwise::Scale { x, by } => {
            let size = v(x).len() / v(by).len();
            v(x).iter().enumerate().map(|(i, x)| x * v(by)[i / size]).collect()
        }
        Elementwise::ChannelAffine { x, ref scale, ref shift } => {
            let c = scale.len();
            v(x).iter().enumerate().map(|(i, x)| x * scale[i % c] + shift[i % c]).collect()
        }
        Elementwise::Clamp { x, low, high } => v(x).iter().map(|x| x.clamp(low, high)).collect(),
        Elementwise::Detach { x } | Elementwise::Cast { x, .. } => v(x).to_vec(),
        Elementwise::Constant { ref shape, value, .. } => vec![value; shape.iter().product()],
        Elementwise::Spread { x, shape: ref over } => {
            let (width, rows) = (over[over.len() - 1], over.iter().product::<usize>() / v(x).len());
            v(x).chunks_exact(width).flat_map(|row| row.repeat(rows)).collect()
        }
        Elementwise::Columns { x, len } => {
            let width = *shape(x.value).last().unwrap();
            v(x.value).chunks_exact(width).flat_map(|row| row[x.at..x.at + len].to_vec()).collect()
        }
        Elementwise::Add { a, b } => v(a).iter().zip(v(b)).map(|(a, b)| a + b).collect(),
        Elementwise::OuterAdd { a, b } => {
            let width = shape(a)[1];
            let rows = v(a).chunks_exact(width).flat_map(|a| v(b).chunks_exact(width).map(move |b| (a, b)));
            rows.flat_map(|(a, b)| a.iter().zip(b).map(|(a, b)| a + b)).collect()
        }
        Elementwise::Affine { x, scale, shift } => v(x).iter().map(|x| x * scale + shift).collect(),
        Elementwise::Concat { a, b } => {
            let width = |id| *shape(id).last().unwrap();
            let rows = v(a).chunks_exact(width(a)).zip(v(b).chunks_exact(width(b)));
            rows.flat_map(|(a, b)| [a, b].concat()).collect()
        }
        Elementwise::ConcatTokens { a, b } => {
            let sample = |id| v(id).len() / shape(id)[0];
            let samples = v(a).chunks_exact(sample(a)).zip(v(b).chunks_exact(sample(b)));
            samples.flat_map(|(a, b)| [a, b].concat()).collect()
        }
        Elementwise::TokenRows { x, start, len } => {
            let row: usize = shape(x)[2..].iter().product();
            v(x).chunks_exact(shape(x)[1] * row).flat_map(|x| x[start * row..][..len * row].to_vec()).collect()
        }
        Elementwise::Repeat { x, times } => v(x).repeat(times),
        Elementwise::Slice { x, start, len } => {
            let row = v(x).len() / shape(x)[0];
            v(x)[start * row..(start + len) * row].to_vec()
        }
        _ => panic!("no plain loops for {e:?}"),
    }
}
