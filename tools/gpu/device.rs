//! The device under test, shared by every executor that a section makes: opening it loads all kernels, which is not done per case.

use crate::common::emulated::could_use_hopper;
use rarebit::exec::cuda::{
    Address, Cuda, Driver, Emulated, Function, Gpu, Graph, Hopper, Launch, Settings, TensorMap, Work, kernels,
};
use rarebit::program::Program;
use rarebit::{Error, Result};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::str::FromStr;

/// `--device`.
#[derive(Clone, Debug, PartialEq)]
pub enum Choice {
    Cuda(usize),
    Emulated,
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Choice, String> {
        let number = text.strip_prefix("cuda").map(|rest| rest.strip_prefix(':').unwrap_or(rest));
        match (text, number) {
            ("emulated", _) => Ok(Choice::Emulated),
            (_, Some("")) => Ok(Choice::Cuda(0)),
            (_, Some(number)) => number.parse().map(Choice::Cuda).map_err(|_| format!("'{number}' is no number")),
            (_, None) => Err("give cuda:N or emulated".into()),
        }
    }
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Choice::Cuda(number) => write!(f, "cuda:{number}"),
            Choice::Emulated => write!(f, "emulated"),
        }
    }
}

struct Shared {
    driver: Box<dyn Driver>,
    /// Kernels that were launched.
    launched: BTreeSet<String>,
}

/// The device under test.
pub struct Device {
    shared: Rc<RefCell<Shared>>,
    /// The library of the emulation.
    pub emulation: PathBuf,
    pub name: String,
    /// The driver's version, as far as it is known.
    pub version: String,
    /// Whether it is a GPU.
    pub is_gpu: bool,
}

impl Device {
    /// Opens it, and then finds the emulation, which may have to be built.
    pub fn open(choice: &Choice, emulation: impl FnOnce() -> PathBuf) -> Result<Device> {
        let (driver, version, emulation): (Box<dyn Driver>, _, _) = match choice {
            Choice::Cuda(number) => {
                let gpu = Gpu::new(*number)?;
                let version = format!("CUDA {}{}", gpu.driver_version()?, kernel_module());
                (Box::new(gpu), version, emulation())
            }
            Choice::Emulated => {
                let library = emulation();
                (Box::new(Emulated::open(&library, Settings::default())?), "host emulation".into(), library)
            }
        };
        let name = driver.name();
        let shared = Shared { driver, launched: BTreeSet::new() };
        Ok(Device {
            shared: Rc::new(RefCell::new(shared)),
            emulation,
            name,
            version,
            is_gpu: *choice != Choice::Emulated,
        })
    }

    /// A driver on the same device whose memory and graphs are given back when it is dropped.
    pub fn lease(&self) -> Lease {
        Lease { shared: self.shared.clone(), addresses: BTreeSet::new(), graphs: vec![] }
    }

    /// An executor of its own arena; with guards no op reads what is dead or writes what is not its own.
    pub fn cuda(&self, guards: bool) -> Cuda {
        Cuda::new(Box::new(self.lease())).with_guards(guards)
    }

    /// What a program is checked on, with a word for its rows: the kernels for any GPU, and where there are others for Hopper that it
    /// could use, also those.
    pub fn cudas(&self, guards: bool, program: &Program) -> Vec<(Cuda, &'static str)> {
        let mut cudas = vec![(self.cuda(guards).with_hopper(Hopper::Off), "")];
        if could_use_hopper(program) && self.lease().hopper() {
            cudas.push((self.cuda(guards).with_hopper(Hopper::Always), ", Hopper"));
        }
        cudas
    }

    /// The emulation, also where the device is a GPU.
    pub fn emulated(&self) -> Result<Emulated> {
        Emulated::open(&self.emulation, Settings::default())
    }

    /// Waits; after an error here the device does nothing more for this process.
    pub fn synchronize(&self) -> Result<()> {
        self.shared.borrow().driver.synchronize()
    }

    /// Kernels that were launched since this was last asked.
    pub fn take_launched(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.borrow_mut().launched).into_iter().collect()
    }
}

/// Every kernel of the build that is for the device.
pub fn all_kernels(choice: &Choice, emulation: &Path) -> Result<BTreeSet<String>> {
    match choice {
        Choice::Emulated => {
            let emulated = Emulated::open(emulation, Settings::default())?;
            Ok(emulated.kernels().map(str::to_string).collect())
        }
        Choice::Cuda(ordinal) => {
            let hopper = Gpu::new(*ordinal)?.hopper();
            let names = kernels::REPORT.lines().skip(1).filter_map(|line| line.split('\t').next());
            Ok(names.filter(|name| hopper || !name.contains("hopper")).map(str::to_string).collect())
        }
    }
}

/// Of `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04 …` the number.
fn kernel_module() -> String {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let number =
        text.split_whitespace().find(|word| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()));
    number.map_or(String::new(), |number| format!(", driver {number}"))
}

pub struct Lease {
    shared: Rc<RefCell<Shared>>,
    addresses: BTreeSet<u64>,
    graphs: Vec<Graph>,
}

impl Driver for Lease {
    fn name(&self) -> String {
        self.shared.borrow().driver.name()
    }

    fn hopper(&self) -> bool {
        self.shared.borrow().driver.hopper()
    }

    fn tensor_map(&self, map: &TensorMap) -> Result<[u8; TensorMap::BYTES]> {
        self.shared.borrow().driver.tensor_map(map)
    }

    fn free_memory(&self) -> Result<usize> {
        self.shared.borrow().driver.free_memory()
    }

    fn allocate(&mut self, bytes: usize) -> Result<Address> {
        let address = self.shared.borrow_mut().driver.allocate(bytes)?;
        self.addresses.insert(address.0);
        Ok(address)
    }

    fn release(&mut self, address: Address) -> Result<()> {
        if !self.addresses.remove(&address.0) {
            return Err(Error::Device(format!("{:#x} is released and was not allocated", address.0)));
        }
        self.shared.borrow_mut().driver.release(address)
    }

    fn stage(&mut self, to: Address, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        self.shared.borrow_mut().driver.stage(to, bytes, fill)
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        self.shared.borrow().driver.read(from, bytes)
    }

    fn fill(&mut self, to: Address, value: u8, bytes: usize) -> Result<()> {
        self.shared.borrow_mut().driver.fill(to, value, bytes)
    }

    fn copy(&mut self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.shared.borrow_mut().driver.copy(from, to, bytes)
    }

    fn function(&mut self, kernel: &str, shared_bytes: u32) -> Result<Function> {
        self.shared.borrow_mut().driver.function(kernel, shared_bytes)
    }

    fn launch(&mut self, function: Function, launch: &Launch) -> Result<()> {
        let mut shared = self.shared.borrow_mut();
        if !shared.launched.contains(&launch.kernel) {
            shared.launched.insert(launch.kernel.clone());
        }
        shared.driver.launch(function, launch)
    }

    fn record(&mut self, work: &mut dyn Iterator<Item = Work<'_>>) -> Result<Graph> {
        let graph = self.shared.borrow_mut().driver.record(work)?;
        self.graphs.push(graph);
        Ok(graph)
    }

    fn replay(&mut self, graph: Graph) -> Result<()> {
        self.shared.borrow_mut().driver.replay(graph)
    }

    fn forget(&mut self, graph: Graph) -> Result<()> {
        self.graphs.retain(|held| *held != graph);
        self.shared.borrow_mut().driver.forget(graph)
    }

    fn synchronize(&self) -> Result<()> {
        self.shared.borrow().driver.synchronize()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Ok(mut shared) = self.shared.try_borrow_mut() else { return };
        // After a kernel failed every call does; the process frees all.
        for graph in &self.graphs {
            let _ = shared.driver.forget(*graph);
        }
        for address in &self.addresses {
            let _ = shared.driver.release(Address(*address));
        }
    }
}
