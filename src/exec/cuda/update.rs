//! Launches of updates. Contract: kernels/update.cu.

use super::cx::Cx;
use super::elementwise::{Pieces, THREADS, flat};
use super::kernels::constants::MOST_TERMS;
use super::launch::{Address, Divisor, Launch};
use crate::program::{Rows, Update, ValueId};
use bytemuck::{Pod, Zeroable};

/// Matches `CombineParams` in kernels/update.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CombineParams {
    terms: [Address; MOST_TERMS],
    coefficients: Address,
    y: Address,
    elements: i64,
    count: i32,
    accumulate: i32,
    aligned: i32,
    cast: u32,
}
const _: () = assert!(size_of::<CombineParams>() == 104);

/// Matches `OptimiserParams` in kernels/update.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct OptimiserParams {
    inputs: [Address; 4],
    scalars: Address,
    outputs: [Address; 3],
    elements: i64,
    aligned: i64,
}
const _: () = assert!(size_of::<OptimiserParams>() == 80);

/// Matches `NoiseParams` in kernels/update.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct NoiseParams {
    counter: Address,
    y: Address,
    sample: i64,
    positions: Divisor,
    pieces: Pieces,
    channels: i32,
    unused: i32,
}
const _: () = assert!(size_of::<NoiseParams>() == 64);

pub fn launches(op: &Update, cx: &Cx) -> Vec<Launch> {
    match *op {
        Update::Combine { ref terms, coefficients } => combine(cx, terms, cx.address(coefficients)),
        Update::Scale { x, coefficients, index } => {
            combine(cx, &[x.into()], cx.address(coefficients).offset(4 * index))
        }
        Update::AdamW { p, g, m, v, scalars } => vec![optimiser(cx, "adamw", &[p, g, m, v], scalars)],
        Update::RmsProp { p, g, v, b, scalars } => vec![optimiser(cx, "rmsprop", &[p, g, v, b], scalars)],
        Update::Nesterov { p, g, b, scalars } => vec![optimiser(cx, "nesterov", &[p, g, b], scalars)],
        Update::Noise { counter, ref shape } => vec![noise(cx, cx.address(counter), shape)],
    }
}

/// The sum of the terms, [`MOST_TERMS`] a launch.
fn combine(cx: &Cx, terms: &[Rows], coefficients: Address) -> Vec<Launch> {
    let y = cx.output(0);
    let (dtype, elements, row, y) = (cx.dtype(y), cx.len(y), cx.len(y) / cx.shape(y)[0], cx.address(y));
    let type_of = |term: &Rows| cx.dtype(term.value);
    let kernel = match terms.iter().map(type_of).find(|term| *term != dtype) {
        Some(stored) => format!("combine_{stored}_{dtype}"),
        None => format!("combine_{dtype}"),
    };
    let first = |term: &Rows| cx.address(term.value).offset(term.at * row * type_of(term).bytes());
    let launch = |(i, terms): (usize, &[Rows])| {
        let addresses = std::array::from_fn(|n| terms.get(n).map_or(Address::NULL, first));
        let cast = terms.iter().enumerate().filter(|(_, term)| type_of(term) != dtype);
        let params = CombineParams {
            terms: addresses,
            coefficients: coefficients.offset(4 * i * MOST_TERMS),
            y,
            elements: elements as i64,
            count: terms.len() as i32,
            accumulate: i32::from(i > 0),
            aligned: i32::from(y.is_aligned() && addresses.iter().all(|term| term.is_aligned())),
            cast: cast.map(|(n, _)| 1 << n).sum(),
        };
        flat(kernel.clone(), elements, dtype.bytes(), params)
    };
    terms.chunks(MOST_TERMS).enumerate().map(launch).collect()
}

fn optimiser(cx: &Cx, kernel: &str, inputs: &[ValueId], scalars: ValueId) -> Launch {
    let (dtype, elements) = (cx.dtype(inputs[0]), cx.len(inputs[0]));
    let of = |ids: &[ValueId], n: usize| ids.get(n).map_or(Address::NULL, |&id| cx.address(id));
    let inputs: [Address; 4] = std::array::from_fn(|n| of(inputs, n));
    let outputs: [Address; 3] = std::array::from_fn(|n| of(&cx.node.outputs, n));
    let aligned = inputs.iter().chain(&outputs).all(|address| address.is_aligned());
    let (elements_i64, aligned) = (elements as i64, aligned.into());
    let params = OptimiserParams { inputs, scalars: cx.address(scalars), outputs, elements: elements_i64, aligned };
    flat(format!("{kernel}_{dtype}"), elements, dtype.bytes(), params)
}

/// A thread for every four numbers.
fn noise(cx: &Cx, counter: Address, shape: &[usize]) -> Launch {
    let y = cx.output(0);
    let (sample, channels) = (cx.len(y) / shape[0], cx.width(y));
    let params = NoiseParams {
        counter,
        y: cx.address(y),
        sample: sample as i64,
        positions: Divisor::new(sample / channels),
        pieces: Pieces::singles(shape[0], sample.div_ceil(4)),
        channels: channels as i32,
        unused: 0,
    };
    Launch::new("noise_f32", params.pieces.grid(), THREADS, 0, params)
}
