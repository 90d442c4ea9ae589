//! Convolution and its gradient to the input.

use super::{OpKind, show_cols, show_optional};
use crate::program::infer::{Infer, Types, ensure};
use crate::program::{Cols, Program, ValueId};

/// `conv(x, w) + bias + shift + residual`; `x [B, H, W, I]`, `w [kh, kw, I, O]`, `bias [O]`, `shift` columns `[B or 1, ..O..]`
/// (the time embedding), `residual` like the output `[B, Ho, Wo, O]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Conv2d {
    pub x: ValueId,
    pub w: ValueId,
    pub bias: Option<ValueId>,
    pub shift: Option<Cols>,
    pub residual: Option<ValueId>,
    pub stride: usize,
    /// Zero padding: top, left, bottom, right.
    pub padding: [usize; 4],
}

/// The transposed convolution `d_y → d_x`, plus `residual`: `d_y [B, Ho, Wo, O]`, `w [kh, kw, I, O]` → `[B, H, W, I]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Conv2dBackward {
    pub d_y: ValueId,
    pub w: ValueId,
    /// Like the output.
    pub residual: Option<ValueId>,
    /// `H`, `W` of the input, which stride and padding alone do not tell.
    pub size: [usize; 2],
    pub stride: usize,
    pub padding: [usize; 4],
}

/// Output side of a convolution, if the kernel fits.
fn out_side(side: usize, kernel: usize, stride: usize, before: usize, after: usize) -> Option<usize> {
    Some((side + before + after).checked_sub(kernel)? / stride + 1)
}

impl OpKind for Conv2d {
    fn operands(&mut self) -> Vec<&mut ValueId> {
        let shift = self.shift.as_mut().map(|shift| &mut shift.value);
        [Some(&mut self.x), Some(&mut self.w), self.bias.as_mut(), shift, self.residual.as_mut()]
            .into_iter()
            .flatten()
            .collect()
    }

    fn infer(&self, cx: &Infer) -> Result<Types, String> {
        let (x, w) = (cx.image(self.x)?, cx.image(self.w)?);
        let [top, left, bottom, right] = self.padding;
        ensure!(x[3] == w[2], "x {x:?} does not fit weight [kh, kw, I, O] = {w:?}");
        ensure!(self.stride > 0, "stride 0");
        let sides = (out_side(x[1], w[0], self.stride, top, bottom), out_side(x[2], w[1], self.stride, left, right));
        let (Some(height), Some(width)) = sides else {
            return Err(format!("x {x:?} is smaller than the kernel {w:?}"));
        };
        let out = vec![x[0], height, width, w[3]];
        if let Some(bias) = self.bias {
            cx.exactly("bias", bias, &[w[3]])?;
        }
        if let Some(shift) = self.shift {
            let s = cx.float(shift.value, 2)?;
            ensure!(
                s.len() == 2 && (s[0] == 1 || s[0] == x[0]) && shift.at + w[3] <= s[1],
                "shift {s:?} has no columns {}..{} for batch {}",
                shift.at,
                shift.at + w[3],
                x[0]
            );
        }
        if let Some(residual) = self.residual {
            cx.exactly("residual", residual, &out)?;
        }
        Ok(cx.one(out))
    }

    fn alias(&self) -> Option<ValueId> {
        self.residual
    }

    fn macs(&self, p: &Program, outputs: &[ValueId]) -> u64 {
        let w = p.shape(self.w);
        (p.value(outputs[0]).len() * w[0] * w[1] * w[2]) as u64
    }

    fn show(&self, p: &Program) -> String {
        let shift = self.shift.map(|shift| format!(" shift {}", show_cols(p, shift))).unwrap_or_default();
        let place = format!(" stride {} padding {:?}", self.stride, self.padding);
        let (bias, residual) = (show_optional(p, "+", self.bias), show_optional(p, "residual", self.residual));
        format!("conv2d {} {}{place}{bias}{shift}{residual}", p.show(self.x), p.show(self.w))
    }
}

impl OpKind for Conv2dBackward {
    fn operands(&mut self) -> Vec<&mut ValueId> {
        [Some(&mut self.d_y), Some(&mut self.w), self.residual.as_mut()].into_iter().flatten().collect()
    }

    fn infer(&self, cx: &Infer) -> Result<Types, String> {
        let (d_y, w) = (cx.image(self.d_y)?, cx.image(self.w)?);
        let ([height, width], [top, left, bottom, right]) = (self.size, self.padding);
        ensure!(self.stride > 0, "stride 0");
        let sides = (out_side(height, w[0], self.stride, top, bottom), out_side(width, w[1], self.stride, left, right));
        ensure!(
            d_y[3] == w[3] && sides == (Some(d_y[1]), Some(d_y[2])),
            "d_y {d_y:?} is no output of {height}x{width} and weight {w:?}"
        );
        let out = vec![d_y[0], height, width, w[2]];
        if let Some(residual) = self.residual {
            cx.exactly("residual", residual, &out)?;
        }
        Ok(cx.one(out))
    }

    fn alias(&self) -> Option<ValueId> {
        self.residual
    }

    fn macs(&self, p: &Program, _: &[ValueId]) -> u64 {
        let w = p.shape(self.w);
        (p.value(self.d_y).len() * w[0] * w[1] * w[2]) as u64
    }

    fn show(&self, p: &Program) -> String {
        let ([height, width], residual) = (self.size, show_optional(p, "residual", self.residual));
        let place = format!("stride {} padding {:?} to {height}x{width}", self.stride, self.padding);
        format!("conv2d_backward {} {} {place}{residual}", p.show(self.d_y), p.show(self.w))
    }
}
