//! Elementwise ops, and those that only move or add up whole rows and columns.

use super::{Activation, OpKind, show_cols};
use crate::program::infer::{Infer, Types, ensure};
use crate::program::{Cols, DType, Program, ValueId};

/// A function of one number, for losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scalar {
    /// Derivative 0 at 0, so that the norm of nothing has no gradient.
    Sqrt,
    Square,
    Ln,
    Exp,
    Reciprocal,
    /// `arccos(x)² / 2` of a cosine: half the squared angle, `2 arcsin²(‖a − b‖ / 2)` of unit vectors. Derivative `−θ / sin θ`,
    /// −1 at θ = 0, finite at θ = π. A cosine that rounding took beyond ±1 counts as ±1.
    Spherical,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Elementwise {
    Activate {
        x: ValueId,
        activation: Activation,
    },
    ActivateBackward {
        x: ValueId,
        d_y: ValueId,
        activation: Activation,
    },
    /// `x [.., 2H]` → `a * gelu(g) [.., H]`, `a` the first and `g` the last `H` columns.
    Geglu {
        x: ValueId,
    },
    /// `x [.., 2H]`, `d_y [.., H]` → `[.., 2H]`.
    GegluBackward {
        x: ValueId,
        d_y: ValueId,
    },
    Map {
        x: ValueId,
        f: Scalar,
    },
    MapBackward {
        x: ValueId,
        d_y: ValueId,
        f: Scalar,
    },
    Add {
        a: ValueId,
        b: ValueId,
    },
    Mul {
        a: ValueId,
        b: ValueId,
    },
    /// `x [B, ..]` times `by [B]`, sample by sample; `by` is of the accumulator type.
    Scale {
        x: ValueId,
        by: ValueId,
    },
    /// `a [S, C]`, `b [B, C]` → `[S, B, C]`, `a_s + b_b`.
    OuterAdd {
        a: ValueId,
        b: ValueId,
    },
    /// `d_y [S, B, C]` → `d_a [S, C]`, `d_b [B, C]`.
    OuterAddBackward {
        d_y: ValueId,
    },
    /// `x * scale + shift`, constants.
    Affine {
        x: ValueId,
        scale: f64,
        shift: f64,
    },
    /// `x[.., c] * scale[c] + shift[c]`, constants.
    ChannelAffine {
        x: ValueId,
        scale: Vec<f64>,
        shift: Vec<f64>,
    },
    Clamp {
        x: ValueId,
        low: f64,
        high: f64,
    },
    /// `d_y` where `low ≤ x ≤ high`, else 0.
    ClampBackward {
        x: ValueId,
        d_y: ValueId,
        low: f64,
        high: f64,
    },
    /// The value, but no gradient.
    Detach {
        x: ValueId,
    },
    /// The same numbers in another float type.
    Cast {
        x: ValueId,
        to: DType,
    },
    /// Every element `value`.
    Constant {
        shape: Vec<usize>,
        dtype: DType,
        value: f64,
    },
    /// Every row of a sample of `shape [B, .., C]` the sample's row of `x [B, C]`, or every row `x [1, C]` or `[C]`: the gradient
    /// of a sum of channels.
    Spread {
        x: ValueId,
        shape: Vec<usize>,
    },
    /// Along the last dimension.
    Concat {
        a: ValueId,
        b: ValueId,
    },
    /// Along the tokens of every sample: `a [B, p, ..]`, `b [B, q, ..]` → `[B, p + q, ..]`.
    ConcatTokens {
        a: ValueId,
        b: ValueId,
    },
    /// Columns `x.at .. x.at + len` of the last dimension.
    Columns {
        x: Cols,
        len: usize,
    },
    /// Each part's columns added to zeros `[.., width]` from column `at` on: the gradient of a value read by columns.
    Scatter {
        parts: Vec<Cols>,
        width: usize,
    },
    /// The whole batch again, `times` over: `[B, ..]` → `[times·B, ..]`.
    Repeat {
        x: ValueId,
        times: usize,
    },
    /// The copies added up: `[times·B, ..]` → `[B, ..]`.
    SumRepeats {
        x: ValueId,
        times: usize,
    },
    /// Rows `start .. start + len` of the first dimension.
    Slice {
        x: ValueId,
        start: usize,
        len: usize,
    },
    /// The rows of `x` from row `start` of `rows` rows, the others 0.
    Unslice {
        x: ValueId,
        start: usize,
        rows: usize,
    },
    /// Rows `start .. start + len` of every sample: `x [B, T, ..]` → `[B, len, ..]`.
    TokenRows {
        x: ValueId,
        start: usize,
        len: usize,
    },
    /// The rows of every sample of `x` from row `start` of `tokens` rows, the others 0: the gradient of a value read by tokens.
    PadTokens {
        x: ValueId,
        start: usize,
        tokens: usize,
    },
}

impl OpKind for Elementwise {
    fn operands(&mut self) -> Vec<&mut ValueId> {
        use Elementwise::*;
        match self {
            Activate { x, .. } | Geglu { x } | Map { x, .. } | Affine { x, .. } | ChannelAffine { x, .. } => vec![x],
            Clamp { x, .. } | Detach { x } | Cast { x, .. } | Repeat { x, .. } | SumRepeats { x, .. } => vec![x],
            Slice { x, .. } | Unslice { x, .. } | Spread { x, .. } => vec![x],
            TokenRows { x, .. } | PadTokens { x, .. } => vec![x],
            ActivateBackward { x, d_y, .. } | GegluBackward { x, d_y } => vec![x, d_y],
            MapBackward { x, d_y, .. } | ClampBackward { x, d_y, .. } => vec![x, d_y],
            Add { a, b } | Mul { a, b } | OuterAdd { a, b } => vec![a, b],
            Concat { a, b } | ConcatTokens { a, b } => vec![a, b],
            Scale { x, by } => vec![x, by],
            OuterAddBackward { d_y } => vec![d_y],
            Constant { .. } => vec![],
            Columns { x, .. } => vec![&mut x.value],
            Scatter { parts, .. } => parts.iter_mut().map(|part| &mut part.value).collect(),
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Types, String> {
        use Elementwise::*;
        let with_last = |s: &[usize], last: usize| [&s[..s.len() - 1], &[last]].concat();
        let with_first = |s: &[usize], first: usize| [&[first], &s[1..]].concat();
        let with_tokens = |s: &[usize], tokens: usize| [&[s[0], tokens], &s[2..]].concat();
        let shape = match *self {
            Activate { x, activation } => {
                ensure!(activation != Activation::Geglu, "GEGLU changes the width");
                cx.float(x, 1)?.to_vec()
            }
            ActivateBackward { x, d_y, activation } => {
                ensure!(activation != Activation::Geglu, "GEGLU changes the width");
                cx.alike(x, "d_y", d_y)?
            }
            MapBackward { x, d_y, .. } | ClampBackward { x, d_y, .. } => cx.alike(x, "d_y", d_y)?,
            Geglu { x } => {
                let s = cx.float(x, 1)?;
                let width = s[s.len() - 1];
                ensure!(width % 2 == 0, "GEGLU needs an even number of columns, x is {s:?}");
                with_last(s, width / 2)
            }
            GegluBackward { x, d_y } => {
                let (s, d) = (cx.float(x, 1)?, cx.float(d_y, 1)?);
                ensure!(s == with_last(d, 2 * d[d.len() - 1]), "x {s:?} is not twice as wide as d_y {d:?}");
                s.to_vec()
            }
            Map { x, .. } | Affine { x, .. } | Detach { x } => cx.float(x, 1)?.to_vec(),
            Clamp { x, low, high } => {
                let ordered = low <= high;
                ensure!(ordered, "clamp to {low}..{high}");
                cx.float(x, 1)?.to_vec()
            }
            ChannelAffine { x, ref scale, ref shift } => {
                let s = cx.float(x, 1)?;
                let c = s[s.len() - 1];
                ensure!(
                    scale.len() == c && shift.len() == c,
                    "{} scales, {} shifts for {s:?}",
                    scale.len(),
                    shift.len()
                );
                s.to_vec()
            }
            Add { a, b } | Mul { a, b } => cx.alike(a, "b", b)?,
            Scale { x, by } => {
                let s = cx.float(x, 1)?;
                cx.statistic("by", by, &s[..1])?;
                s.to_vec()
            }
            OuterAdd { a, b } => {
                let (a, b) = (cx.float(a, 2)?, cx.float(b, 2)?);
                ensure!(a.len() == 2 && b.len() == 2 && a[1] == b[1], "a {a:?} and b {b:?} need one width");
                vec![a[0], b[0], a[1]]
            }
            OuterAddBackward { d_y } => {
                let s = cx.float(d_y, 3)?;
                ensure!(s.len() == 3, "d_y {s:?} is not [S, B, C]");
                return Ok(vec![cx.of(vec![s[0], s[2]]), cx.of(vec![s[1], s[2]])]);
            }
            Cast { x, to } => {
                ensure!(to != DType::I32, "a cast to i32");
                return Ok(vec![(cx.float(x, 1)?.to_vec(), to)]);
            }
            Constant { ref shape, dtype, .. } => {
                ensure!(!shape.is_empty() && shape.iter().all(|n| *n > 0), "a constant of shape {shape:?}");
                ensure!(dtype != DType::I32, "a constant of i32");
                return Ok(vec![(shape.clone(), dtype)]);
            }
            Spread { x, ref shape } => {
                let s = cx.float(x, 1)?;
                let (rows, width) = s.split_at(s.len() - 1);
                let fits = matches!(rows, [] | [1]) || rows == &shape[..1];
                ensure!(shape.len() >= s.len() && fits && shape.ends_with(width), "{s:?} over {shape:?}");
                shape.clone()
            }
            Concat { a, b } => {
                let (a, b) = (cx.float(a, 2)?, cx.float(b, 2)?);
                let last = a.len() - 1;
                ensure!(a.len() == b.len() && a[..last] == b[..last], "a {a:?} and b {b:?} differ before the last dim");
                with_last(a, a[last] + b[last])
            }
            ConcatTokens { a, b } => {
                let (a, b) = (cx.float(a, 3)?, cx.float(b, 3)?);
                ensure!(a[0] == b[0] && a[2..] == b[2..], "a {a:?} and b {b:?} differ in more than their tokens");
                with_tokens(a, a[1] + b[1])
            }
            Columns { x, len } => {
                let s = cx.float(x.value, 1)?;
                ensure!(len > 0 && x.at + len <= s[s.len() - 1], "columns {}..{} of {s:?}", x.at, x.at + len);
                with_last(s, len)
            }
            Scatter { ref parts, width } => {
                let Some(first) = parts.first() else { return Err("no parts".into()) };
                let rows = cx.float(first.value, 1)?;
                for part in parts {
                    let s = cx.float(part.value, 1)?;
                    let last = s.len() - 1;
                    ensure!(s[..last] == rows[..rows.len() - 1], "parts {rows:?} and {s:?} differ before the last dim");
                    ensure!(part.at + s[last] <= width, "columns {}..{} of {width}", part.at, part.at + s[last]);
                }
                with_last(rows, width)
            }
            Repeat { x, times } => {
                ensure!(times > 0, "repeat 0 times");
                let s = cx.float(x, 1)?;
                with_first(s, s[0] * times)
            }
            SumRepeats { x, times } => {
                let s = cx.float(x, 1)?;
                ensure!(times > 0 && s[0] % times == 0, "{s:?} is not {times} batches");
                with_first(s, s[0] / times)
            }
            Slice { x, start, len } => {
                let s = cx.float(x, 1)?;
                ensure!(len > 0 && start + len <= s[0], "rows {start}..{} of {s:?}", start + len);
                with_first(s, len)
            }
            Unslice { x, start, rows } => {
                let s = cx.float(x, 1)?;
                ensure!(start + s[0] <= rows, "rows {start}..{} of {rows}", start + s[0]);
                with_first(s, rows)
            }
            TokenRows { x, start, len } => {
                let s = cx.float(x, 3)?;
                ensure!(len > 0 && start + len <= s[1], "tokens {start}..{} of {s:?}", start + len);
                with_tokens(s, len)
            }
            PadTokens { x, start, tokens } => {
                let s = cx.float(x, 3)?;
                ensure!(start + s[1] <= tokens, "tokens {start}..{} of {tokens}", start + s[1]);
                with_tokens(s, tokens)
            }
        };
        Ok(cx.one(shape))
    }

    fn alias(&self) -> Option<ValueId> {
        use Elementwise::*;
        match *self {
            Activate { x, .. } | Map { x, .. } | Affine { x, .. } | ChannelAffine { x, .. } => Some(x),
            Clamp { x, .. } | Detach { x } | Scale { x, .. } => Some(x),
            ActivateBackward { d_y, .. } | MapBackward { d_y, .. } | ClampBackward { d_y, .. } => Some(d_y),
            GegluBackward { x, .. } => Some(x),
            Add { a, .. } | Mul { a, .. } => Some(a),
            Geglu { .. } | OuterAdd { .. } | OuterAddBackward { .. } | Constant { .. } | Concat { .. } => None,
            Cast { .. } | ConcatTokens { .. } | TokenRows { .. } | PadTokens { .. } => None,
            Columns { .. } | Scatter { .. } | Repeat { .. } | SumRepeats { .. } => None,
            Slice { .. } | Unslice { .. } | Spread { .. } => None,
        }
    }

    fn show(&self, p: &Program) -> String {
        use Elementwise::*;
        let v = |id: &ValueId| p.show(*id);
        match self {
            Activate { x, activation } => format!("{activation:?} {}", v(x)).to_lowercase(),
            ActivateBackward { x, d_y, activation } => {
                format!("{} {} {}", format!("{activation:?}_backward").to_lowercase(), v(d_y), v(x))
            }
            Geglu { x } => format!("geglu {}", v(x)),
            GegluBackward { x, d_y } => format!("geglu_backward {} {}", v(d_y), v(x)),
            Map { x, f } => format!("{} {}", format!("{f:?}").to_lowercase(), v(x)),
            MapBackward { x, d_y, f } => format!("{}_backward {} {}", format!("{f:?}").to_lowercase(), v(d_y), v(x)),
            Add { a, b } => format!("add {} {}", v(a), v(b)),
            Mul { a, b } => format!("mul {} {}", v(a), v(b)),
            Scale { x, by } => format!("scale {} {}", v(x), v(by)),
            OuterAdd { a, b } => format!("outer_add {} {}", v(a), v(b)),
            OuterAddBackward { d_y } => format!("outer_add_backward {}", v(d_y)),
            Affine { x, scale, shift } => format!("affine {} * {scale} + {shift}", v(x)),
            ChannelAffine { x, scale, shift } => format!("channel_affine {} * {scale:?} + {shift:?}", v(x)),
            Clamp { x, low, high } => format!("clamp {} {low}..{high}", v(x)),
            ClampBackward { x, d_y, low, high } => format!("clamp_backward {} {} {low}..{high}", v(d_y), v(x)),
            Detach { x } => format!("detach {}", v(x)),
            Cast { x, to } => format!("cast {} to {to}", v(x)),
            Constant { value, .. } => format!("constant {value}"),
            Concat { a, b } => format!("concat {} {}", v(a), v(b)),
            ConcatTokens { a, b } => format!("concat_tokens {} {}", v(a), v(b)),
            Spread { x, .. } => format!("spread {}", v(x)),
            Columns { x, len } => format!("columns {}[{}..{}]", v(&x.value), x.at, x.at + len),
            Scatter { parts, .. } => {
                let parts: Vec<String> = parts.iter().map(|part| show_cols(p, *part)).collect();
                format!("scatter {}", parts.join(" "))
            }
            Repeat { x, times } => format!("repeat {} x{times}", v(x)),
            SumRepeats { x, times } => format!("sum_repeats {} x{times}", v(x)),
            Slice { x, start, len } => format!("slice {}[{start}..{}]", v(x), start + len),
            Unslice { x, start, .. } => format!("unslice {} from {start}", v(x)),
            TokenRows { x, start, len } => format!("token_rows {}[{start}..{}]", v(x), start + len),
            PadTokens { x, start, .. } => format!("pad_tokens {} from {start}", v(x)),
        }
    }
}
