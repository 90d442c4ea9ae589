//! What the executor asks of a device: memory, copies, functions by name, launches in order. Two devices answer: a GPU and the
//! host emulation of one; everything above this line is the same code for both.

use super::launch::{Address, Launch};
use crate::Result;

/// A kernel that a driver has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function(pub usize);

/// One stream of work on one device. Launches and copies take effect in the order they are given; `read` waits for them.
pub trait Driver {
    /// The device, in words.
    fn name(&self) -> String;

    /// Bytes of memory that could still be allocated.
    fn free_memory(&self) -> Result<usize>;

    /// Memory aligned to 256 bytes, its content undefined.
    fn allocate(&mut self, bytes: usize) -> Result<Address>;

    /// Gives back what `allocate` returned.
    fn release(&mut self, address: Address) -> Result<()>;

    fn write(&mut self, to: Address, bytes: &[u8]) -> Result<()>;

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<()>;

    /// Sets `bytes` bytes to `value`.
    fn fill(&mut self, to: Address, value: u8, bytes: usize) -> Result<()>;

    /// Copies between two stretches that do not overlap.
    fn copy(&mut self, from: Address, to: Address, bytes: usize) -> Result<()>;

    /// Finds a kernel and readies it for `shared` bytes of dynamic shared memory.
    fn function(&mut self, kernel: &str, shared: u32) -> Result<Function>;

    /// Starts a kernel; an error names it. `launch.kernel` is only for messages, `function` is what runs.
    fn launch(&mut self, function: Function, launch: &Launch) -> Result<()>;

    /// Waits until all that was started is done; an error of a launch may only show here.
    fn synchronize(&self) -> Result<()>;
}
