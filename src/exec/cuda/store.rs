//! What outlives a run on the device: weights, each held once, and named buffers; and their types' way to and from the host's.

use super::driver::{Driver, STAGE};
use super::launch::Address;
use crate::exec::guard::describe;
use crate::exec::{Data, DataMut, buffer};
use crate::program::{DType, Embedding, Op, Origin, Program, Rowwise, Shape, Value, ValueId};
use crate::weights::{FileId, Model, Weight};
use crate::{Error, Result};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use rayon::prelude::*;
use std::collections::HashMap;

/// A named buffer.
struct Named {
    shape: Shape,
    dtype: DType,
    address: Address,
    /// The host's copy of an index buffer, which bounds are checked against.
    ints: Vec<i32>,
}

#[derive(Default)]
pub struct Store {
    weights: HashMap<(Weight, Vec<FileId>, DType), Address>,
    buffers: HashMap<String, Named>,
}

/// What the entries of an index buffer must be for an op: kernels do not check them.
pub struct Bounds {
    op: usize,
    buffer: String,
    what: &'static str,
    limit: usize,
    /// A negative entry says that there is none.
    negative: bool,
}

/// The bounds of a program's index buffers.
pub fn bounds(program: &Program) -> Vec<Bounds> {
    let mut bounds = vec![];
    for (op, node) in program.nodes.iter().enumerate() {
        let found = match &node.op {
            Op::Embedding(embedding) => embedding_bound(program, embedding),
            Op::Rowwise(
                Rowwise::CrossEntropy { logits, targets } | Rowwise::CrossEntropyBackward { logits, targets, .. },
            ) => {
                let shape = program.shape(*logits);
                Some((*targets, "target", shape[shape.len() - 1], true))
            }
            Op::Norm(_)
            | Op::Rowwise(_)
            | Op::Gemm(_)
            | Op::GemmBackward(_)
            | Op::Conv2d(_)
            | Op::Conv2dBackward(_) => None,
            Op::Attention(_) | Op::AttentionBackward(_) => None,
            // A counter has no bounds.
            Op::Elementwise(_) | Op::Resample(_) | Op::Update(_) => None,
        };
        if let Some((id, what, limit, negative)) = found
            && let Origin::Input(buffer) = &program.value(id).origin
        {
            bounds.push(Bounds { op, buffer: buffer.clone(), what, limit, negative });
        }
    }
    bounds
}

/// The indices that an embedding looks up, what they are, how many there are to choose from, and whether one may choose none.
fn embedding_bound(program: &Program, op: &Embedding) -> Option<(ValueId, &'static str, usize, bool)> {
    use Embedding::*;
    let rows = |id: ValueId, dim: usize| program.shape(id)[dim];
    match *op {
        Tokens { ids, table, extra, .. } => {
            Some((ids, "token id", rows(table, 0) + extra.map_or(0, |extra| rows(extra, 0)), false))
        }
        Mix { ids, table, .. } | MixBackward { ids, table, .. } => Some((ids, "token id", rows(table, 0), true)),
        Pool { x, at } => Some((at, "row", rows(x, 1), false)),
        PoolBackward { at, rows, .. } => Some((at, "row", rows, false)),
        Select { x, at } => Some((at, "entry", rows(x, 0), false)),
        SelectBackward { at, ref shape, .. } => Some((at, "entry", shape[0], false)),
        // Ids outside its rows have no part in the gradient.
        TokensBackward { .. } => None,
        PositionsBackward { .. } | Sinusoidal { .. } | SinusoidalBackward { .. } => None,
        Patches { .. } | PatchesBackward { .. } | Row { .. } | RowBackward { .. } => None,
    }
}

impl Store {
    /// Asks for the bytes of weights that are not held yet, as many as are uploaded while a disk reads.
    pub fn prefetch<'w>(&self, weights: impl Iterator<Item = (&'w Weight, DType)>, model: &Model) {
        for (weight, dtype) in weights {
            let sources = model.sources(weight);
            if !sources.is_ok_and(|sources| self.weights.contains_key(&(weight.clone(), sources, dtype))) {
                model.prefetch(weight);
            }
        }
    }

    /// The address of a weight, fetched and uploaded if it is not held yet: row by row, of a product's right operand `[N, K]`.
    /// All cores read and convert some rows while those before them are on their way.
    pub fn weight(&mut self, driver: &mut dyn Driver, weight: &Weight, dtype: DType, model: &Model) -> Result<Address> {
        let key = (weight.clone(), model.sources(weight)?, dtype);
        if let Some(&address) = self.weights.get(&key) {
            return Ok(address);
        }
        let rows = model.rows(weight)?;
        let (count, width) = (rows.rows(), rows.columns());
        let bytes = width * dtype.bytes();
        let address = driver.allocate(count * bytes)?;
        let step = (STAGE / bytes.max(1)).clamp(1, count.max(1));
        let block = rows.block();
        for first in (0..count).step_by(step) {
            let some = step.min(count - first);
            let mut read = Ok(());
            driver.stage(address.offset(first * bytes), some * bytes, &mut |staged| {
                let blocks = staged.par_chunks_mut((block * bytes).max(1)).enumerate();
                read = blocks.try_for_each_init(
                    || vec![0.0f32; block * width],
                    |values, (n, out)| {
                        let values = &mut values[..out.len() / dtype.bytes()];
                        rows.read_f32(first + n * block, values)?;
                        encode(dtype, values.iter().copied(), out);
                        Ok(())
                    },
                );
            })?;
            read?;
        }
        self.weights.insert(key, address);
        Ok(address)
    }

    /// The address of a named buffer, made (zeroed) if there is none of that name.
    pub fn buffer(&mut self, driver: &mut dyn Driver, program: &Program, name: &str, value: &Value) -> Result<Address> {
        if let Some(held) = self.buffers.get(name) {
            buffer::agrees(program, name, value, &held.shape, held.dtype)?;
            return Ok(held.address);
        }
        let address = driver.allocate(value.bytes())?;
        driver.fill(address, 0, value.bytes())?;
        let ints = if value.dtype == DType::I32 { vec![0; value.len()] } else { vec![] };
        self.buffers.insert(name.to_string(), Named { shape: value.shape.clone(), dtype: value.dtype, address, ints });
        Ok(address)
    }

    pub fn address(&self, name: &str) -> Result<Address> {
        Ok(self.find(name)?.address)
    }

    pub fn clear_buffers(&mut self, driver: &mut dyn Driver) {
        for (_, held) in self.buffers.drain() {
            // Memory that cannot be given back is the driver's to report at the next call.
            let _ = driver.release(held.address);
        }
    }

    /// Fails at the first index out of bounds, naming the op that would follow it.
    pub fn check(&self, program: &Program, bounds: &[Bounds]) -> Result<()> {
        for Bounds { op, buffer, what, limit, negative } in bounds {
            let outside = |i: i32| if i < 0 { !negative } else { i as usize >= *limit };
            if let Some(wrong) = self.find(buffer)?.ints.iter().find(|i| outside(**i)) {
                let what = format!("{what} {wrong} is not in 0..{limit}");
                return Err(Error::Numeric(describe(program, *op, &what)));
            }
        }
        Ok(())
    }

    pub fn write(&mut self, driver: &mut dyn Driver, name: &str, data: Data<'_>) -> Result<()> {
        let held = self.find(name)?;
        buffer::holds(name, &held.shape, data.len())?;
        let (address, dtype) = (held.address, held.dtype);
        if dtype == DType::I32 && !matches!(data, Data::I32(_)) {
            return Err(buffer::of_indices(name));
        }
        if let (Data::I32(values), Some(held)) = (data, self.buffers.get_mut(name)) {
            held.ints.iter_mut().zip(values).for_each(|(held, &value)| *held = value);
        }
        let step = STAGE / dtype.bytes();
        for first in (0..data.len()).step_by(step) {
            let range = first..data.len().min(first + step);
            let to = address.offset(first * dtype.bytes());
            driver.stage(to, range.len() * dtype.bytes(), &mut |staged| match data {
                Data::I32(values) if dtype == DType::I32 => {
                    staged.copy_from_slice(bytemuck::cast_slice(&values[range.clone()]));
                }
                Data::I32(values) => encode(dtype, values[range.clone()].iter().map(|&x| x as f32), staged),
                Data::F32(values) => encode(dtype, values[range.clone()].iter().copied(), staged),
                Data::F64(values) => encode(dtype, values[range.clone()].iter().map(|&x| x as f32), staged),
            })?;
        }
        Ok(())
    }

    pub fn copy(
        &self,
        driver: &mut dyn Driver,
        (from, from_at): (&str, usize),
        (to, to_at): (&str, usize),
        len: usize,
    ) -> Result<()> {
        let (source, target) = (self.find(from)?, self.find(to)?);
        let given = (from, from_at, &source.shape[..], source.dtype);
        buffer::copies(given, (to, to_at, &target.shape, target.dtype), len)?;
        let bytes = source.dtype.bytes();
        driver.copy(source.address.offset(from_at * bytes), target.address.offset(to_at * bytes), len * bytes)
    }

    pub fn read(&self, driver: &dyn Driver, name: &str, out: DataMut<'_>) -> Result<()> {
        let held = self.find(name)?;
        buffer::holds(name, &held.shape, out.len())?;
        match (out, held.dtype) {
            // The way of latents and pixels, for which the device waits.
            (DataMut::F32(out), DType::F32) => driver.read(held.address, bytemuck::cast_slice_mut(out)),
            (DataMut::F32(out), DType::F16) => {
                let bits = read_bits(driver, held.address, out.len())?;
                bits.reinterpret_cast::<f16>().convert_to_f32_slice(out);
                Ok(())
            }
            (DataMut::F32(out), DType::BF16) => {
                let bits = read_bits(driver, held.address, out.len())?;
                bits.reinterpret_cast::<bf16>().convert_to_f32_slice(out);
                Ok(())
            }
            (out, dtype) => {
                let mut bytes = vec![0; out.len() * dtype.bytes()];
                driver.read(held.address, &mut bytes)?;
                let values = to_f64(dtype, &bytes);
                match out {
                    DataMut::F32(out) => out.iter_mut().zip(values).for_each(|(out, x)| *out = x as f32),
                    DataMut::F64(out) => out.copy_from_slice(&values),
                }
                Ok(())
            }
        }
    }

    fn find(&self, name: &str) -> Result<&Named> {
        self.buffers.get(name).ok_or_else(|| buffer::unknown(name))
    }
}

fn read_bits(driver: &dyn Driver, from: Address, len: usize) -> Result<Vec<u16>> {
    let mut bits = vec![0u16; len];
    driver.read(from, bytemuck::cast_slice_mut(&mut bits))?;
    Ok(bits)
}

/// Numbers as a device holds them.
fn encode(dtype: DType, values: impl Iterator<Item = f32>, out: &mut [u8]) {
    fn put<const N: usize>(values: impl Iterator<Item = f32>, out: &mut [u8], bytes: impl Fn(f32) -> [u8; N]) {
        out.chunks_exact_mut(N).zip(values).for_each(|(out, x)| out.copy_from_slice(&bytes(x)));
    }
    match dtype {
        DType::F16 => put(values, out, |x| f16::from_f32(x).to_ne_bytes()),
        DType::BF16 => put(values, out, |x| bf16::from_f32(x).to_ne_bytes()),
        DType::F32 => put(values, out, f32::to_ne_bytes),
        DType::F64 => put(values, out, |x| f64::from(x).to_ne_bytes()),
        DType::I32 => put(values, out, |x| (x as i32).to_ne_bytes()),
    }
}

/// The first number that is an infinity or a NaN, and where it is.
pub fn not_finite(dtype: DType, bytes: &[u8]) -> Option<(usize, f64)> {
    fn first<const N: usize>(bytes: &[u8], is_finite: impl Fn([u8; N]) -> bool + Sync) -> Option<usize> {
        let (elements, _) = bytes.as_chunks();
        elements.par_iter().with_min_len(1 << 14).position_first(|element| !is_finite(*element))
    }
    let at = match dtype {
        DType::F16 => first(bytes, |x| f16::from_ne_bytes(x).is_finite()),
        DType::BF16 => first(bytes, |x| bf16::from_ne_bytes(x).is_finite()),
        DType::F32 => first(bytes, |x| f32::from_ne_bytes(x).is_finite()),
        DType::F64 => first(bytes, |x| f64::from_ne_bytes(x).is_finite()),
        DType::I32 => None,
    }?;
    let value = to_f64(dtype, &bytes[at * dtype.bytes()..][..dtype.bytes()]);
    Some((at, value[0]))
}

/// Numbers as the host reads them.
pub fn to_f64(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let half = |pair: &[u8]| u16::from_ne_bytes([pair[0], pair[1]]);
    let word = |four: &[u8]| [four[0], four[1], four[2], four[3]];
    match dtype {
        DType::F16 => bytes.chunks_exact(2).map(|b| f16::from_bits(half(b)).to_f64()).collect(),
        DType::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_bits(half(b)).to_f64()).collect(),
        DType::F32 => bytes.chunks_exact(4).map(|b| f32::from_ne_bytes(word(b)) as f64).collect(),
        DType::I32 => bytes.chunks_exact(4).map(|b| i32::from_ne_bytes(word(b)) as f64).collect(),
        DType::F64 => bytes
            .chunks_exact(8)
            .map(|b| f64::from_ne_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
            .collect(),
    }
}
