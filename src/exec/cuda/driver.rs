//! What the executor asks of a device: memory, copies, functions by name, launches in order. Two devices answer: a GPU and the
//! host emulation of one; everything above this line is the same code for both.

use super::launch::{Address, Launch, TensorMap};
use crate::Result;

/// A kernel that a driver has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function(pub usize);

/// Work that a driver has recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Graph(pub usize);

/// What is recorded.
#[derive(Clone, Copy, Debug)]
pub enum Work<'a> {
    Launch(Function, &'a Launch),
    /// Between two stretches that do not overlap.
    Copy {
        from: Address,
        to: Address,
        bytes: usize,
    },
}

/// The most bytes that [`Driver::stage`] takes at a time.
pub const STAGE: usize = 8 << 20;

/// One stream of work on one device. Writes, launches and copies take effect in the order they are given and are not waited for;
/// `read` and `synchronize` wait.
pub trait Driver {
    /// The device, in words.
    fn name(&self) -> String;

    /// Whether it runs the kernels for Hopper.
    fn hopper(&self) -> bool;

    /// A tensor map as those kernels take it.
    fn tensor_map(&self, map: &TensorMap) -> Result<[u8; TensorMap::BYTES]>;

    /// Bytes of memory that could still be allocated.
    fn free_memory(&self) -> Result<usize>;

    /// Memory aligned to 256 bytes, its content undefined.
    fn allocate(&mut self, bytes: usize) -> Result<Address>;

    /// Gives back what `allocate` returned.
    fn release(&mut self, address: Address) -> Result<()>;

    /// Writes `bytes` bytes, [`STAGE`] at most, which `fill` puts into memory of the driver's own.
    fn stage(&mut self, to: Address, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<()>;

    fn write(&mut self, to: Address, bytes: &[u8]) -> Result<()> {
        for (index, part) in bytes.chunks(STAGE).enumerate() {
            self.stage(to.offset(index * STAGE), part.len(), &mut |staged| staged.copy_from_slice(part))?;
        }
        Ok(())
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<()>;

    /// Sets `bytes` bytes to `value`.
    fn fill(&mut self, to: Address, value: u8, bytes: usize) -> Result<()>;

    /// Copies between two stretches that do not overlap.
    fn copy(&mut self, from: Address, to: Address, bytes: usize) -> Result<()>;

    /// Finds a kernel and readies it for `shared` bytes of dynamic shared memory.
    fn function(&mut self, kernel: &str, shared: u32) -> Result<Function>;

    /// Starts a kernel; an error names it. `launch.kernel` is only for messages, `function` is what runs.
    fn launch(&mut self, function: Function, launch: &Launch) -> Result<()>;

    /// Records work without doing it. Kernels must have run before, so that nothing of them is loaded while it is recorded.
    fn record(&mut self, work: &mut dyn Iterator<Item = Work<'_>>) -> Result<Graph>;

    /// Starts all that was recorded.
    fn replay(&mut self, graph: Graph) -> Result<()>;

    /// Gives a recording back.
    fn forget(&mut self, graph: Graph) -> Result<()>;

    /// Waits until all that was started is done; an error of a launch may only show here, or at the next `read`.
    fn synchronize(&self) -> Result<()>;
}

impl Launch {
    /// Puts the tensor maps where the kernel looks for them.
    pub fn encode_maps(&mut self, driver: &dyn Driver) -> Result<()> {
        for (map, place) in self.maps.iter().zip(self.params.chunks_exact_mut(TensorMap::BYTES)) {
            place.copy_from_slice(&driver.tensor_map(map)?);
        }
        Ok(())
    }
}
