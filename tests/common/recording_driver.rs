//! An emulated driver that notes what it is asked for, and can leave kernels out.

use super::emulated::build;
use rarebit::Result;
use rarebit::exec::cuda::{Address, Cuda, Driver, Emulated, Function, Graph, Launch, Settings, TensorMap, Work};
use std::cell::RefCell;
use std::rc::Rc;

pub type Calls = Rc<RefCell<Vec<&'static str>>>;

struct RecordingDriver {
    driver: Emulated,
    calls: Calls,
    /// Kernels that are not run though they are asked for, by the beginning of their names.
    skipped: Option<&'static str>,
}

/// An executor whose driver notes its calls, and starts no kernel whose name begins with `skipped`.
pub fn recording(calls: &Calls, skipped: Option<&'static str>) -> Cuda {
    let driver = Emulated::open(&build(), Settings::default().workers(2)).unwrap();
    Cuda::new(Box::new(RecordingDriver { driver, calls: Rc::clone(calls), skipped }))
}

pub fn count(calls: &Calls, what: &str) -> usize {
    calls.borrow().iter().filter(|call| **call == what).count()
}

impl RecordingDriver {
    fn note(&self, what: &'static str) {
        self.calls.borrow_mut().push(what);
    }
}

impl Driver for RecordingDriver {
    fn name(&self) -> String {
        self.driver.name()
    }
    fn hopper(&self) -> bool {
        self.driver.hopper()
    }
    fn tensor_map(&self, map: &TensorMap) -> Result<[u8; TensorMap::BYTES]> {
        self.driver.tensor_map(map)
    }
    fn free_memory(&self) -> Result<usize> {
        self.driver.free_memory()
    }
    fn allocate(&mut self, bytes: usize) -> Result<Address> {
        self.note("allocate");
        self.driver.allocate(bytes)
    }
    fn release(&mut self, address: Address) -> Result<()> {
        self.note("release");
        self.driver.release(address)
    }
    fn stage(&mut self, to: Address, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        self.note("stage");
        self.driver.stage(to, bytes, fill)
    }
    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        self.note("read");
        self.driver.read(from, bytes)
    }
    fn fill(&mut self, to: Address, value: u8, bytes: usize) -> Result<()> {
        self.note("fill");
        self.driver.fill(to, value, bytes)
    }
    fn copy(&mut self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.note("copy");
        self.driver.copy(from, to, bytes)
    }
    fn function(&mut self, kernel: &str, shared: u32) -> Result<Function> {
        self.driver.function(kernel, shared)
    }
    fn launch(&mut self, function: Function, launch: &Launch) -> Result<()> {
        self.note("launch");
        if self.skipped.is_some_and(|skipped| launch.kernel.starts_with(skipped)) {
            return Ok(());
        }
        self.driver.launch(function, launch)
    }
    fn record(&mut self, work: &mut dyn Iterator<Item = Work<'_>>) -> Result<Graph> {
        self.note("record");
        self.driver.record(work)
    }
    fn replay(&mut self, graph: Graph) -> Result<()> {
        self.note("replay");
        self.driver.replay(graph)
    }
    fn forget(&mut self, graph: Graph) -> Result<()> {
        self.note("forget");
        self.driver.forget(graph)
    }
    fn synchronize(&self) -> Result<()> {
        self.note("synchronize");
        self.driver.synchronize()
    }
}
