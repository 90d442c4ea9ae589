//! Cases at shapes of Stable Diffusion, or as near to them as a host can compute: what the kernels for large products and long rows
//! have that no small case asks for, as more tiles than multiprocessors, tiles of 160 columns, and rings that go round.

use super::cases::{Case, Inputs};
use super::products;
use rarebit::program::*;

/// Self- and cross-attention of rows that are aligned, each head dimension with at least five tiles of keys and a part of one; norms.
pub fn ops() -> Vec<Case> {
    let attention = |queries: usize, keys: usize, heads: usize, head_dim: usize| {
        Case::new(format!("real attention {queries}x{keys} heads {heads}x{head_dim}"), move |f| {
            let forward = attention_of(f, queries, keys, heads, head_dim);
            f.b.push(Op::Attention(forward))
        })
    };
    let backward = |queries: usize, keys: usize, heads: usize, head_dim: usize| {
        Case::new(format!("real attention_backward {queries}x{keys} heads {heads}x{head_dim}"), move |f| {
            let forward = attention_of(f, queries, keys, heads, head_dim);
            let made = f.b.push(Op::Attention(forward.clone()));
            let (out, lse) = (made[0], made[1]);
            let d_out = f.batched("d_out", &[queries, heads * head_dim]);
            let op = AttentionBackward { forward, out, lse, d_out, to_q: true, to_kv: true };
            f.b.push(Op::AttentionBackward(op))
        })
    };
    let cross = [40, 64, 80, 160].map(|head_dim| attention(256, 700, 2, head_dim));
    let others = [
        attention(4096, 4096, 1, 40),
        attention(4096, 77, 2, 40),
        attention(1024, 1024, 1, 80),
        attention(256, 256, 2, 160),
        backward(1024, 1024, 1, 40),
        backward(1024, 77, 2, 80),
        Case::new("real group_norm 64x64x320", |f| {
            let (x, gamma, beta) =
                (f.batched("x", &[64, 64, 320]), f.shared("gamma", &[320]), f.shared("beta", &[320]));
            f.b.push(Op::Norm(Norm::Group { x, gamma, beta, groups: 32, eps: 1e-5, silu: true }))
        }),
        Case::new("real layer_norm 4096x320", |f| {
            let (x, gamma, beta) = (f.batched("x", &[4096, 320]), f.shared("gamma", &[320]), f.shared("beta", &[320]));
            f.b.push(Op::Norm(Norm::Layer { x, gamma, beta, eps: 1e-5 }))
        }),
    ];
    cross.into_iter().chain(others).collect()
}

/// Queries that are columns of a fused projection where there are as many keys, else keys and values that are.
fn attention_of(f: &mut Inputs, queries: usize, keys: usize, heads: usize, head_dim: usize) -> Attention {
    let width = heads * head_dim;
    let (q, k, v) = if queries == keys {
        let qkv = f.batched("qkv", &[queries, 3 * width]);
        let cols = |at| Cols { value: qkv, at };
        (cols(0), cols(width), cols(2 * width))
    } else {
        let kv = f.batched("kv", &[keys, 2 * width]);
        (f.batched("q", &[queries, width]).into(), Cols { value: kv, at: 0 }, Cols { value: kv, at: width })
    };
    Attention { q, k, v, heads, head_dim, causal: false }
}

/// A product, which of its programs (`products::programs`), and whether its weight is a checkpoint's.
pub struct Product {
    pub case: products::Case,
    pub program: &'static str,
    pub held: bool,
}

/// The UNet's and the VAE's. 133 tiles of 128 rows are more than a round of 132 blocks, of 160 columns by the tile as wide; nine stages
/// go round every ring.
pub fn products() -> Vec<Product> {
    use products::Case::{Conv, Input};
    let conv = |size: usize, channels| Conv([size; 2], channels, [3, 3], 1, [1; 4]);
    let forward = "forward None";
    let (wide, narrow) = (Input([17_024, 576, 160]), Input([17_024, 576, 128]));
    let product = |case, program, held| Product { case, program, held };
    vec![
        product(wide.clone(), forward, true),
        product(wide, forward, false),
        product(narrow.clone(), forward, true),
        product(narrow, forward, false),
        product(Input([4096, 320, 2560]), "forward Geglu", true),
        product(Input([4096, 320, 320]), "backward", true),
        product(conv(64, [320, 320]), forward, true),
        product(conv(32, [640, 320]), "backward", true),
        // Split.
        product(Input([256, 1280, 1280]), forward, true),
        product(conv(8, [1280, 1280]), forward, true),
    ]
}
