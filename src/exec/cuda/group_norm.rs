//! Launches of group normalisation. Contract: kernels/group_norm.cu.

use super::cx::Cx;
use super::kernels::constants::{GROUP_THREADS as THREADS, PARTS};
use super::launch::{Address, Divisor, Launch};
use crate::program::{DType, Program, ValueId};
use bytemuck::{Pod, Zeroable};

/// Channels of a part at most.
const SIZE: usize = 512;
/// Bytes of a range at least, where there are as many: whole lines of the cache.
const LINE: usize = 128;
/// Blocks per sample to aim at, and chunks at most: each block of the second launch reads what its range left in all of
/// them.
const BLOCKS: usize = 512;
const CHUNKS: usize = 128;

/// How a sample is cut. Matches `GroupCut` in kernels/group_norm.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Cut {
    pixels: i32,
    channels: i32,
    parts: i32,
    split: i32,
    range: i32,
    lanes: i32,
    side: i32,
    length: i32,
    size: Divisor,
    aligned: i32,
}
const _: () = assert!(size_of::<Cut>() == 48);

/// Matches `GroupNormParams` in kernels/group_norm.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct GroupNormParams {
    cut: Cut,
    x: Address,
    d_y: Address,
    gamma: Address,
    beta: Address,
    y: Address,
    mean: Address,
    rstd: Address,
    partial: Address,
    eps: f32,
    silu: i32,
}
const _: () = assert!(size_of::<GroupNormParams>() == 120);

/// A cut with the blocks it makes: chunks, ranges, samples.
fn cut(shape: &[usize], groups: usize, dtype: DType) -> (Cut, [usize; 3]) {
    let (channels, pixels) = (shape[shape.len() - 1], shape[1..shape.len() - 1].iter().product::<usize>());
    let (vector, group) = (16 / dtype.bytes(), channels / groups);
    // A group wider than a block counts as several parts.
    let split = (1..=group).find(|split| group.is_multiple_of(*split) && group / split <= SIZE).unwrap_or(group);
    let (size, parts) = (group / split, groups * split);
    let most = parts.min(PARTS);
    let wide = |range: usize| range * size * dtype.bytes() >= LINE || range == most;
    let whole = |range: usize| {
        (range * size).is_multiple_of(vector) && parts.is_multiple_of(range) && range * size <= THREADS * vector
    };
    let fits = (1..=most).find(|&range| whole(range) && wide(range));
    let fits = fits.or_else(|| (1..=most).rev().find(|&range| whole(range)));
    let range = fits.unwrap_or_else(|| (1..most).find(|&range| wide(range)).unwrap_or(most));
    let (lanes, ranges) = ((range * size).div_ceil(vector), parts.div_ceil(range));
    let side = THREADS / lanes;
    let (steps, wanted) = (pixels.div_ceil(side), (BLOCKS / ranges).clamp(1, CHUNKS));
    let length = side * steps.div_ceil(wanted);
    let cut = Cut {
        pixels: pixels as i32,
        channels: channels as i32,
        parts: parts as i32,
        split: split as i32,
        range: range as i32,
        lanes: lanes as i32,
        side: side as i32,
        length: length as i32,
        size: Divisor::new(size),
        aligned: i32::from(fits.is_some()),
    };
    (cut, [pixels.div_ceil(length), ranges, shape[0]])
}

/// Two numbers per sample, chunk and part.
pub fn workspace(program: &Program, x: ValueId, groups: usize) -> usize {
    let (cut, [chunks, _, samples]) = cut(program.shape(x), groups, program.value(x).dtype);
    samples * chunks * cut.parts as usize * 2 * size_of::<f32>()
}

/// Of `x`, `gamma` and `beta`.
pub fn forward(cx: &Cx, ids: [ValueId; 3], groups: usize, eps: f64, silu: bool) -> Vec<Launch> {
    let [x, gamma, beta] = ids;
    let [y, mean, rstd] = [0, 1, 2].map(|i| cx.output(i));
    let operands = Operands { x, d_y: None, gamma, beta, mean, rstd, y };
    operands.launches(cx, groups, eps, silu, ["group_norm_statistics", "group_norm"])
}

/// Of `x`, `d_y`, `gamma`, `beta`, `mean` and `rstd`.
pub fn backward(cx: &Cx, ids: [ValueId; 6], groups: usize, silu: bool) -> Vec<Launch> {
    let [x, d_y, gamma, beta, mean, rstd] = ids;
    let operands = Operands { x, d_y: Some(d_y), gamma, beta, mean, rstd, y: cx.output(0) };
    operands.launches(cx, groups, 0.0, silu, ["group_norm_backward_sums", "group_norm_backward"])
}

struct Operands {
    x: ValueId,
    d_y: Option<ValueId>,
    gamma: ValueId,
    beta: ValueId,
    mean: ValueId,
    rstd: ValueId,
    y: ValueId,
}

impl Operands {
    fn launches(&self, cx: &Cx, groups: usize, eps: f64, silu: bool, kernels: [&str; 2]) -> Vec<Launch> {
        let Operands { x, d_y, gamma, beta, mean, rstd, y } = *self;
        let dtype = cx.dtype(x);
        let (mut cut, grid) = cut(cx.shape(x), groups, dtype);
        let addresses = [x, gamma, beta, y].map(|id| cx.address(id));
        let aligned = addresses.into_iter().chain([cx.optional(d_y)]).all(|address| address.is_aligned());
        cut.aligned &= i32::from(aligned);
        let [x, gamma, beta, y] = addresses;
        let params = GroupNormParams {
            cut,
            x,
            d_y: cx.optional(d_y),
            gamma,
            beta,
            y,
            mean: cx.address(mean),
            rstd: cx.address(rstd),
            partial: cx.workspace,
            eps: eps as f32,
            silu: i32::from(silu),
        };
        kernels.map(|kernel| Launch::new(format!("{kernel}_{dtype}"), grid, THREADS, 0, params)).to_vec()
    }
}
