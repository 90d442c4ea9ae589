//! A second opinion on what a program means: every op as plain loops in f64, written from the formulas in `program`.

use rarebit::program::*;
use std::collections::HashMap;

/// Contents of the named buffers.
#[derive(Clone, Debug, Default)]
pub struct Buffers {
    pub floats: HashMap<String, Vec<f64>>,
    pub ints: HashMap<String, Vec<i32>>,
}

/// All values of a program, by index (empty for i32 inputs).
pub fn evaluate(program: &Program, buffers: &Buffers) -> Vec<Vec<f64>> {
    let mut values: Vec<Vec<f64>> = vec![vec![]; program.values.len()];
    for (value, slot) in program.values.iter().zip(&mut values) {
        if let Origin::Input(name) = &value.origin {
            *slot = buffers.floats.get(name).cloned().unwrap_or_default();
        }
    }
    for node in &program.nodes {
        let made = op(program, &node.op, &values, buffers);
        for (id, value) in node.outputs.iter().zip(made) {
            assert_eq!(value.len(), program.value(*id).len(), "{}", program.show_op(&node.op));
            values[id.index()] = value;
        }
    }
    values
}

fn op(program: &Program, op: &Op, values: &[Vec<f64>], buffers: &Buffers) -> Vec<Vec<f64>> {
    let v = |id: ValueId| &values[id.index()][..];
    let shape = |id: ValueId| program.shape(id);
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
            attention(a, shape(a.q.value), shape(a.k.value), shape(a.v.value), v(a.q.value), v(a.k.value), v(a.v.value))
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
        Op::Embedding(Embedding::Tokens { ids, table, positions }) => {
            let (length, width) = (shape(*ids)[1], shape(*table)[1]);
            let mut out = vec![];
            for (i, &id) in ints(*ids).iter().enumerate() {
                for c in 0..width {
                    out.push(v(*table)[id as usize * width + c] + v(*positions)[i % length * width + c]);
                }
            }
            vec![out]
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
            let mut out = vec![0.0; v(terms[0]).len()];
            for (&term, &c) in terms.iter().zip(v(*coefficients)).filter(|(_, c)| **c != 0.0) {
                out.iter_mut().zip(v(term)).for_each(|(out, x)| *out += c * x);
            }
            vec![out]
        }
    }
}

pub fn activate(x: f64, activation: Activation) -> f64 {
    match activation {
        Activation::None => x,
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => 0.5 * x * erfc(-x / 2f64.sqrt()),
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
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
    q_shape: &[usize],
    k_shape: &[usize],
    v_shape: &[usize],
    q: &[f64],
    k: &[f64],
    v: &[f64],
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
                let visible = if a.causal { row + 1 } else { keys };
                let score = |key: usize| {
                    let k = &k[(b * keys + key) * kw + a.k.at + head * dim..][..dim];
                    q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (dim as f64).sqrt()
                };
                let scores: Vec<f64> = (0..visible).map(score).collect();
                let top = scores.iter().cloned().fold(f64::MIN, f64::max);
                let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                lse[(b * heads + head) * queries + row] = top + total.ln();
                for (key, score) in scores.iter().enumerate() {
                    let p = (score - top).exp() / total;
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
        Elementwise::Repeat { x, times } => v(x).repeat(times),
        Elementwise::Slice { x, start, len } => {
            let row = v(x).len() / shape(x)[0];
            v(x)[start * row..(start + len) * row].to_vec()
        }
    }
}
