//! The driver without a GPU: the same kernels compiled for the host (`kernels/host`), opened as a shared library. For tests.
#![allow(unsafe_code)]

use super::driver::{Driver, Function, Graph, Work};
use super::launch::{Address, Launch, TensorMap};
use crate::{Error, Result};
use bytemuck::{Pod, Zeroable};
use libloading::Library;
use std::alloc::{Layout, alloc, dealloc};
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;

/// In which order the threads of a block run.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Forward = 0,
    Reverse = 1,
    /// Random, one warp far ahead of the others.
    Random = 2,
}

/// When an asynchronous copy lands.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copies {
    /// When it is waited for.
    Late = 0,
    /// When it is issued.
    Early = 1,
    Either = 2,
}

/// How kernels are run; their results must not depend on it. Matches `Settings` in kernels/host/block.h.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub order: Order,
    pub copies: Copies,
    /// Threads of the host that run blocks.
    workers: u32,
    unused: u32,
    pub seed: u64,
}

impl Settings {
    pub fn new(order: Order, copies: Copies, seed: u64) -> Settings {
        Settings { order, copies, workers: 1, unused: 0, seed }
    }

    /// The same with so many threads of the host.
    pub fn workers(self, workers: u32) -> Settings {
        Settings { workers, ..self }
    }
}

impl Default for Settings {
    fn default() -> Settings {
        Settings::new(Order::Forward, Copies::Late, 1)
    }
}

/// What the emulation takes for a tensor map. Matches `TensorMap` in kernels/host/sm90.h.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct HostTensorMap {
    from: Address,
    extents: [u64; 4],
    strides: [u64; 3],
    window: [u32; 4],
    element: u32,
    unused: [u32; 11],
}
const _: () = assert!(size_of::<HostTensorMap>() == TensorMap::BYTES);

type Count = unsafe extern "C" fn() -> u32;
type Describe = unsafe extern "C" fn(u32, *mut u32) -> *const c_char;
type Run = unsafe extern "C" fn(u32, *const u32, u32, u32, *const c_void, *const Settings, *mut c_char, usize) -> c_int;

enum Recorded {
    Launch(Function, Launch),
    Copy { from: Address, to: Address, bytes: usize },
}

/// Kernels on the host. Device memory is host memory, filled with NaN when it is allocated.
pub struct Emulated {
    run: Run,
    /// Index and parameter bytes by name.
    kernels: HashMap<String, (u32, u32)>,
    allocations: HashMap<Address, Layout>,
    /// By number; what was forgotten leaves its place empty.
    graphs: Vec<Option<Vec<Recorded>>>,
    pub settings: Settings,
    // Last, so that the library outlives the pointers into it.
    _library: Library,
}

impl Emulated {
    /// Opens a library built from kernels/host/emulation.cpp of this version.
    pub fn open(path: &Path, settings: Settings) -> Result<Emulated> {
        let wrong = |error: libloading::Error| Error::file(path, format!("is no kernel emulation: {error}"));
        let mut kernels = HashMap::new();
        // SAFETY: the library's own code runs when it is opened, which registers its kernels; the three symbols have these
        // types in kernels/host/emulation.cpp, and names are static strings of the library.
        unsafe {
            let library = Library::new(path).map_err(wrong)?;
            let count: Count = *library.get(b"rarebit_emulated_count").map_err(wrong)?;
            let describe: Describe = *library.get(b"rarebit_emulated_kernel").map_err(wrong)?;
            let run: Run = *library.get(b"rarebit_emulated_launch").map_err(wrong)?;
            for index in 0..count() {
                let mut bytes = 0;
                let name = CStr::from_ptr(describe(index, &mut bytes)).to_string_lossy().into_owned();
                kernels.insert(name, (index, bytes));
            }
            Ok(Emulated { run, kernels, allocations: HashMap::new(), graphs: vec![], settings, _library: library })
        }
    }

    /// Names of all kernels.
    pub fn kernels(&self) -> impl Iterator<Item = &str> {
        self.kernels.keys().map(String::as_str)
    }
}

impl Driver for Emulated {
    fn name(&self) -> String {
        "emulated".into()
    }

    fn hopper(&self) -> bool {
        true
    }

    fn tensor_map(&self, map: &TensorMap) -> Result<[u8; TensorMap::BYTES]> {
        let host = HostTensorMap {
            from: map.address,
            extents: map.extents.map(|n| n as u64),
            strides: map.byte_strides(),
            window: map.window.map(|n| n as u32),
            element: map.dtype.bytes() as u32,
            unused: [0; 11],
        };
        map.check()?;
        Ok(bytemuck::cast(host))
    }

    fn free_memory(&self) -> Result<usize> {
        Ok(usize::MAX)
    }

    fn allocate(&mut self, bytes: usize) -> Result<Address> {
        let refused = || Error::Memory(format!("cannot allocate {bytes} bytes"));
        let layout = Layout::from_size_align(bytes.max(1), 256).map_err(|_| refused())?;
        // SAFETY: the layout is not empty; every byte is written before anything reads it.
        let pointer = unsafe {
            let pointer = alloc(layout);
            if pointer.is_null() {
                return Err(refused());
            }
            pointer.write_bytes(0xff, layout.size());
            pointer
        };
        let address = Address(pointer as u64);
        self.allocations.insert(address, layout);
        Ok(address)
    }

    fn release(&mut self, address: Address) -> Result<()> {
        let Some(layout) = self.allocations.remove(&address) else {
            return Err(Error::Device(format!("{:#x} is not allocated, so not released", address.0)));
        };
        // SAFETY: it was allocated with this layout and is forgotten now.
        unsafe { dealloc(address.0 as *mut u8, layout) };
        Ok(())
    }

    fn stage(&mut self, to: Address, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        // SAFETY: the executor writes inside what it allocated, which `allocate` filled.
        fill(unsafe { std::slice::from_raw_parts_mut(to.0 as *mut u8, bytes) });
        Ok(())
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: the executor reads inside what it allocated.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn fill(&mut self, to: Address, value: u8, bytes: usize) -> Result<()> {
        // SAFETY: the executor writes inside what it allocated.
        unsafe { (to.0 as *mut u8).write_bytes(value, bytes) };
        Ok(())
    }

    fn copy(&mut self, from: Address, to: Address, bytes: usize) -> Result<()> {
        // SAFETY: both stretches lie inside what the executor allocated and do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, to.0 as *mut u8, bytes) };
        Ok(())
    }

    fn function(&mut self, kernel: &str, _shared: u32) -> Result<Function> {
        match self.kernels.get(kernel) {
            Some((index, _)) => Ok(Function(*index as usize)),
            None => Err(Error::Device(format!("there is no kernel '{kernel}'"))),
        }
    }

    fn launch(&mut self, function: Function, launch: &Launch) -> Result<()> {
        launch.check()?;
        let bytes = self.kernels.get(&launch.kernel).map_or(0, |kernel| kernel.1 as usize);
        if launch.params.len() != bytes {
            let what = format!("{launch}: {} bytes of parameters, the kernel takes {bytes}", launch.params.len());
            return Err(Error::Device(what));
        }
        // Parameters hold pointers and are read in place.
        let params: Vec<u64> = launch.params.chunks(8).map(word).collect();
        let mut message = [0u8; 1024];
        // SAFETY: the index came from the library, parameters have the size it asks for, the message has room.
        let failed = unsafe {
            (self.run)(
                function.0 as u32,
                launch.grid.as_ptr(),
                launch.block,
                launch.shared,
                params.as_ptr().cast(),
                &self.settings,
                message.as_mut_ptr().cast(),
                message.len(),
            )
        };
        if failed == 0 {
            return Ok(());
        }
        let message = CStr::from_bytes_until_nul(&message).map(|text| text.to_string_lossy()).unwrap_or_default();
        Err(Error::Device(format!("{launch}: {message}")))
    }

    fn record(&mut self, work: &mut dyn Iterator<Item = Work<'_>>) -> Result<Graph> {
        let own = |work: Work<'_>| match work {
            Work::Launch(function, launch) => Recorded::Launch(function, launch.clone()),
            Work::Copy { from, to, bytes } => Recorded::Copy { from, to, bytes },
        };
        self.graphs.push(Some(work.map(own).collect()));
        Ok(Graph(self.graphs.len() - 1))
    }

    fn replay(&mut self, graph: Graph) -> Result<()> {
        // Out of the list while it runs, for a launch borrows all of `self`.
        let Some(work) = self.graphs.get_mut(graph.0).and_then(Option::take) else { return Err(not_recorded(graph)) };
        let started = work.iter().try_for_each(|work| match work {
            Recorded::Launch(function, launch) => self.launch(*function, launch),
            Recorded::Copy { from, to, bytes } => self.copy(*from, *to, *bytes),
        });
        self.graphs[graph.0] = Some(work);
        started
    }

    fn forget(&mut self, graph: Graph) -> Result<()> {
        let held = self.graphs.get_mut(graph.0).and_then(Option::take);
        held.map(|_| ()).ok_or_else(|| not_recorded(graph))
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

fn not_recorded(graph: Graph) -> Error {
    Error::Device(format!("graph {} is not recorded", graph.0))
}

impl Drop for Emulated {
    fn drop(&mut self) {
        for address in self.allocations.keys().copied().collect::<Vec<_>>() {
            let _ = self.release(address);
        }
    }
}

/// Up to eight bytes as a word in memory order.
fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_ne_bytes(word)
}
