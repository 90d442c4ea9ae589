//! Rows looked up, mixed, pooled and put in place, and the sinusoidal embedding.

use super::OpKind;
use crate::program::infer::{Infer, Types, ensure};
use crate::program::{Program, ValueId};

#[derive(Clone, Debug, PartialEq)]
pub enum Embedding {
    /// `row(ids[b, t]) + positions[t]`; `ids [B, T]` i32, `positions [P ≥ T, C]` → `[B, T, C]`. Ids below `V` are rows of
    /// `table [V, C]`, the next ones rows of `extra [R, C]`: learnable tokens, mixtures.
    Tokens { ids: ValueId, table: ValueId, extra: Option<ValueId>, positions: ValueId },
    /// Gradient of `Tokens` to rows `first .. first + rows` of table and extra together: `d_y [B, T, C]` → `[rows, C]`.
    TokensBackward { ids: ValueId, d_y: ValueId, first: usize, rows: usize },
    /// Gradient of `Tokens` to `positions`: summed over the batch, `[rows, C]`, 0 beyond `T`.
    PositionsBackward { d_y: ValueId, rows: usize },
    /// `Σ_j weights[s, j] · table[ids[s, j]]`: `weights [S, n]`, `ids [S, n]` i32, a negative id is no choice → `[S, C]`.
    Mix { weights: ValueId, ids: ValueId, table: ValueId },
    /// Gradient of `Mix` to its weights: `⟨table[ids[s, j]], d_y[s]⟩`, 0 where there is no choice → `[S, n]`.
    MixBackward { ids: ValueId, table: ValueId, d_y: ValueId },
    /// Sinusoidal embedding of every number, period 10000 (Ho et al. 2020; `get_timestep_embedding` of diffusers):
    /// `x [N]` → `[N, dim]`, `x [B, n]` → `[B, n·dim]`.
    Sinusoidal { x: ValueId, dim: usize, flip_sin_to_cos: bool, freq_shift: f64 },
    /// Gradient of `Sinusoidal` to its numbers.
    SinusoidalBackward { x: ValueId, d_y: ValueId, dim: usize, flip_sin_to_cos: bool, freq_shift: f64 },
    /// Row `at[b]` of each sample: `x [B, T, C]`, `at [B]` i32 → `[B, C]` (pooling at the end-of-text token).
    Pool { x: ValueId, at: ValueId },
    /// `d_y [B, C]` at row `at[b]` of `rows` rows of zeros: `[B, rows, C]`.
    PoolBackward { d_y: ValueId, at: ValueId, rows: usize },
    /// Entry `at[0]` of the first dimension (this step's time projections): `x [S, C]`, `at [1]` i32 → `[1, C]`; `x [S, B, C]` → `[B, C]`.
    Select { x: ValueId, at: ValueId },
    /// `d_y` at entry `at[0]` of zeros of shape `shape`, the input's.
    SelectBackward { d_y: ValueId, at: ValueId, shape: Vec<usize> },
    /// A row of its own before the patches of an image, positions added: `x [B, .., C]` with `T` middle positions,
    /// `class [C]`, `positions [T + 1, C]` → `[B, T + 1, C]`.
    Patches { x: ValueId, class: ValueId, positions: ValueId },
    /// Gradient of `Patches` to `x`, whose middle dimensions are `middle`: `[B, middle.., C]`.
    PatchesBackward { d_y: ValueId, middle: Vec<usize> },
    /// Row `row` of each sample: `x [B, T, C]` → `[B, C]`.
    Row { x: ValueId, row: usize },
    /// `d_y [B, C]` at row `row` of `rows` rows of zeros: `[B, rows, C]`.
    RowBackward { d_y: ValueId, row: usize, rows: usize },
}

impl OpKind for Embedding {
    fn operands(&mut self) -> Vec<&mut ValueId> {
        use Embedding::*;
        match self {
            Tokens { ids, table, extra, positions } => {
                [Some(ids), Some(table), extra.as_mut(), Some(positions)].into_iter().flatten().collect()
            }
            TokensBackward { ids, d_y, .. } => vec![ids, d_y],
            PositionsBackward { d_y, .. } => vec![d_y],
            Mix { weights, ids, table } => vec![weights, ids, table],
            MixBackward { ids, table, d_y } => vec![ids, table, d_y],
            Sinusoidal { x, .. } | Row { x, .. } => vec![x],
            SinusoidalBackward { x, d_y, .. } => vec![x, d_y],
            Pool { x, at } | Select { x, at } => vec![x, at],
            PoolBackward { d_y, at, .. } | SelectBackward { d_y, at, .. } => vec![d_y, at],
            Patches { x, class, positions } => vec![x, class, positions],
            PatchesBackward { d_y, .. } | RowBackward { d_y, .. } => vec![d_y],
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Types, String> {
        use Embedding::*;
        let shape = match *self {
            Tokens { ids, table, extra, positions } => {
                let s = cx.shape(ids);
                ensure!(s.len() == 2, "ids {s:?} are not [B, T]");
                cx.index("ids", ids, s)?;
                let (table, positions) = (cx.matrix(table)?, cx.matrix(positions)?);
                ensure!(
                    table[1] == positions[1] && s[1] <= positions[0],
                    "ids {s:?}, table {table:?}, positions {positions:?} do not fit"
                );
                if let Some(extra) = extra {
                    let extra = cx.matrix(extra)?;
                    ensure!(extra[1] == table[1], "extra rows {extra:?} beside a table {table:?}");
                }
                vec![s[0], s[1], table[1]]
            }
            TokensBackward { ids, d_y, rows, .. } => {
                let s = cx.tokens(d_y)?;
                cx.index("ids", ids, &s[..2])?;
                ensure!(rows > 0, "a gradient to no rows");
                vec![rows, s[2]]
            }
            PositionsBackward { d_y, rows } => {
                let s = cx.tokens(d_y)?;
                ensure!(s[1] <= rows, "{} positions of {rows}", s[1]);
                vec![rows, s[2]]
            }
            Mix { weights, ids, table } => {
                let (s, table) = (cx.matrix(weights)?, cx.matrix(table)?);
                cx.index("ids", ids, s)?;
                vec![s[0], table[1]]
            }
            MixBackward { ids, table, d_y } => {
                let (s, d_y, table) = (cx.shape(ids), cx.matrix(d_y)?, cx.matrix(table)?);
                ensure!(
                    s.len() == 2 && s[0] == d_y[0] && table[1] == d_y[1],
                    "ids {s:?}, d_y {d_y:?}, table {table:?} do not fit"
                );
                cx.index("ids", ids, s)?;
                s.to_vec()
            }
            Sinusoidal { x, dim, .. } => sinusoidal(cx, x, dim)?,
            SinusoidalBackward { x, d_y, dim, .. } => {
                cx.exactly("d_y", d_y, &sinusoidal(cx, x, dim)?)?;
                cx.shape(x).to_vec()
            }
            Pool { x, at } => {
                let s = cx.tokens(x)?;
                cx.index("at", at, &s[..1])?;
                vec![s[0], s[2]]
            }
            PoolBackward { d_y, at, rows } => {
                let s = cx.matrix(d_y)?;
                cx.index("at", at, &s[..1])?;
                ensure!(rows > 0, "no rows");
                vec![s[0], rows, s[1]]
            }
            Select { x, at } => {
                cx.index("at", at, &[1])?;
                selected(cx.float(x, 2)?)?
            }
            SelectBackward { d_y, at, ref shape } => {
                cx.index("at", at, &[1])?;
                cx.exactly("d_y", d_y, &selected(shape)?)?;
                shape.clone()
            }
            Patches { x, class, positions } => {
                let (s, positions) = (cx.float(x, 3)?, cx.matrix(positions)?);
                let (tokens, c) = (s[1..s.len() - 1].iter().product::<usize>(), s[s.len() - 1]);
                cx.exactly("class", class, &[c])?;
                ensure!(
                    positions == [tokens + 1, c],
                    "positions {positions:?} for {tokens} patches and a class of width {c}"
                );
                vec![s[0], tokens + 1, c]
            }
            PatchesBackward { d_y, ref middle } => {
                let s = cx.tokens(d_y)?;
                ensure!(middle.iter().product::<usize>() + 1 == s[1], "{middle:?} patches of {s:?}");
                [&s[..1], middle, &s[2..]].concat()
            }
            Row { x, row } => {
                let s = cx.tokens(x)?;
                ensure!(row < s[1], "row {row} of {s:?}");
                vec![s[0], s[2]]
            }
            RowBackward { d_y, row, rows } => {
                let s = cx.matrix(d_y)?;
                ensure!(row < rows, "row {row} of {rows}");
                vec![s[0], rows, s[1]]
            }
        };
        Ok(cx.one(shape))
    }

    fn show(&self, p: &Program) -> String {
        use Embedding::*;
        let v = |id: &ValueId| p.show(*id);
        match self {
            Tokens { ids, table, extra, .. } => {
                format!("tokens {} {}{}", v(ids), v(table), super::show_optional(p, "extra", *extra))
            }
            TokensBackward { ids, d_y, first, rows } => {
                format!("tokens_backward {} {} rows {first}..{}", v(d_y), v(ids), first + rows)
            }
            PositionsBackward { d_y, .. } => format!("positions_backward {}", v(d_y)),
            Mix { weights, ids, table } => format!("mix {} {} {}", v(weights), v(ids), v(table)),
            MixBackward { ids, table, d_y } => format!("mix_backward {} {} {}", v(d_y), v(ids), v(table)),
            Sinusoidal { x, dim, .. } => format!("sinusoidal {} dim {dim}", v(x)),
            SinusoidalBackward { x, d_y, dim, .. } => format!("sinusoidal_backward {} {} dim {dim}", v(d_y), v(x)),
            Pool { x, at } => format!("pool {} at {}", v(x), v(at)),
            PoolBackward { d_y, at, .. } => format!("pool_backward {} at {}", v(d_y), v(at)),
            Select { x, at } => format!("select {} at {}", v(x), v(at)),
            SelectBackward { d_y, at, .. } => format!("select_backward {} at {}", v(d_y), v(at)),
            Patches { x, class, positions } => format!("patches {} {} {}", v(class), v(x), v(positions)),
            PatchesBackward { d_y, .. } => format!("patches_backward {}", v(d_y)),
            Row { x, row } => format!("row {} {row}", v(x)),
            RowBackward { d_y, row, .. } => format!("row_backward {} {row}", v(d_y)),
        }
    }
}

fn sinusoidal(cx: &Infer, x: ValueId, dim: usize) -> Result<Vec<usize>, String> {
    let s = cx.float(x, 1)?;
    let fits = s.len() <= 2 && dim >= 2 && dim.is_multiple_of(2);
    ensure!(fits, "x {s:?} to {dim} dims (needs [N] or [B, n], an even width)");
    Ok(vec![s[0], s[1..].iter().product::<usize>() * dim])
}

/// One entry of the first dimension; of a matrix still a matrix.
fn selected(s: &[usize]) -> Result<Vec<usize>, String> {
    match *s {
        [_, c] => Ok(vec![1, c]),
        [_, b, c] => Ok(vec![b, c]),
        _ => Err(format!("{s:?} is not [S, C] or [S, B, C]")),
    }
}
