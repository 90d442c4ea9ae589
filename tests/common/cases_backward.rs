//! Cases of backward ops; the forward op that makes what they read goes first.

use super::{Case, Inputs};
use rarebit::program::*;

pub fn attentions() -> Vec<Case> {
    let mut cases = vec![];
    // With 1100 keys: several chunks in a task and several tasks of a head.
    let shapes = [
        (1, 1, 1, 1),
        (40, 50, 2, 24),
        (5, 77, 2, 40),
        (77, 77, 3, 64),
        (130, 130, 2, 80),
        (33, 33, 2, 104),
        (64, 300, 1, 160),
        (19, 19, 1, 512),
        (5, 13, 2, 64),
        (70, 77, 2, 64),
        (33, 140, 2, 40),
        (100, 110, 1, 168),
        (97, 1100, 9, 4),
        (1100, 1100, 1, 8),
    ];
    for (queries, keys, heads, head_dim) in shapes {
        for causal in [false, true] {
            if causal && queries > keys {
                continue;
            }
            for (to_q, to_kv) in [(true, true), (true, false), (false, true)] {
                let name = format!("attention_backward {queries}x{keys} heads {heads}x{head_dim} causal {causal}");
                cases.push(Case::new(format!("{name} to q {to_q} to kv {to_kv}"), move |f| {
                    let width = heads * head_dim;
                    let cols = |value, at| Cols { value, at };
                    let (q, k, v) = if queries == keys {
                        let qkv = f.batched("qkv", &[queries, 3 * width]);
                        (cols(qkv, 0), cols(qkv, width), cols(qkv, 2 * width))
                    } else {
                        let kv = f.batched("kv", &[keys, 2 * width + 3]);
                        let q = f.batched("q", &[queries, width + 5]);
                        (cols(q, 5), cols(kv, 1), cols(kv, width + 3))
                    };
                    let forward = Attention { q, k, v, heads, head_dim, causal };
                    let made = f.b.push(Op::Attention(forward.clone()));
                    let (out, lse) = (made[0], made[1]);
                    let d_out = f.batched("d_out", &[queries, width]);
                    f.b.push(Op::AttentionBackward(AttentionBackward { forward, out, lse, d_out, to_q, to_kv }))
                }));
            }
        }
    }
    cases
}

const SHAPES: [(&[usize], usize); 7] = [
    (&[1, 1], 1),
    (&[3, 5, 6], 3),
    (&[8, 8, 64], 32),
    (&[7, 9, 40], 8),
    (&[17, 32], 32),
    (&[50, 30, 96], 32),
    (&[4, 4, 2560], 32),
];

pub fn norms() -> Vec<Case> {
    let mut cases = vec![];
    for (rest, groups) in SHAPES {
        for silu in [false, true] {
            cases.push(Case::new(format!("group_norm_backward {rest:?} groups {groups} silu {silu}"), move |f| {
                let (x, gamma, beta) = operands(f, rest);
                let made = f.b.push(Op::Norm(Norm::Group { x, gamma, beta, groups, eps: 1e-5, silu }));
                let (mean, rstd, d_y) = (made[1], made[2], f.batched("d_y", rest));
                f.b.push(Op::Norm(Norm::GroupBackward { x, d_y, gamma, beta, mean, rstd, groups, silu }))
            }));
        }
        cases.push(Case::new(format!("layer_norm_backward {rest:?}"), move |f| {
            let (x, gamma, beta) = operands(f, rest);
            let made = f.b.push(Op::Norm(Norm::Layer { x, gamma, beta, eps: 1e-5 }));
            let (mean, rstd, d_y) = (made[1], made[2], f.batched("d_y", rest));
            f.b.push(Op::Norm(Norm::LayerBackward { x, d_y, gamma, mean, rstd }))
        }));
    }
    for width in [1, 3, 40, 1100] {
        cases.push(Case::new(format!("softmax_backward {width}"), move |f| {
            let (x, d_y) = (f.batched("x", &[5, width]), f.batched("d_y", &[5, width]));
            let y = f.b.push(Op::Rowwise(Rowwise::Softmax { x }))[0];
            f.b.push(Op::Rowwise(Rowwise::SoftmaxBackward { y, d_y }))
        }));
        for eps in [1e-12, 3.0] {
            cases.push(Case::new(format!("unit_backward {width} eps {eps}"), move |f| {
                let (x, d_y) = (f.batched("x", &[5, width]), f.batched("d_y", &[5, width]));
                let made = f.b.push(Op::Rowwise(Rowwise::Unit { x, eps }));
                f.b.push(Op::Rowwise(Rowwise::UnitBackward { y: made[0], norm: made[1], d_y, eps }))
            }));
        }
        cases.push(Case::new(format!("cross_entropy_backward {width}"), move |f| {
            let logits = f.batched("logits", &[5, width]);
            let targets = f.ints("targets", &[5], |i| (i * 7 % width) as i32 - i32::from(i % 4 == 3) * 10_000);
            let lse = f.b.push(Op::Rowwise(Rowwise::CrossEntropy { logits, targets }))[1];
            let d_loss = f.batched_accumulator("d_loss", &[5]);
            f.b.push(Op::Rowwise(Rowwise::CrossEntropyBackward { logits, targets, lse, d_loss }))
        }));
    }
    cases
}

/// Gradients that sum over the batch.
pub fn across_samples() -> Vec<Case> {
    let case = |(rest, _): (&'static [usize], usize)| {
        Case::new(format!("layer_norm_backward_affine {rest:?}"), move |f| {
            let (x, gamma, beta) = operands(f, rest);
            let made = f.b.push(Op::Norm(Norm::Layer { x, gamma, beta, eps: 1e-5 }));
            let (mean, rstd, d_y) = (made[1], made[2], f.batched("d_y", rest));
            f.b.push(Op::Norm(Norm::LayerBackwardAffine { x, d_y, mean, rstd }))
        })
    };
    SHAPES.into_iter().map(case).collect()
}

/// `x`, `gamma` and `beta` of a norm.
pub fn operands(f: &mut Inputs, rest: &[usize]) -> (ValueId, ValueId, ValueId) {
    let c = rest[rest.len() - 1];
    (f.batched("x", rest), f.shared("gamma", &[c]), f.shared("beta", &[c]))
}
