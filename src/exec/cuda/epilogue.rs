//! What happens to the sums of a product: the epilogue, and where a product is split the launch that makes outputs of its parts.
//! Contracts: kernels/epilogue.cuh and kernels/split_k_reduce.cu.

use super::cx::{Cx, activation};
use super::elementwise::{Pieces, THREADS};
use super::launch::{Address, Divisor, Launch};
use super::shape::{Cut, Shape};
use crate::program::{Activation, DType, ValueId};
use bytemuck::{Pod, Zeroable};

/// What happens to a sum before it is stored. Matches `Epilogue` in kernels/epilogue.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Epilogue {
    pub y: Address,
    pub bias: Address,
    pub shift: Address,
    pub residual: Address,
    pub sample: Divisor,
    pub shift_stride: i32,
    pub columns: i32,
    pub activation: i32,
    pub together: i32,
    pub unused: i32,
}
const _: () = assert!(size_of::<Epilogue>() == 64);

impl Epilogue {
    /// A bare store of `[.., columns]` to `y`, added to a residual if there is one.
    pub fn new(cx: &Cx, y: ValueId, residual: Option<ValueId>) -> Epilogue {
        let columns = cx.width(y);
        Epilogue {
            y: cx.address(y),
            bias: Address::NULL,
            shift: Address::NULL,
            residual: cx.optional(residual),
            sample: Divisor::new(1),
            shift_stride: 0,
            columns: columns as i32,
            activation: activation(Activation::None),
            together: [4, 2, 1].into_iter().find(|n| columns.is_multiple_of(*n)).map_or(1, |n| n as i32),
            unused: 0,
        }
    }
}

/// How a product is split over blocks. Matches `Split` in kernels/gemm_mainloop.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub struct Split {
    partial: Address,
    across: Divisor,
    depth: i32,
}
const _: () = assert!(size_of::<Split>() == 24);

impl Split {
    /// With the grid that goes with it, of so many tiles down and across. `workspace` holds the parts where there are several.
    pub fn new(cut: &Cut, [down, across]: [usize; 2], workspace: Address) -> (Split, [usize; 3]) {
        let partial = if cut.splits > 1 { workspace } else { Address::NULL };
        let split = Split { partial, across: Divisor::new(across), depth: cut.depth as i32 };
        (split, [down * across, 1, cut.splits])
    }
}

/// Matches `SplitKReduceParams` in kernels/split_k_reduce.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SplitKReduceParams {
    epilogue: Epilogue,
    partial: Address,
    stride: i64,
    columns: i32,
    splits: i32,
    pieces: Pieces,
    unused: i32,
}
const _: () = assert!(size_of::<SplitKReduceParams>() == 112);

/// Makes outputs of the parts in `workspace`, where there are several.
pub fn split_k_reduce(shape: &Shape, cut: &Cut, epilogue: Epilogue, workspace: Address) -> Option<Launch> {
    if cut.splits == 1 {
        return None;
    }
    // Four neighbours of f32 parts are 16 bytes, whatever the outputs are.
    let pieces = Pieces::new(DType::F32, shape.rows, epilogue.columns as usize, &[workspace]);
    let params = SplitKReduceParams {
        epilogue,
        partial: workspace,
        stride: (shape.rows * shape.columns) as i64,
        columns: shape.columns as i32,
        splits: cut.splits as i32,
        pieces,
        unused: 0,
    };
    Some(Launch::new(format!("split_k_reduce_{}", shape.dtype), pieces.grid(), THREADS, 0, params))
}
