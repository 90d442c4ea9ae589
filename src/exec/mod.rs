//! Executors run planned programs: one trait, no per-op methods in it.

mod buffer;
pub mod cpu;
pub mod cuda;
mod guard;
mod lockstep;
pub(crate) mod philox;
mod scope;
mod weight_layout;

pub use lockstep::Lockstep;
pub use scope::{Scope, scoped};

use crate::Result;
use crate::plan::Planned;
use crate::program::{Node, Program};
use crate::weights::Model;

/// Handle of a loaded program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramId(pub usize);

/// Host data for a named buffer; converted to the buffer's type on the way.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
    I32(&'a [i32]),
}

impl Data<'_> {
    fn len(&self) -> usize {
        match self {
            Data::F32(values) => values.len(),
            Data::F64(values) => values.len(),
            Data::I32(values) => values.len(),
        }
    }
}

/// Host memory that receives a named buffer, converted from the buffer's type.
#[derive(Debug)]
pub enum DataMut<'a> {
    F32(&'a mut [f32]),
    F64(&'a mut [f64]),
}

impl DataMut<'_> {
    fn len(&self) -> usize {
        match self {
            DataMut::F32(values) => values.len(),
            DataMut::F64(values) => values.len(),
        }
    }
}

/// What host memory holds of a run: f32, or f64 where a program of f64 is to be looked at in full.
pub trait HostFloat: Copy + Default + Send + Sync + 'static {
    fn data(values: &[Self]) -> Data<'_>;
    fn data_mut(values: &mut [Self]) -> DataMut<'_>;
    fn scaled(self, by: f64) -> Self;
}

impl HostFloat for f32 {
    fn data(values: &[f32]) -> Data<'_> {
        Data::F32(values)
    }
    fn data_mut(values: &mut [f32]) -> DataMut<'_> {
        DataMut::F32(values)
    }
    fn scaled(self, by: f64) -> f32 {
        self * by as f32
    }
}

impl HostFloat for f64 {
    fn data(values: &[f64]) -> Data<'_> {
        Data::F64(values)
    }
    fn data_mut(values: &mut [f64]) -> DataMut<'_> {
        DataMut::F64(values)
    }
    fn scaled(self, by: f64) -> f64 {
        self * by
    }
}

/// Loads programs, holds their weights, named buffers and one arena, and runs them.
pub trait Executor {
    /// Bytes of scratch the op needs in the arena while it runs; given to the planner.
    fn workspace(&self, program: &Program, node: &Node) -> usize;

    /// Bytes that could still be allocated, where programs run in memory of their own; `None` in the machine's.
    fn free_memory(&self) -> Result<Option<usize>> {
        Ok(None)
    }

    /// Fetches the weights that are not held yet, creates the named buffers (zeroed), grows the arena to the plan.
    /// Buffers of one name are one buffer in all programs and must agree in type. A weight is identified by its network, its keys
    /// and the opened file it lies in: the same network of two models is held twice, and neither replaces the other.
    fn load(&mut self, planned: Planned, weights: &Model) -> Result<ProgramId>;

    /// Forgets programs and named buffers, keeps the weights.
    fn clear(&mut self);

    /// Fills a named buffer; the length must fit.
    fn write(&mut self, buffer: &str, data: Data<'_>) -> Result<()>;

    /// Copies `len` elements from element `from.1` of one float buffer to element `to.1` of another of its type, or elsewhere in the
    /// same one; what goes from one program to the next in another arrangement stays on the device.
    fn copy(&mut self, from: (&str, usize), to: (&str, usize), len: usize) -> Result<()>;

    /// Runs every op, then copies the outputs into their named buffers. Allocates nothing. It may return before all is done: `read`
    /// waits, and may be where an error shows.
    fn run(&mut self, program: ProgramId) -> Result<()>;

    /// Whether a run stops at the first op whose output is not finite and names it, from now on; slow on a GPU. An executor that
    /// cannot look between ops runs as ever.
    fn set_check_finite(&mut self, _on: bool) {}

    /// Waits until all that was run is done.
    fn wait(&self) -> Result<()> {
        Ok(())
    }

    /// Reads a named buffer; the length must fit.
    fn read(&self, buffer: &str, out: DataMut<'_>) -> Result<()>;
}
