//! A CUDA GPU as a `Driver`: the only folder that talks to NVIDIA's driver library, which is looked for when the program runs.
//!
//! It calls the driver through cudarc's `result` layer, one function for one function. cudarc's own streams and slices record events
//! around every use of a buffer; here is one stream in which everything happens in order, so nothing needs them.
#![allow(unsafe_code)]

mod graphs;
mod images;
mod library;
mod staging;
mod tensor_map;
mod throttle;

use super::driver::{Driver, Function, Graph, Work};
use super::kernels::{self, HOPPER};
use super::launch::{Address, Launch, TensorMap};
use crate::{Error, Result};
use cudarc::driver::{DriverError, result, sys};
use graphs::Graphs;
use images::{FOLDER, Image, images};
use library::{Version, Words, failed, find, version};
use staging::Staging;
use std::collections::{BTreeMap, HashMap};
use std::env;
use std::ffi::{CStr, CString, c_int, c_void};
use std::fmt;
use std::path::PathBuf;
pub use throttle::AHEAD;
use throttle::Throttle;

/// Ampere: the first with asynchronous copies and bf16 in the tensor cores.
const OLDEST_ARCH: c_int = 80;

/// One GPU with all kernels of this build loaded. The context is made current in every call: a `Gpu` may move between threads.
pub struct Gpu {
    /// For messages: `cuda:0 (NVIDIA H200, sm_90)`.
    name: String,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    staging: Option<Staging>,
    throttle: Option<Throttle>,
    graphs: Graphs,
    modules: Vec<sys::CUmodule>,
    kernels: Vec<Kernel>,
    by_name: HashMap<String, Function>,
    /// Bytes by address of what `allocate` returned.
    allocations: BTreeMap<u64, usize>,
    /// As nvcc names it, without a letter.
    arch: c_int,
    /// Bytes of shared memory that a block can have.
    shared_limit: u32,
    last_launch: Option<Function>,
}

struct Kernel {
    name: String,
    handle: sys::CUfunction,
    /// Bytes of its one parameter.
    params: usize,
    /// Bytes of dynamic shared memory that it is ready for.
    shared: u32,
}

/// What a kernel takes of the device, as the driver reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Of one thread.
    pub registers: u32,
    /// Bytes of static shared memory of a block.
    pub shared: u32,
    /// Bytes of local memory of a thread.
    pub local: u32,
    /// The most threads a block can have.
    pub threads: u32,
}

// SAFETY: the handles belong to the process, not to a thread; every method makes the context current before it uses them.
unsafe impl Send for Gpu {}

impl Gpu {
    /// Opens a device and loads the kernels; an error says what is missing. `RAREBIT_KERNELS` names a folder of files that are loaded
    /// in place of embedded ones.
    pub fn new(ordinal: usize) -> Result<Gpu> {
        let name = format!("cuda:{ordinal}");
        let device = find(ordinal, &name)?;
        let attribute = |which| {
            // SAFETY: `device` is from `device::get`.
            unsafe { result::device::get_attribute(device, which) }.map_err(|e| failed(&name, "asking what it is", e))
        };
        use sys::CUdevice_attribute as Attribute;
        let arch = 10 * attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
            + attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let shared_limit = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32;
        let model = result::device::get_name(device).map_err(|e| failed(&name, "asking its name", e))?;
        let name = format!("{name} ({model}, sm_{arch})");
        if arch < OLDEST_ARCH {
            return Err(Error::Device(format!("{name}: the kernels need sm_{OLDEST_ARCH} or newer; use --device cpu")));
        }
        if kernels::FAT_BINARIES.is_empty() {
            return Err(Error::Device(format!(
                "{name}: this build has no CUDA kernels; run tools/install-nvcc and build with RAREBIT_REQUIRE_KERNELS=1, \
                 or use --device cpu"
            )));
        }

        let folder = env::var_os(FOLDER).filter(|folder| !folder.is_empty()).map(PathBuf::from);
        let images = images(kernels::FAT_BINARIES, folder.as_deref())?;

        // SAFETY: `device` is from `device::get`; the reference is given back when `gpu` is dropped.
        let context =
            unsafe { result::primary_ctx::retain(device) }.map_err(|e| failed(&name, "making a context", e))?;
        // From here on what is made is in `gpu`, and an early return frees it.
        let mut gpu = Gpu {
            name,
            device,
            context,
            stream: std::ptr::null_mut(),
            staging: None,
            throttle: None,
            graphs: Graphs::default(),
            modules: Vec::new(),
            kernels: Vec::new(),
            by_name: HashMap::new(),
            allocations: BTreeMap::new(),
            arch,
            shared_limit,
            last_launch: None,
        };
        gpu.bind()?;
        // The default stream cannot be captured, and a blocking one waits for it.
        gpu.stream = gpu.check("making a stream", result::stream::create(result::stream::StreamKind::NonBlocking))?;
        // SAFETY: the context is current, as in every call.
        let staging = unsafe { Staging::new() };
        gpu.staging = Some(gpu.check("allocating page-locked memory", staging)?);
        gpu.throttle = Some(gpu.check("making events", Throttle::new())?);
        images.iter().try_for_each(|image| gpu.load(image))?;
        Ok(gpu)
    }

    /// Where a device is on the bus, as NVIDIA's tools name it.
    pub fn bus_address(ordinal: usize) -> Result<String> {
        let name = format!("cuda:{ordinal}");
        let device = find(ordinal, &name)?;
        let mut text = [0u8; 32];
        // SAFETY: writes at most as many bytes as `text` has, the last of them 0.
        let asked = unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), text.len() as c_int, device) };
        asked.result().map_err(|error| failed(&name, "asking where it is", error))?;
        let address = CStr::from_bytes_until_nul(&text).map(|text| text.to_string_lossy().into_owned());
        Ok(address.unwrap_or_default())
    }

    /// Whether a file that was compiled for these architectures alone, or for any, is for this device.
    fn takes(&self, architectures: &str) -> bool {
        let arch = self.arch.to_string();
        architectures.is_empty() || architectures.split(',').any(|one| one.trim_end_matches(['a', 'f']) == arch)
    }

    /// Loads what is for this device; a file that is not, though it was asked for, is an error.
    fn load(&mut self, image: &Image) -> Result<()> {
        let Image { stem, only, code, file } = image;
        match file {
            None if !self.takes(only) => return Ok(()),
            Some(file) if !self.takes(only) => {
                let what = format!("{}: {} is for sm_{only} alone ({FOLDER})", self.name, file.display());
                return Err(Error::Device(what));
            }
            None => {}
            Some(file) => eprintln!("{}: kernels/{stem}.cu is {file:?} ({FOLDER})", self.name),
        }
        // SAFETY: `code` is a whole file as nvcc wrote it, aligned to 16 bytes, and is never freed.
        let module = unsafe { result::module::load_data(code.as_ptr().cast::<c_void>()) };
        let why = match module {
            Ok(module) => {
                self.modules.push(module);
                return Ok(());
            }
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU)) if file.is_some() => {
                format!("was compiled for another GPU than sm_{}", self.arch)
            }
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU)) => {
                format!("was built for {} alone; build without RAREBIT_CUDA_ARCHS", kernels::ARCHITECTURES)
            }
            Err(DriverError(sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION)) => {
                "is from a newer CUDA than the driver's; update NVIDIA's driver, or build with an older nvcc".into()
            }
            Err(error) => format!("does not load: {}", Words(error)),
        };
        let name = file.as_ref().map_or_else(|| format!("kernels/{stem}.cu"), |file| file.display().to_string());
        Err(Error::Device(format!("{}: {name} {why}", self.name)))
    }

    /// How many multiprocessors it has.
    pub fn multiprocessors(&self) -> Result<usize> {
        use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as COUNT;
        // SAFETY: `device` is from `device::get`.
        let count = unsafe { result::device::get_attribute(self.device, COUNT) };
        self.check("asking what it is", count).map(|count| count as usize)
    }

    /// The newest CUDA the driver knows, such as 13.0.
    pub fn driver_version(&self) -> Result<String> {
        self.check("asking the driver's version", version()).map(|version| Version(version).to_string())
    }

    /// Registers and memory of a kernel.
    pub fn resources(&self, function: Function) -> Result<Resources> {
        self.bind()?;
        let kernel = &self.kernels[function.0];
        let attribute = |which| {
            // SAFETY: the handle is from a module that is loaded as long as `self` lives.
            let value = unsafe { result::function::get_function_attribute(kernel.handle, which) };
            self.check(format_args!("asking about {}", kernel.name), value).map(|value| value as u32)
        };
        use sys::CUfunction_attribute as Attribute;
        Ok(Resources {
            registers: attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            shared: attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
            local: attribute(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            threads: attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        })
    }

    /// Looks a kernel up in all modules.
    fn resolve(&self, name: &str) -> Result<Kernel> {
        let missing = || Error::Device(format!("{}: this build has no kernel '{name}' in kernels/", self.name));
        let symbol = CString::new(name).map_err(|_| missing())?;
        let handle = self.modules.iter().find_map(|&module| {
            // SAFETY: the module is loaded.
            match unsafe { result::module::get_function(module, symbol.clone()) } {
                Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND)) => None,
                found => Some(found),
            }
        });
        let loading = format_args!("loading {name}");
        let handle = self.check(loading, handle.ok_or_else(missing)?)?;
        // The driver loads code lazily, which may allocate and would break the capture of a graph: now is better.
        // SAFETY: the handle is from a module that is loaded.
        self.check(loading, unsafe { sys::cuFuncLoad(handle) }.result())?;
        let size = |index| {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: as above; an index past the last parameter is an error, not undefined.
            unsafe { sys::cuFuncGetParamInfo(handle, index, &mut offset, &mut size) }.result().ok().map(|()| size)
        };
        match (size(0), size(1)) {
            (Some(params), None) => Ok(Kernel { name: name.to_string(), handle, params, shared: 0 }),
            _ => Err(Error::Device(format!("{}: kernel '{name}' must take one parameter, a structure", self.name))),
        }
    }

    /// Refuses what does not lie in one allocation: the driver may take any other address for one of the host.
    fn within(&self, operation: &str, address: Address, bytes: usize) -> Result<()> {
        let below = self.allocations.range(..=address.0).next_back();
        let inside = below.is_some_and(|(start, size)| {
            let offset = (address.0 - start) as usize;
            bytes <= size.saturating_sub(offset)
        });
        if inside {
            return Ok(());
        }
        Err(Error::Device(format!(
            "{}: {operation} {bytes} bytes at {:#x}: not in one allocation",
            self.name, address.0
        )))
    }

    /// Puts a kernel on the stream, whose context is current.
    fn start(&self, function: Function, launch: &Launch) -> Result<()> {
        let kernel = &self.kernels[function.0];
        if launch.params.len() != kernel.params {
            return Err(Error::Device(format!(
                "{}: kernel '{}' takes {} bytes of parameters, its launch has {}",
                self.name,
                kernel.name,
                kernel.params,
                launch.params.len()
            )));
        }
        let [x, y, z] = launch.grid;
        let mut params = [launch.params.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the handle is from a loaded module; it has one parameter of as many bytes as `params` points to, and the driver
        // copies them before it returns. What the kernel does with the addresses in them is its contract with the launch.
        let launched = unsafe {
            result::launch_kernel(
                kernel.handle,
                (x, y, z),
                (launch.block, 1, 1),
                launch.shared,
                self.stream,
                &mut params,
            )
        };
        self.check(format_args!("launching {launch}"), launched)
    }

    fn start_copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.within("copying from", from, bytes)?;
        self.within("copying to", to, bytes)?;
        // SAFETY: source and destination are in allocations.
        self.check("copying", unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, self.stream) })
    }

    fn not_recorded(&self, graph: Graph) -> Error {
        Error::Device(format!("{}: graph {} is not recorded", self.name, graph.0))
    }

    fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained until `self` is dropped.
        self.check("making its context current", unsafe { result::ctx::set_current(self.context) })
    }

    fn check<T>(&self, operation: impl fmt::Display, result: Result<T, DriverError>) -> Result<T> {
        result.map_err(|error| failed(&self.name, operation, error))
    }

    /// Waits for the stream. An error may be of any launch since the last wait, and says so.
    fn wait(&self, operation: &str) -> Result<()> {
        // SAFETY: the stream is destroyed only when `self` is dropped.
        let result = unsafe { result::stream::synchronize(self.stream) };
        match self.last_launch {
            None => self.check(operation, result),
            Some(last) => {
                let last = &self.kernels[last.0].name;
                let operation = format_args!(
                    "{operation}; the last launch was {last} (CUDA_LAUNCH_BLOCKING=1 shows which one failed)"
                );
                self.check(operation, result)
            }
        }
    }
}

/// `Gpu::new` failed half-way.
fn unready(name: &str) -> Error {
    Error::Device(format!("{name} is not ready"))
}

/// Why a recording failed: the driver's own words, or an error that has words already.
enum Captured {
    Driver(DriverError),
    Other(Error),
}

impl From<DriverError> for Captured {
    fn from(error: DriverError) -> Captured {
        Captured::Driver(error)
    }
}

impl Driver for Gpu {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn hopper(&self) -> bool {
        kernels::FAT_BINARIES.iter().any(|(_, only, _)| *only == HOPPER && self.takes(only))
    }

    fn tensor_map(&self, map: &TensorMap) -> Result<[u8; TensorMap::BYTES]> {
        map.check()?;
        self.bind()?;
        self.check(format_args!("describing {map:?}"), tensor_map::encode(map))
    }

    fn free_memory(&self) -> Result<usize> {
        self.bind()?;
        self.check("asking for free memory", result::mem_get_info()).map(|(free, _)| free)
    }

    fn allocate(&mut self, bytes: usize) -> Result<Address> {
        self.bind()?;
        // SAFETY: a call without preconditions; the driver refuses zero bytes, and aligns to 256 at least.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(address) => {
                self.allocations.insert(address, bytes);
                Ok(Address(address))
            }
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Err(Error::Memory(format!(
                "{}: cannot allocate {bytes} bytes, {} are free; use a smaller --batch or --size",
                self.name,
                self.free_memory()?
            ))),
            Err(error) => self.check(format_args!("allocating {bytes} bytes"), Err(error)),
        }
    }

    fn release(&mut self, address: Address) -> Result<()> {
        self.bind()?;
        if self.allocations.remove(&address.0).is_none() {
            return Err(Error::Device(format!("{}: {:#x} is not allocated, so not released", self.name, address.0)));
        }
        // SAFETY: `allocate` returned it and it was not released since; the driver waits for work that still uses it.
        self.check("releasing memory", unsafe { result::free_sync(address.0) })
    }

    fn stage(&mut self, to: Address, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        self.within("writing", to, bytes)?;
        let Some(staging) = &mut self.staging else { return Err(unready(&self.name)) };
        // SAFETY: the context is current; the destination is in an allocation; nothing stages while a graph is recorded.
        let sent = unsafe { staging.send(self.stream, to.0, bytes, fill) };
        self.check("writing", sent)
    }

    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        self.within("reading", from, bytes.len())?;
        // SAFETY: the source is in an allocation; the wait below keeps `bytes` borrowed until the copy is done.
        self.check("reading", unsafe { result::memcpy_dtoh_async(bytes, from.0, self.stream) })?;
        self.wait("reading")
    }

    fn fill(&mut self, to: Address, value: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        self.within("filling", to, bytes)?;
        // SAFETY: the destination is in an allocation.
        self.check("filling", unsafe { result::memset_d8_async(to.0, value, bytes, self.stream) })
    }

    fn copy(&mut self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.bind()?;
        self.start_copy(from, to, bytes)
    }

    fn function(&mut self, kernel: &str, shared: u32) -> Result<Function> {
        self.bind()?;
        let function = match self.by_name.get(kernel) {
            Some(&function) => function,
            None => {
                self.kernels.push(self.resolve(kernel)?);
                let function = Function(self.kernels.len() - 1);
                self.by_name.insert(kernel.to_string(), function);
                function
            }
        };
        if shared > self.kernels[function.0].shared {
            let limit = self.shared_limit.saturating_sub(self.resources(function)?.shared);
            if shared > limit {
                return Err(Error::Device(format!(
                    "{}: kernel '{kernel}' wants {shared} bytes of dynamic shared memory and can have {limit}",
                    self.name
                )));
            }
            use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as DYNAMIC_SHARED;
            let handle = self.kernels[function.0].handle;
            // SAFETY: the handle is from a module that is loaded as long as `self` lives.
            let set = unsafe { result::function::set_function_attribute(handle, DYNAMIC_SHARED, shared as i32) };
            self.check(format_args!("giving {kernel} {shared} bytes of shared memory"), set)?;
            self.kernels[function.0].shared = shared;
        }
        Ok(function)
    }

    fn launch(&mut self, function: Function, launch: &Launch) -> Result<()> {
        self.bind()?;
        self.start(function, launch)?;
        self.last_launch = Some(function);
        Ok(())
    }

    fn record(&mut self, work: &mut dyn Iterator<Item = Work<'_>>) -> Result<Graph> {
        self.bind()?;
        let mut graphs = std::mem::take(&mut self.graphs);
        let gpu = &*self;
        let start = || {
            for work in work {
                match work {
                    Work::Launch(function, launch) => gpu.start(function, launch),
                    Work::Copy { from, to, bytes } => gpu.start_copy(from, to, bytes),
                }
                .map_err(Captured::Other)?;
            }
            Ok(())
        };
        // SAFETY: the context is current; the executor forgets the graph before the memory it names is given back, and modules are
        // unloaded last.
        let recorded = unsafe { graphs.record(gpu.stream, start) };
        self.graphs = graphs;
        recorded.map_err(|error| match error {
            Captured::Driver(error) => failed(&self.name, "recording a graph", error),
            Captured::Other(error) => error,
        })
    }

    fn replay(&mut self, graph: Graph) -> Result<()> {
        self.bind()?;
        let Some(held) = self.graphs.get(graph) else { return Err(self.not_recorded(graph)) };
        let (stream, Some(throttle)) = (self.stream, &mut self.throttle) else { return Err(unready(&self.name)) };
        // SAFETY: the context is current, nothing is being captured, and the graph is held, so it was not destroyed.
        let launched = unsafe { throttle.start(stream, || result::graph::launch(held, stream)) };
        self.last_launch = None;
        self.check("starting a graph", launched)
    }

    fn forget(&mut self, graph: Graph) -> Result<()> {
        self.bind()?;
        let Some(held) = self.graphs.take(graph) else { return Err(self.not_recorded(graph)) };
        // SAFETY: it was made by `record` and is forgotten now; the driver waits where it is running.
        self.check("giving a graph back", unsafe { result::graph::exec_destroy(held) })
    }

    fn synchronize(&self) -> Result<()> {
        self.bind()?;
        self.wait("waiting")
    }
}

impl Drop for Gpu {
    /// Errors are let go: after a kernel failed every call fails, and the process that ends frees all.
    fn drop(&mut self) {
        if self.bind().is_ok() {
            // SAFETY: each handle was made by `self`, is freed once, and is not used afterwards; the driver waits for running work
            // before it frees memory, and unloading comes after that.
            unsafe {
                let _ = result::stream::synchronize(self.stream);
                self.graphs.free();
                if let Some(staging) = self.staging.take() {
                    staging.free();
                }
                if let Some(throttle) = self.throttle.take() {
                    throttle.free();
                }
                for address in self.allocations.keys() {
                    let _ = result::free_sync(*address);
                }
                for module in &self.modules {
                    let _ = result::module::unload(*module);
                }
                if !self.stream.is_null() {
                    let _ = result::stream::destroy(self.stream);
                }
            }
        }
        // SAFETY: retained in `new`.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On any machine: a device that works, or one line about what is missing.
    #[test]
    fn opens_or_says_what_is_missing() {
        let mut gpu = match Gpu::new(0) {
            Ok(gpu) => gpu,
            Err(error) => {
                let text = error.to_string();
                assert!(!text.contains('\n'), "{text}");
                assert!(
                    ["driver", "CUDA device", "CUDA kernels", "sm_"].iter().any(|what| text.contains(what)),
                    "{text}"
                );
                return;
            }
        };
        let (bytes, half) = (1 << 20, 1 << 19);
        let data: Vec<u8> = (0..bytes).map(|i| (i % 251) as u8).collect();
        let free = gpu.free_memory().unwrap();
        let address = gpu.allocate(bytes).unwrap();
        assert!(address.0.is_multiple_of(256) && free >= bytes);
        gpu.write(address, &data).unwrap();
        gpu.fill(address, 7, 16).unwrap();
        gpu.copy(address, address.offset(half), half).unwrap();
        let mut back = vec![0; bytes];
        gpu.read(address, &mut back).unwrap();
        assert_eq!(back[..16], [7; 16]);
        assert_eq!(back[16..half], data[16..half]);
        assert_eq!(back[half..], back[..half]);

        assert!(gpu.read(address.offset(1), &mut back).is_err(), "past the end");
        assert!(gpu.function("no such kernel", 0).unwrap_err().to_string().contains("no such kernel"));
        gpu.release(address).unwrap();
        assert!(gpu.release(address).is_err(), "twice");
        gpu.synchronize().unwrap();
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error() {
        assert!(Gpu::new(10_000).is_err());
    }
}
