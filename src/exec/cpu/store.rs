//! What outlives a run: packed weights, each held once, and named buffers.

use super::pack::{self, Aligned, Columns, Tiling};
use super::real::Float;
use crate::exec::{Data, DataMut, buffer};
use crate::program::{DType, Origin, Program, Shape, Value, ValueId};
use crate::weights::{FileId, Model, Pack, Rows, Weight};
use crate::{Error, Result};
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::OnceLock;

/// A named buffer.
pub struct Named<T> {
    shape: Shape,
    dtype: DType,
    pub values: Buffer<T>,
}

pub enum Buffer<T> {
    Float(Vec<T>),
    Int(Vec<i32>),
}

pub struct Store<T> {
    pub weights: Vec<Aligned<T>>,
    by_weight: HashMap<(Weight, Vec<FileId>), usize>,
    pub buffers: Vec<Named<T>>,
    by_name: HashMap<String, usize>,
}

impl<T> Default for Store<T> {
    fn default() -> Store<T> {
        Store { weights: vec![], by_weight: HashMap::new(), buffers: vec![], by_name: HashMap::new() }
    }
}

/// The columns of a right operand. Those of a GEGLU weight are in two halves whichever op reads it; of what is no weight an
/// op may read `parts` apart.
pub fn columns(program: &Program, id: ValueId, parts: usize, tiling: Tiling) -> Columns {
    let value = program.value(id);
    let n = value.shape[value.shape.len() - 1];
    match &value.origin {
        Origin::Weight(weight) if weight.pack.is_rhs() => weight_columns(weight, tiling),
        Origin::Weight(_) | Origin::Input(_) | Origin::Op(_) => Columns::in_parts(n, parts, tiling),
    }
}

fn weight_columns(weight: &Weight, tiling: Tiling) -> Columns {
    let parts = if weight.pack == Pack::Geglu { 2 } else { 1 };
    Columns::in_parts(weight.shape[weight.shape.len() - 1], parts, tiling)
}

impl<T: Float> Store<T> {
    /// The index of a weight, fetched and packed if it is not held yet.
    pub fn weight(&mut self, weight: &Weight, tiling: Tiling, model: &Model) -> Result<usize> {
        let key = (weight.clone(), model.sources(weight)?);
        if let Some(&index) = self.by_weight.get(&key) {
            return Ok(index);
        }
        let rows = model.rows(weight)?;
        let held = if weight.pack.is_rhs() {
            panels(&rows, weight_columns(weight, tiling), tiling.lanes)?
        } else {
            plain(&rows)?
        };
        self.weights.push(held);
        self.by_weight.insert(key, self.weights.len() - 1);
        Ok(self.weights.len() - 1)
    }

    /// The index of a named buffer, made (zeroed) if there is none of that name.
    pub fn buffer(&mut self, program: &Program, name: &str, value: &Value) -> Result<usize> {
        if let Some(&index) = self.by_name.get(name) {
            let held = &self.buffers[index];
            buffer::agrees(program, name, value, &held.shape, held.dtype)?;
            return Ok(index);
        }
        let values = match value.dtype {
            DType::I32 => Buffer::Int(pack::zeros(value.len())?),
            dtype if dtype == T::DTYPE => Buffer::Float(pack::zeros(value.len())?),
            dtype => {
                let what = format!("buffer '{name}' is {dtype}, this executor computes in {}", T::DTYPE);
                return Err(Error::Program { program: program.name.clone(), what, at: "load".into() });
            }
        };
        self.buffers.push(Named { shape: value.shape.clone(), dtype: value.dtype, values });
        self.by_name.insert(name.to_string(), self.buffers.len() - 1);
        Ok(self.buffers.len() - 1)
    }

    pub fn clear_buffers(&mut self) {
        self.buffers.clear();
        self.by_name.clear();
    }

    pub fn write(&mut self, name: &str, data: Data<'_>) -> Result<()> {
        let index = self.find(name)?;
        let held = &mut self.buffers[index];
        buffer::holds(name, &held.shape, data.len())?;
        match (&mut held.values, data) {
            (Buffer::Float(out), Data::F32(values)) => fill(out, values, |x| T::from_f64(x as f64)),
            (Buffer::Float(out), Data::F64(values)) => fill(out, values, T::from_f64),
            (Buffer::Float(out), Data::I32(values)) => fill(out, values, |x| T::from_f64(x as f64)),
            (Buffer::Int(out), Data::I32(values)) => out.copy_from_slice(values),
            (Buffer::Int(_), Data::F32(_) | Data::F64(_)) => {
                return Err(buffer::of_indices(name));
            }
        }
        Ok(())
    }

    pub fn copy(&mut self, from: (&str, usize), to: (&str, usize), len: usize) -> Result<()> {
        let [source, target] = [self.find(from.0)?, self.find(to.0)?];
        let (a, b) = (&self.buffers[source], &self.buffers[target]);
        buffer::copies((from.0, from.1, &a.shape, a.dtype), (to.0, to.1, &b.shape, b.dtype), len)?;
        if source == target {
            if let Buffer::Float(values) = &mut self.buffers[source].values {
                values.copy_within(from.1..from.1 + len, to.1);
            }
            return Ok(());
        }
        let taken = self.buffers.get_disjoint_mut([source, target]);
        if let Ok([Named { values: Buffer::Float(from_values), .. }, Named { values: Buffer::Float(to_values), .. }]) =
            taken
        {
            to_values[to.1..][..len].copy_from_slice(&from_values[from.1..][..len]);
        }
        Ok(())
    }

    pub fn read(&self, name: &str, out: DataMut<'_>) -> Result<()> {
        let held = &self.buffers[self.find(name)?];
        buffer::holds(name, &held.shape, out.len())?;
        match (&held.values, out) {
            (Buffer::Float(values), DataMut::F32(out)) => fill(out, values, |x| x.to_f64() as f32),
            (Buffer::Float(values), DataMut::F64(out)) => fill(out, values, |x| x.to_f64()),
            (Buffer::Int(values), DataMut::F32(out)) => fill(out, values, |x| x as f32),
            (Buffer::Int(values), DataMut::F64(out)) => fill(out, values, |x| x as f64),
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Result<usize> {
        self.by_name.get(name).copied().ok_or_else(|| buffer::unknown(name))
    }
}

fn fill<A: Copy, B>(out: &mut [B], values: &[A], convert: impl Fn(A) -> B) {
    out.iter_mut().zip(values).for_each(|(out, &value)| *out = convert(value));
}

/// Row after row, in parallel.
fn plain<T: Float>(rows: &Rows<'_>) -> Result<Aligned<T>> {
    let (width, block) = (rows.columns(), rows.block());
    let mut held = Aligned::zeroed(rows.rows() * width)?;
    let blocks = held.as_mut_slice().par_chunks_mut((block * width).max(1)).enumerate();
    blocks.try_for_each(|(n, out)| T::fetch(rows, n * block, out))?;
    Ok(held)
}

/// The rows of a weight are the columns of the product: a vector's worth of them is fetched and transposed into its panel.
fn panels<T: Float>(rows: &Rows<'_>, columns: Columns, lanes: usize) -> Result<Aligned<T>> {
    let k = rows.columns();
    let mut held = Aligned::zeroed(k * columns.padded())?;
    let failure = OnceLock::new();
    columns.fill(k, held.as_mut_slice(), |panel, out| {
        let mut fetched = vec![T::ZERO; lanes * k];
        for first in (0..panel.width).step_by(lanes) {
            let lanes = lanes.min(panel.width - first);
            if let Err(error) = T::fetch(rows, panel.start + first, &mut fetched[..lanes * k]) {
                failure.get_or_init(|| error);
                return;
            }
            for (k_index, out) in out.chunks_exact_mut(columns.padded_width(panel)).enumerate() {
                for (lane, out) in out[first..][..lanes].iter_mut().enumerate() {
                    *out = fetched[lane * k + k_index];
                }
            }
        }
    });
    failure.into_inner().map_or(Ok(held), Err)
}
