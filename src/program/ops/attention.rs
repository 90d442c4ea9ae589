//! Fused attention and its gradient from the saved log-sum-exp.

use super::{OpKind, show_cols};
use crate::program::infer::{Infer, Types, ensure};
use crate::program::{Cols, Program, ValueId};

/// `softmax(q kᵀ / √head_dim) v` per head. `q` columns `[B, .., heads·head_dim]`, `k` and `v` columns `[B, .., heads·head_dim]`.
/// Causal: the last query sees the last key, so query `i` of `Tq ≤ Tk` sees keys `0 ..= i + Tk - Tq`.
/// Outputs: `out` shaped like `q`'s rows `[.., heads·head_dim]`, and the log-sum-exp of the scaled scores `[B, heads, Tq]`,
/// of the accumulator type.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    pub q: Cols,
    pub k: Cols,
    pub v: Cols,
    pub heads: usize,
    pub head_dim: usize,
    pub causal: bool,
}

/// Gradients of [`Attention`] from its inputs, its two outputs and `d_out` (like `out`). Outputs, in this order and only where
/// asked for: `d_q` like `q`'s rows, `d_k` and `d_v` like `k`'s rows, each `heads·head_dim` wide.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionBackward {
    pub forward: Attention,
    pub out: ValueId,
    pub lse: ValueId,
    pub d_out: ValueId,
    /// Whether `d_q` is an output, and whether `d_k` and `d_v` are.
    pub to_q: bool,
    pub to_kv: bool,
}

fn tokens(shape: &[usize]) -> usize {
    shape[1..shape.len() - 1].iter().product()
}

impl OpKind for Attention {
    fn operands(&mut self) -> Vec<&mut ValueId> {
        vec![&mut self.q.value, &mut self.k.value, &mut self.v.value]
    }

    fn infer(&self, cx: &Infer) -> Result<Types, String> {
        let width = self.heads * self.head_dim;
        ensure!(width > 0, "no heads");
        let rows = |name: &str, cols: Cols| {
            let s = cx.float(cols.value, 3)?;
            ensure!(cols.at + width <= s[s.len() - 1], "{name} {s:?} has no columns {}..{}", cols.at, cols.at + width);
            Ok(s)
        };
        let (q, k, v) = (rows("q", self.q)?, rows("k", self.k)?, rows("v", self.v)?);
        ensure!(q[0] == k[0] && q[0] == v[0] && tokens(k) == tokens(v), "q {q:?}, k {k:?}, v {v:?} do not fit");
        ensure!(
            !self.causal || tokens(q) <= tokens(k),
            "causal attention with more queries than keys: q {q:?}, k {k:?}"
        );
        let mut out = q.to_vec();
        out[q.len() - 1] = width;
        Ok(vec![cx.of(out), cx.accumulator(vec![q[0], self.heads, tokens(q)])])
    }

    fn macs(&self, p: &Program, outputs: &[ValueId]) -> u64 {
        (2 * p.value(outputs[0]).len() * tokens(p.shape(self.k.value))) as u64
    }

    fn show(&self, p: &Program) -> String {
        let causal = if self.causal { " causal" } else { "" };
        let [q, k, v] = [self.q, self.k, self.v].map(|cols| show_cols(p, cols));
        format!("attention q {q} k {k} v {v} heads {}x{}{causal}", self.heads, self.head_dim)
    }
}

impl OpKind for AttentionBackward {
    fn operands(&mut self) -> Vec<&mut ValueId> {
        let mut ids = self.forward.operands();
        ids.extend([&mut self.out, &mut self.lse, &mut self.d_out]);
        ids
    }

    fn infer(&self, cx: &Infer) -> Result<Types, String> {
        let forward = self.forward.infer(cx)?;
        cx.exactly("out", self.out, &forward[0].0)?;
        cx.statistic("lse", self.lse, &forward[1].0)?;
        cx.exactly("d_out", self.d_out, &forward[0].0)?;
        ensure!(self.to_q || self.to_kv, "a gradient to nothing");
        let like = |value| {
            let mut shape = cx.shape(value).to_vec();
            let last = shape.len() - 1;
            shape[last] = self.forward.heads * self.forward.head_dim;
            cx.of(shape)
        };
        let (q, k, v) = (like(self.forward.q.value), like(self.forward.k.value), like(self.forward.v.value));
        Ok([(self.to_q, q), (self.to_kv, k), (self.to_kv, v)]
            .into_iter()
            .filter(|(wanted, _)| *wanted)
            .map(|(_, t)| t)
            .collect())
    }

    /// Products of score tiles: scores and their gradient, and one for each output.
    fn macs(&self, p: &Program, _: &[ValueId]) -> u64 {
        let products = 2 + usize::from(self.to_q) + 2 * usize::from(self.to_kv);
        (products * p.value(self.out).len() * tokens(p.shape(self.forward.k.value))) as u64
    }

    fn show(&self, p: &Program) -> String {
        let to = match (self.to_q, self.to_kv) {
            (true, true) => "",
            (true, false) => " to q",
            (false, _) => " to k v",
        };
        format!("{} of {}{to}", self.forward.show(p).replacen("attention", "attention_backward", 1), p.show(self.d_out))
    }
}
