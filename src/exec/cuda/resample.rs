//! Launches of resampling. Contract: kernels/resample.cu.

use super::cx::Cx;
use super::elementwise::{Part, Pieces, THREADS, grid_of, strided_sum};
use super::kernels::constants::TABLE_THREADS;
use super::launch::{Address, Divisor, Launch};
use crate::program::{Filter, Interpolation, Program, Resample, ValueId};
use bytemuck::{Pod, Zeroable};

/// Matches `NearestParams` in kernels/resample.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct NearestParams {
    x: Address,
    y: Address,
    channels: i64,
    pieces: Pieces,
    height: Divisor,
    width: Divisor,
    x_height: i32,
    x_width: i32,
    unused: i32,
}
const _: () = assert!(size_of::<NearestParams>() == 80);

/// Matches `Table` in kernels/resample.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Table {
    spans: Address,
    weights: Address,
    most: i32,
    targets: i32,
    from: i32,
    to: i32,
}

/// Matches `TablesParams` in kernels/resample.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct TablesParams {
    sides: [Table; 2],
    cubic: i32,
    antialias: i32,
    transposed: i32,
    unused: i32,
}
const _: () = assert!(size_of::<TablesParams>() == 80);

/// Matches `ResizeParams` in kernels/resample.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ResizeParams {
    x: Address,
    y: Address,
    vertical: Table,
    horizontal: Table,
    channels: Divisor,
    height: Divisor,
    width: Divisor,
    count: u32,
    x_height: i32,
    x_width: i32,
}
const _: () = assert!(size_of::<ResizeParams>() == 128);

/// One side of an image: pixels before and after resizing forward, and whether the map is transposed.
#[derive(Clone, Copy)]
struct Side {
    from: usize,
    to: usize,
    how: Interpolation,
    transposed: bool,
}

impl Side {
    fn targets(self) -> usize {
        if self.transposed { self.from } else { self.to }
    }

    /// The most sources of a target; the kernel looks at no more candidates.
    fn most(self) -> usize {
        let ratio = self.from as f64 / self.to as f64;
        let radius = match self.how.filter {
            Filter::Bilinear => 1.0,
            Filter::Bicubic => 2.0,
        };
        let reach = if self.how.antialias { radius * ratio.max(1.0) } else { radius };
        if self.transposed {
            self.to.min(((2.0 * reach + 2.0) / ratio) as usize + 4)
        } else {
            self.from.min((2.0 * reach) as usize + 2)
        }
    }

    fn span_bytes(self) -> usize {
        8 * self.targets()
    }

    fn bytes(self) -> usize {
        (self.span_bytes() + 4 * self.targets() * self.most()).next_multiple_of(16)
    }

    fn table(self, at: Address) -> Table {
        Table {
            spans: at,
            weights: at.offset(self.span_bytes()),
            most: self.most() as i32,
            targets: self.targets() as i32,
            from: self.from as i32,
            to: self.to as i32,
        }
    }
}

/// Both sides of a resizing, if the op is one.
fn sides(op: &Resample, program: &Program) -> Option<[Side; 2]> {
    let sides = |x: ValueId, size: [usize; 2], how, transposed| {
        let own = [program.shape(x)[1], program.shape(x)[2]];
        let (from, to) = if transposed { (size, own) } else { (own, size) };
        Some([0, 1].map(|i| Side { from: from[i], to: to[i], how, transposed }))
    };
    match *op {
        Resample::Resize { x, height, width, how } => sides(x, [height, width], how, false),
        Resample::ResizeBackward { d_y, height, width, how } => sides(d_y, [height, width], how, true),
        Resample::Nearest2x { .. } | Resample::Nearest2xBackward { .. } => None,
        Resample::Crop { .. } | Resample::CropBackward { .. } => None,
    }
}

/// Both tables.
pub fn workspace(op: &Resample, program: &Program) -> usize {
    sides(op, program).map_or(0, |sides| sides.iter().map(|side| side.bytes()).sum())
}

pub fn launches(op: &Resample, cx: &Cx) -> Vec<Launch> {
    match *op {
        Resample::Nearest2x { x, .. } => vec![nearest(cx, "nearest_2x", x)],
        Resample::Nearest2xBackward { d_y, .. } => vec![nearest(cx, "nearest_2x_backward", d_y)],
        Resample::Resize { x, .. } => resize(op, cx, x),
        Resample::ResizeBackward { d_y, .. } => resize(op, cx, d_y),
        Resample::Crop { x, top, left, height, width } => {
            let (dtype, [batch, h, w, c]) = (cx.dtype(x), dims(cx.shape(x)));
            let from = cx.address(x).offset((top * w + left) * c * dtype.bytes());
            let part = Part::new(from, width * c).every(height, h * w * c, w * c);
            strided_sum(dtype, cx.address(cx.output(0)), batch * height, width * c, &[part])
        }
        Resample::CropBackward { d_y, top, left, height, width } => {
            let (dtype, [batch, h, w, c]) = (cx.dtype(d_y), dims(cx.shape(d_y)));
            let part = Part::new(cx.address(d_y), w * c).every(height, h * w * c, w * c).rows(top, h).at(left * c);
            strided_sum(dtype, cx.address(cx.output(0)), batch * height, width * c, &[part])
        }
    }
}

fn dims(shape: &[usize]) -> [usize; 4] {
    let [batch, h, w, c] = *shape else { unreachable!("images have four dims") };
    [batch, h, w, c]
}

fn nearest(cx: &Cx, kernel: &str, x: ValueId) -> Launch {
    let (y, dtype) = (cx.output(0), cx.dtype(x));
    let ([_, x_height, x_width, _], [batch, height, width, channels]) = (dims(cx.shape(x)), dims(cx.shape(y)));
    let (x, y) = (cx.address(x), cx.address(y));
    let pieces = Pieces::new(dtype, batch * height * width, channels, &[x, y]);
    let params = NearestParams {
        x,
        y,
        channels: channels as i64,
        pieces,
        height: Divisor::new(height),
        width: Divisor::new(width),
        x_height: x_height as i32,
        x_width: x_width as i32,
        unused: 0,
    };
    Launch::new(format!("{kernel}_{dtype}"), pieces.grid(), THREADS, 0, params)
}

/// The tables, then the image.
fn resize(op: &Resample, cx: &Cx, x: ValueId) -> Vec<Launch> {
    let Some(sides) = sides(op, cx.program) else { unreachable!("a resizing") };
    let [down, across] = sides;
    let tables = [down.table(cx.workspace), across.table(cx.workspace.offset(down.bytes()))];
    let params = TablesParams {
        sides: tables,
        cubic: i32::from(down.how.filter == Filter::Bicubic),
        antialias: i32::from(down.how.antialias),
        transposed: i32::from(down.transposed),
        unused: 0,
    };
    let blocks = down.targets().max(across.targets()).div_ceil(TABLE_THREADS);
    let tabulate = Launch::new("resize_tables", [blocks, 2, 1], TABLE_THREADS, 0, params);
    let (y, dtype) = (cx.output(0), cx.dtype(x));
    let ([_, x_height, x_width, _], [_, height, width, channels]) = (dims(cx.shape(x)), dims(cx.shape(y)));
    let count = cx.len(y);
    let params = ResizeParams {
        x: cx.address(x),
        y: cx.address(y),
        vertical: tables[0],
        horizontal: tables[1],
        channels: Divisor::new(channels),
        height: Divisor::new(height),
        width: Divisor::new(width),
        count: count as u32,
        x_height: x_height as i32,
        x_width: x_width as i32,
    };
    let apply = Launch::new(format!("resize_{dtype}"), grid_of(count), THREADS, 0, params);
    vec![tabulate, apply]
}
