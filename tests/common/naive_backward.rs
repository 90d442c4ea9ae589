//! Backward ops as plain loops in f64: derivatives as the definitions give them, no sum rearranged.

use rarebit::program::*;

/// The outputs of a backward op; `v` and `ints` give the values of its operands, `round` what storage makes of a number.
pub fn op<'a>(
    program: &Program,
    op: &Op,
    v: impl Fn(ValueId) -> &'a [f64],
    ints: impl Fn(ValueId) -> &'a [i32],
    round: &impl Fn(DType, f64) -> f64,
) -> Vec<Vec<f64>> {
    let width = |id: ValueId| program.shape(id)[program.shape(id).len() - 1];
    match *op {
        Op::AttentionBackward(ref a) => attention(program, a, v, |x| round(program.value(a.d_out).dtype, x)),
        Op::Norm(Norm::GroupBackward { x, d_y, gamma, beta, mean, rstd, groups, silu }) => {
            let (channels, sample) = (width(x), v(x).len() / program.shape(x)[0]);
            let set = |i: usize| (i / sample * groups + i % channels / (channels / groups), i % channels);
            let hat = |i: usize| (v(x)[i] - v(mean)[set(i).0]) * v(rstd)[set(i).0];
            let slope = |i: usize| {
                let z = hat(i) * v(gamma)[set(i).1] + v(beta)[set(i).1];
                let s = 1.0 / (1.0 + (-z).exp());
                if silu { s + z * s * (1.0 - s) } else { 1.0 }
            };
            let d_hat: Vec<f64> = (0..v(x).len()).map(|i| v(d_y)[i] * slope(i) * v(gamma)[set(i).1]).collect();
            vec![normalised(v(x), &d_hat, v(mean), v(rstd), |i| set(i).0)]
        }
        Op::Norm(Norm::LayerBackward { x, d_y, gamma, mean, rstd }) => {
            let width = width(x);
            let d_hat: Vec<f64> = v(d_y).iter().enumerate().map(|(i, d)| d * v(gamma)[i % width]).collect();
            vec![normalised(v(x), &d_hat, v(mean), v(rstd), |i| i / width)]
        }
        Op::Norm(Norm::LayerBackwardAffine { x, d_y, mean, rstd }) => {
            let width = width(x);
            let (mut d_gamma, mut d_beta) = (vec![0.0; width], vec![0.0; width]);
            for (i, d) in v(d_y).iter().enumerate() {
                d_gamma[i % width] += d * (v(x)[i] - v(mean)[i / width]) * v(rstd)[i / width];
                d_beta[i % width] += d;
            }
            vec![d_gamma, d_beta]
        }
        Op::Rowwise(Rowwise::SoftmaxBackward { y, d_y }) => {
            let rows = v(y).chunks_exact(width(y)).zip(v(d_y).chunks_exact(width(y)));
            let row = |(y, d_y): (&[f64], &[f64])| {
                let jacobian = |i: usize, j: usize| y[i] * (f64::from(i == j) - y[j]);
                (0..y.len()).map(|i| (0..y.len()).map(|j| jacobian(i, j) * d_y[j]).sum()).collect::<Vec<f64>>()
            };
            vec![rows.flat_map(row).collect()]
        }
        Op::Rowwise(Rowwise::UnitBackward { y, norm, d_y, eps }) => {
            let rows = v(y).chunks_exact(width(y)).zip(v(d_y).chunks_exact(width(y))).zip(v(norm));
            let row = |((y, d_y), &norm): ((&[f64], &[f64]), &f64)| {
                let along: f64 = if norm < eps { 0.0 } else { y.iter().zip(d_y).map(|(y, d)| y * d).sum() };
                y.iter().zip(d_y).map(|(y, d)| (d - along * y) / norm.max(eps)).collect::<Vec<f64>>()
            };
            vec![rows.flat_map(row).collect()]
        }
        Op::Rowwise(Rowwise::CrossEntropyBackward { logits, targets, lse, d_loss }) => {
            let width = width(logits);
            let one = |(i, x): (usize, &f64)| {
                let (row, target) = (i / width, ints(targets)[i / width]);
                let hit = f64::from(target == (i % width) as i32);
                if target < 0 { 0.0 } else { v(d_loss)[row] * ((x - v(lse)[row]).exp() - hit) }
            };
            vec![v(logits).iter().enumerate().map(one).collect()]
        }
        _ => panic!("no plain loops for {}", program.show_op(op)),
    }
}

/// Gradient through `x̂ = (x - mean) rstd` within sets.
fn normalised(x: &[f64], d_hat: &[f64], mean: &[f64], rstd: &[f64], set: impl Fn(usize) -> usize) -> Vec<f64> {
    let count = (x.len() / mean.len()) as f64;
    let hat = |i: usize| (x[i] - mean[set(i)]) * rstd[set(i)];
    let (mut plain, mut along) = (vec![0.0; mean.len()], vec![0.0; mean.len()]);
    for (i, d) in d_hat.iter().enumerate() {
        plain[set(i)] += d / count;
        along[set(i)] += d * hat(i) / count;
    }
    (0..x.len()).map(|i| rstd[set(i)] * (d_hat[i] - plain[set(i)] - hat(i) * along[set(i)])).collect()
}

fn attention<'a>(
    program: &Program,
    a: &AttentionBackward,
    v: impl Fn(ValueId) -> &'a [f64],
    store: impl Fn(f64) -> f64,
) -> Vec<Vec<f64>> {
    let Attention { q, k, v: value, heads, head_dim: dim, causal } = a.forward;
    let tokens = |s: &[usize]| s[1..s.len() - 1].iter().product::<usize>();
    let (q_shape, k_shape) = (program.shape(q.value), program.shape(k.value));
    let (batch, queries, keys) = (q_shape[0], tokens(q_shape), tokens(k_shape));
    let row = |cols: Cols, row: usize, head: usize| {
        let width = program.shape(cols.value)[program.shape(cols.value).len() - 1];
        &v(cols.value)[row * width + cols.at + head * dim..][..dim]
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let scale = 1.0 / (dim as f64).sqrt();
    let all = heads * dim;
    let (mut d_q, mut d_k) = (vec![0.0; batch * queries * all], vec![0.0; batch * keys * all]);
    let mut d_v = d_k.clone();
    for b in 0..batch {
        for head in 0..heads {
            for query in 0..queries {
                let at = b * queries + query;
                let (q, d_out) = (row(q, at, head), row(a.d_out.into(), at, head));
                let visible = if causal { query + 1 + keys - queries } else { keys };
                let lse = v(a.lse)[(b * heads + head) * queries + query];
                let p: Vec<f64> =
                    (0..visible).map(|key| (scale * dot(q, row(k, b * keys + key, head)) - lse).exp()).collect();
                let d_p: Vec<f64> = (0..visible).map(|key| dot(d_out, row(value, b * keys + key, head))).collect();
                let mean = dot(row(a.out.into(), at, head), d_out);
                for key in 0..visible {
                    let d_s = store(p[key] * (d_p[key] - mean)) * scale;
                    let (to_q, to_k) = (at * all + head * dim, (b * keys + key) * all + head * dim);
                    for d in 0..dim {
                        d_q[to_q + d] += d_s * row(k, b * keys + key, head)[d];
                        d_k[to_k + d] += d_s * q[d];
                        d_v[to_k + d] += store(p[key]) * d_out[d];
                    }
                }
            }
        }
    }
    let all = [(a.to_q, d_q), (a.to_kv, d_k), (a.to_kv, d_v)];
    all.into_iter().filter(|(wanted, _)| *wanted).map(|(_, d)| d).collect()
}
