//! Matrix products and their gradients.

use super::{Activation, OpKind, show_optional};
use crate::program::infer::{Infer, Types, ensure};
use crate::program::{Program, ValueId};

/// `activation(x w + bias) + residual`; `x [.., K]`, `w [K, N]`, `bias [N]`, `residual` like the output `[.., N]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Gemm {
    pub x: ValueId,
    pub w: ValueId,
    pub bias: Option<ValueId>,
    pub residual: Option<ValueId>,
    pub activation: Activation,
}

#[derive(Clone, Debug, PartialEq)]
pub enum GemmBackward {
    /// To the input: `d_y wᵀ + residual`; `d_y [.., N]`, `w [K, N]`, `residual` and output `[.., K]`. In a forward it is the
    /// product of a head tied to an embedding's table.
    Input { d_y: ValueId, w: ValueId, residual: Option<ValueId> },
    /// To the weight: `xᵀ d_y` over all rows; `x [.., K]`, `d_y [.., N]` → `[K, N]`.
    Weight { x: ValueId, d_y: ValueId },
}

impl OpKind for Gemm {
    fn operands(&mut self) -> Vec<&mut ValueId> {
        [Some(&mut self.x), Some(&mut self.w), self.bias.as_mut(), self.residual.as_mut()]
            .into_iter()
            .flatten()
            .collect()
    }

    fn infer(&self, cx: &Infer) -> Result<Types, String> {
        let (x, w) = (cx.float(self.x, 2)?, cx.matrix(self.w)?);
        let (k, mut n) = (w[0], w[1]);
        ensure!(x[x.len() - 1] == k, "x {x:?} does not fit weight [K, N] = {w:?}");
        if let Some(bias) = self.bias {
            cx.exactly("bias", bias, &[n])?;
        }
        if self.activation == Activation::Geglu {
            ensure!(n % 2 == 0, "GEGLU needs an even number of columns, weight is {w:?}");
            n /= 2;
        }
        let mut out = x.to_vec();
        out[x.len() - 1] = n;
        if let Some(residual) = self.residual {
            cx.exactly("residual", residual, &out)?;
        }
        Ok(cx.one(out))
    }

    fn alias(&self) -> Option<ValueId> {
        self.residual
    }

    fn macs(&self, p: &Program, _: &[ValueId]) -> u64 {
        (p.value(self.x).len() * p.shape(self.w)[1]) as u64
    }

    fn show(&self, p: &Program) -> String {
        let activation =
            if self.activation == Activation::None { String::new() } else { format!(" {:?}", self.activation) };
        let (bias, residual) = (show_optional(p, "+", self.bias), show_optional(p, "residual", self.residual));
        format!("gemm {} {}{bias}{activation}{residual}", p.show(self.x), p.show(self.w))
    }
}

impl OpKind for GemmBackward {
    fn operands(&mut self) -> Vec<&mut ValueId> {
        match self {
            GemmBackward::Input { d_y, w, residual } => {
                [Some(d_y), Some(w), residual.as_mut()].into_iter().flatten().collect()
            }
            GemmBackward::Weight { x, d_y } => vec![x, d_y],
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Types, String> {
        match *self {
            GemmBackward::Input { d_y, w, residual } => {
                let (d_y, w) = (cx.float(d_y, 2)?, cx.matrix(w)?);
                ensure!(d_y[d_y.len() - 1] == w[1], "d_y {d_y:?} does not fit weight [K, N] = {w:?}");
                let mut out = d_y.to_vec();
                out[d_y.len() - 1] = w[0];
                if let Some(residual) = residual {
                    cx.exactly("residual", residual, &out)?;
                }
                Ok(cx.one(out))
            }
            GemmBackward::Weight { x, d_y } => {
                let (x, d_y) = (cx.float(x, 2)?, cx.float(d_y, 2)?);
                let (rows, last) = (x.len() - 1, d_y.len() - 1);
                ensure!(x[..rows] == d_y[..last], "x {x:?} and d_y {d_y:?} differ before the last dim");
                Ok(cx.one(vec![x[rows], d_y[last]]))
            }
        }
    }

    fn alias(&self) -> Option<ValueId> {
        match self {
            GemmBackward::Input { residual, .. } => *residual,
            GemmBackward::Weight { .. } => None,
        }
    }

    fn macs(&self, p: &Program, _: &[ValueId]) -> u64 {
        match *self {
            GemmBackward::Input { d_y, w, .. } => (p.value(d_y).len() * p.shape(w)[0]) as u64,
            GemmBackward::Weight { x, d_y } => {
                let d_y = p.shape(d_y);
                (p.value(x).len() * d_y[d_y.len() - 1]) as u64
            }
        }
    }

    fn show(&self, p: &Program) -> String {
        match *self {
            GemmBackward::Input { d_y, w, residual } => {
                format!("gemm_backward_input {} {}{}", p.show(d_y), p.show(w), show_optional(p, "residual", residual))
            }
            GemmBackward::Weight { x, d_y } => format!("gemm_backward_weight {} {}", p.show(x), p.show(d_y)),
        }
    }
}
