//! The device under test, shared by every executor that a section makes: opening it loads all kernels, which is not done per case.

use crate::quarantine::{Kernels, Outstanding};
use crate::section::Event;
use rarebit::exec::cuda::{
    Address, Cuda, Driver, Emulated, Function, Gpu, Graph, Hopper, Launch, Settings, TensorMap, Work, kernels,
};
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

/// The device under test.
pub struct Device {
    driver: Rc<RefCell<Box<dyn Driver>>>,
    pub kernels: Rc<RefCell<Kernels>>,
    /// Called with what goes to the device and what comes back.
    tell: fn(&Event),
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
                let workers = std::thread::available_parallelism().map_or(1, |threads| threads.get() as u32);
                let emulated = Emulated::open(&library, Settings::default().workers(workers))?;
                (Box::new(emulated), "host emulation".into(), library)
            }
        };
        let name = driver.name();
        Ok(Device {
            driver: Rc::new(RefCell::new(driver)),
            kernels: Rc::default(),
            tell: |_| {},
            emulation,
            name,
            version,
            is_gpu: *choice != Choice::Emulated,
        })
    }

    /// The same, whose launches are reported.
    pub fn telling(self, tell: fn(&Event)) -> Device {
        Device { tell, ..self }
    }

    /// A driver on the same device whose memory and graphs are given back when it is dropped.
    pub fn lease(&self) -> Lease {
        Lease {
            driver: self.driver.clone(),
            kernels: self.kernels.clone(),
            tell: self.tell,
            addresses: BTreeSet::new(),
            graphs: vec![],
        }
    }

    /// An executor of its own arena; with guards no op reads what is dead or writes what is not its own.
    pub fn cuda(&self, guards: bool, hopper: Hopper) -> Cuda {
        Cuda::new(Box::new(self.lease())).with_guards(guards).with_hopper(hopper)
    }

    /// Whether it runs the kernels for Hopper.
    pub fn hopper(&self) -> bool {
        self.driver.borrow().hopper()
    }

    /// The emulation, also where the device is a GPU.
    pub fn emulated(&self) -> Result<Emulated> {
        Emulated::open(&self.emulation, Settings::default())
    }

    /// Waits; after an error here the device does nothing more for this process.
    pub fn synchronize(&self) -> Result<()> {
        self.driver.borrow().synchronize()
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
            Ok(names.filter(|name| hopper || !name.contains("sm90")).map(str::to_string).collect())
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

/// Refuses kernels in quarantine, and waits for each launch: whatever goes wrong there is that kernel's.
pub struct Lease {
    driver: Rc<RefCell<Box<dyn Driver>>>,
    kernels: Rc<RefCell<Kernels>>,
    tell: fn(&Event),
    addresses: BTreeSet<u64>,
    graphs: Vec<Graph>,
}

impl Lease {
    fn start(&self, what: Outstanding, start: impl FnOnce(&mut dyn Driver) -> Result<()>) -> Result<()> {
        (self.tell)(&Event::Launch(match &what {
            Outstanding::Kernel(kernel) => Some(kernel.clone()),
            Outstanding::Graph => None,
        }));
        self.kernels.borrow_mut().start(what);
        let driver = &mut **self.driver.borrow_mut();
        start(driver).and_then(|()| driver.synchronize())?;
        self.kernels.borrow_mut().back();
        (self.tell)(&Event::Back);
        Ok(())
    }
}

impl Driver for Lease {
    fn name(&self) -> String {
        self.driver.borrow().name()
    }

    fn hopper(&self) -> bool {
        self.driver.borrow().hopper()
    }

    fn tensor_map(&self, map: &TensorMap) -> Result<[u8; TensorMap::BYTES]> {
        self.driver.borrow().tensor_map(map)
    }

    fn free_memory(&self) -> Result<usize> {
        self.driver.borrow().free_memory()
    }

    fn allocate(&mut self, bytes: usize) -> Result<Address> {
        let address = self.driver.borrow_mut().allocate(bytes)?;
        self.addresses.insert(address.0);
        Ok(address)
    }

    fn release(&mut self, address: Address) -> Result<()> {
        if !self.addresses.remove(&address.0) {
            return Err(Error::Device(format!("{:#x} is released and was not allocated", address.0)));
        }
        self.driver.borrow_mut().release(address)
    }

    fn stage(&mut self, to: Address, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        self.driver.borrow_mut().stage(to, bytes, fill)
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        self.driver.borrow().read(from, bytes)
    }

    fn fill(&mut self, to: Address, value: u8, bytes: usize) -> Result<()> {
        self.driver.borrow_mut().fill(to, value, bytes)
    }

    fn copy(&mut self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.driver.borrow_mut().copy(from, to, bytes)
    }

    fn function(&mut self, kernel: &str, shared_bytes: u32) -> Result<Function> {
        self.kernels.borrow_mut().ask(kernel)?;
        self.driver.borrow_mut().function(kernel, shared_bytes)
    }

    fn launch(&mut self, function: Function, launch: &Launch) -> Result<()> {
        self.start(Outstanding::Kernel(launch.kernel.clone()), |driver| driver.launch(function, launch))
    }

    fn record(&mut self, work: &mut dyn Iterator<Item = Work<'_>>) -> Result<Graph> {
        let graph = self.driver.borrow_mut().record(work)?;
        self.graphs.push(graph);
        Ok(graph)
    }

    fn replay(&mut self, graph: Graph) -> Result<()> {
        self.start(Outstanding::Graph, |driver| driver.replay(graph))
    }

    fn forget(&mut self, graph: Graph) -> Result<()> {
        self.graphs.retain(|held| *held != graph);
        self.driver.borrow_mut().forget(graph)
    }

    fn synchronize(&self) -> Result<()> {
        self.driver.borrow().synchronize()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Ok(mut driver) = self.driver.try_borrow_mut() else { return };
        // After a kernel failed every call does; the process frees all.
        for graph in &self.graphs {
            let _ = driver.forget(*graph);
        }
        for address in &self.addresses {
            let _ = driver.release(Address(*address));
        }
    }
}
