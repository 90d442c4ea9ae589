//! The CUDA executor: planned programs as lists of kernel launches over one arena, on a GPU or on the host emulation of one.
//!
//! An op becomes launches by a pure function of its family (`gemm`, `conv2d`, ...): which kernel, what grid, which parameters.
//! Everything above [`Driver`] is the same lines on both devices. Launches are made when a program is loaded; its first run starts
//! them one by one, the second records them as a graph, and from then on a run is one call. A run allocates nothing and waits for
//! nothing: [`Executor::read`] does.

mod attention;
mod conv2d;
mod cx;
mod device;
mod driver;
mod elementwise;
mod embedding;
mod emulated;
mod epilogue;
mod explain;
mod gemm;
mod group_norm;
pub mod kernels;
mod launch;
mod norm;
mod nvml;
mod rates;
mod reduce;
mod resample;
mod rowwise;
mod shape;
mod sm90_gemm;
mod store;
mod tiles;
mod update;

pub use device::{AHEAD, Gpu, Resources};
pub use driver::{Driver, Function, Graph, Work};
pub use emulated::{Copies, Emulated, Order, Settings};
pub use explain::{Explained, PEAKS, Peak, Planner, Row, explain};
pub use launch::{Address, Divisor, Launch, TensorMap};
pub use nvml::NvmlDevice;
pub use rates::{MULTIPROCESSORS, TABLE, Table};
pub use shape::{Cut, Hopper, Lines, Rates, Shape, Tile};

use super::guard::{self, Guard, describe};
use super::{Data, DataMut, Executor, ProgramId, weight_layout};
use crate::plan::Planned;
use crate::program::{DType, Node, Op, Origin, Program, ValueId};
use crate::weights::Model;
use crate::{Error, Result};
use cx::Cx;
use store::Store;

/// Weights that are read from disk while one is converted and copied.
const WEIGHTS_AHEAD: usize = 8;

/// Runs programs of type f32, f16 or bf16 on a [`Driver`].
pub struct Cuda {
    driver: Box<dyn Driver>,
    store: Store,
    programs: Vec<Loaded>,
    arena: Address,
    arena_bytes: usize,
    guards: bool,
    check_finite: bool,
    graphs: bool,
    hopper: Hopper,
}

/// A program with its launches.
struct Loaded {
    planned: Planned,
    /// What it was planned for.
    hopper: Hopper,
    /// Per value: where its weight or buffer lies; null for what ops make.
    outside: Vec<Address>,
    /// Per value: where it lies now.
    addresses: Vec<Address>,
    /// What the output buffers are copied from that no op writes itself: address in the arena, buffer, bytes.
    outputs: Vec<(Address, Address, usize)>,
    /// Per op.
    launches: Vec<Vec<(Function, Launch)>>,
    /// Index buffers and the bounds their entries must keep.
    bounds: Vec<store::Bounds>,
    replay: Replay,
}

/// How a program runs next.
#[derive(Clone, Copy)]
enum Replay {
    /// Launch by launch: errors name their op, and what the driver loads lazily is loaded.
    Cold,
    /// To be recorded.
    Warm,
    /// As it was recorded.
    Ready(Graph),
}

impl Cuda {
    pub fn new(driver: Box<dyn Driver>) -> Cuda {
        let hopper = Hopper::Auto.where_it_can(driver.hopper());
        Cuda {
            hopper,
            driver,
            store: Store::default(),
            programs: vec![],
            arena: Address::NULL,
            arena_bytes: 0,
            guards: false,
            check_finite: false,
            graphs: true,
        }
    }

    /// Whether programs are recorded as graphs; without, every run starts them launch by launch, with the same bits.
    pub fn with_graphs(mut self, on: bool) -> Cuda {
        self.graphs = on;
        self
    }

    /// What the kernels for Hopper do, where the driver has them.
    pub fn with_hopper(mut self, hopper: Hopper) -> Cuda {
        self.set_hopper(hopper);
        self
    }

    /// The same for programs that are planned and loaded from now on.
    pub fn set_hopper(&mut self, hopper: Hopper) {
        self.hopper = hopper.where_it_can(self.driver.hopper());
    }

    /// What the kernels for Hopper do.
    pub fn hopper(&self) -> Hopper {
        self.hopper
    }

    /// For tests, slow: fills dead memory with NaN and fails when an op writes outside its outputs and workspace.
    pub fn with_guards(mut self, on: bool) -> Cuda {
        self.guards = on;
        self
    }

    /// Fails at the first op whose output is not finite, naming it.
    pub fn check_finite(mut self, on: bool) -> Cuda {
        self.check_finite = on;
        self
    }

    /// The launches of a program once it is loaded, per op.
    pub fn launches(&self, program: ProgramId) -> impl Iterator<Item = impl Iterator<Item = &Launch>> {
        self.programs[program.0].launches.iter().map(|op| op.iter().map(|(_, launch)| launch))
    }

    /// Where a program's weights and buffers lie, fetched and made if they are not held yet.
    fn outside(&mut self, program: &Program, weights: &Model) -> Result<Vec<Address>> {
        let driver = &mut *self.driver;
        let mut ahead = program.weights().map(|(id, weight)| (weight, program.value(id).dtype));
        self.store.prefetch(ahead.by_ref().take(WEIGHTS_AHEAD), weights);
        let mut outside = Vec::with_capacity(program.values.len());
        for value in &program.values {
            outside.push(match &value.origin {
                Origin::Input(name) => self.store.buffer(driver, program, name, value)?,
                Origin::Weight(weight) => {
                    self.store.prefetch(ahead.next().into_iter(), weights);
                    self.store.weight(driver, weight, value.dtype, weights)?
                }
                Origin::Op(_) => Address::NULL,
            });
        }
        for (name, id) in &program.outputs {
            self.store.buffer(driver, program, name, program.value(*id))?;
        }
        Ok(outside)
    }

    /// Starts one op of a program, and with `wait` waits for it. Ops run in order, and [`Cuda::copy_outputs`] after the last.
    pub(super) fn run_op(&mut self, program: ProgramId, op: usize, wait: bool) -> Result<()> {
        let Loaded { launches, planned, .. } = &self.programs[program.0];
        let failed = |error: Error| Error::Device(describe(&planned.program, op, &error.to_string()));
        for (function, launch) in &launches[op] {
            self.driver.launch(*function, launch).map_err(failed)?;
        }
        if wait { self.driver.synchronize().map_err(failed) } else { Ok(()) }
    }

    /// Where that is asked for, fails if op `index`, which has just run, made what is not finite.
    pub(super) fn check_op(&self, id: ProgramId, index: usize) -> Result<()> {
        if !self.check_finite {
            return Ok(());
        }
        let program = &self.programs[id.0].planned.program;
        for &output in &program.nodes[index].outputs {
            let Some(found) = self.not_finite(id, output)? else { continue };
            let mut spoiled = vec![];
            for weight in guard::weights(program, index) {
                spoiled.extend(self.not_finite(id, weight)?.map(|_| weight));
            }
            return Err(guard::not_finite(program, index, output, found, &spoiled));
        }
        Ok(())
    }

    /// Checks the index buffers of a program.
    pub(super) fn check_bounds(&self, program: ProgramId) -> Result<()> {
        let loaded = &self.programs[program.0];
        self.store.check(&loaded.planned.program, &loaded.bounds)
    }

    pub(super) fn copy_outputs(&mut self, program: ProgramId) -> Result<()> {
        self.programs[program.0].outputs.iter().try_for_each(|&(from, to, bytes)| self.driver.copy(from, to, bytes))
    }

    /// What a value of a program holds now, read from the device.
    pub(super) fn value(&self, program: ProgramId, id: ValueId) -> Result<Vec<f64>> {
        let (dtype, bytes) = self.bytes(program, id)?;
        Ok(store::to_f64(dtype, &bytes))
    }

    fn bytes(&self, program: ProgramId, id: ValueId) -> Result<(DType, Vec<u8>)> {
        let Loaded { planned: Planned { program, .. }, addresses, .. } = &self.programs[program.0];
        let value = program.value(id);
        let mut bytes = vec![0; value.bytes()];
        self.driver.read(addresses[id.index()], &mut bytes)?;
        Ok((value.dtype, bytes))
    }

    /// The first element of a value that is not finite.
    fn not_finite(&self, program: ProgramId, id: ValueId) -> Result<Option<(usize, f64)>> {
        let (dtype, bytes) = self.bytes(program, id)?;
        Ok(store::not_finite(dtype, &bytes))
    }

    /// Makes the launches of a program for where the arena lies now.
    fn place(&mut self, index: usize) -> Result<()> {
        self.unrecord(index)?;
        let Loaded { planned: Planned { program, plan }, outside, hopper, .. } = &self.programs[index];
        let mut addresses = outside.clone();
        for (address, region) in addresses.iter_mut().zip(&plan.regions) {
            if let Some(region) = region {
                *address = self.arena.offset(region.offset);
            }
        }
        let mut outputs = vec![];
        for (index, (name, id)) in program.outputs.iter().enumerate() {
            let buffer = self.store.address(name)?;
            match writes_buffer(program, index) {
                true => addresses[id.index()] = buffer,
                false => outputs.push((addresses[id.index()], buffer, program.value(*id).bytes())),
            }
        }
        let mut launches = Vec::with_capacity(program.nodes.len());
        for (op, node) in program.nodes.iter().enumerate() {
            let workspace = plan.workspace[op].map_or(Address::NULL, |region| self.arena.offset(region.offset));
            let cx = Cx { program, node, addresses: &addresses, workspace, hopper: *hopper };
            let mut found = vec![];
            for mut launch in launches_of(&cx) {
                let failed = |error: Error| Error::Device(describe(program, op, &error.to_string()));
                launch.check().map_err(failed)?;
                launch.encode_maps(&*self.driver).map_err(failed)?;
                found.push((self.driver.function(&launch.kernel, launch.shared).map_err(failed)?, launch));
            }
            launches.push(found);
        }
        let loaded = &mut self.programs[index];
        (loaded.addresses, loaded.launches, loaded.outputs) = (addresses, launches, outputs);
        Ok(())
    }

    /// Gives a recording back, whose addresses hold no longer.
    fn unrecord(&mut self, index: usize) -> Result<()> {
        match std::mem::replace(&mut self.programs[index].replay, Replay::Cold) {
            Replay::Ready(graph) => self.driver.forget(graph),
            Replay::Cold | Replay::Warm => Ok(()),
        }
    }

    /// Starts a program launch by launch; with checks, looks after every op.
    fn start(&mut self, program: ProgramId) -> Result<()> {
        let inspected = self.guards || self.check_finite;
        let mut guard = None;
        if self.guards {
            let mut arena = vec![0; self.arena_bytes];
            guard = Some(Guard::new(&mut arena));
            self.driver.write(self.arena, &arena)?;
        }
        for op in 0..self.programs[program.0].launches.len() {
            self.run_op(program, op, inspected)?;
            if inspected {
                self.inspect(program, op, &mut guard)?;
            }
        }
        self.copy_outputs(program)
    }

    fn record(&mut self, program: ProgramId) -> Result<Graph> {
        let Loaded { launches, outputs, .. } = &self.programs[program.0];
        let started = launches.iter().flatten().map(|(function, launch)| Work::Launch(*function, launch));
        let copies = outputs.iter().map(|&(from, to, bytes)| Work::Copy { from, to, bytes });
        self.driver.record(&mut started.chain(copies))
    }

    /// After op `index`, in tests and with `--check-finite`.
    fn inspect(&mut self, program: ProgramId, index: usize, guard: &mut Option<Guard>) -> Result<()> {
        let planned = &self.programs[program.0].planned;
        if let Some(guard) = guard {
            let mut arena = vec![0; self.arena_bytes];
            self.driver.read(self.arena, &mut arena)?;
            guard.check(planned, index, &mut arena)?;
            self.driver.write(self.arena, &arena)?;
        }
        self.check_op(program, index)
    }
}

/// Whether the op that makes an output may write it where it is kept, instead of a copy at the end: no other output is the same
/// value, and no op reads the buffer's old content after that op, which itself may only overwrite it element by element.
fn writes_buffer(program: &Program, index: usize) -> bool {
    let (name, id) = &program.outputs[index];
    let Origin::Op(maker) = program.value(*id).origin else { return false };
    let mut same = program.outputs.iter().filter(|(_, other)| other == id);
    let Some(old) = program.input(name) else { return same.nth(1).is_none() };
    let node = &program.nodes[maker];
    let reads = |node: &Node| node.op.inputs().iter().filter(|read| **read == old).count();
    let in_place = node.op.may_alias() == Some(old) && node.outputs[0] == *id;
    let kept = reads(node) <= usize::from(in_place) && program.nodes[maker + 1..].iter().all(|node| reads(node) == 0);
    same.nth(1).is_none() && kept
}

fn launches_of(cx: &Cx) -> Vec<Launch> {
    match &cx.node.op {
        Op::Gemm(op) => gemm::launches(op, cx),
        Op::GemmBackward(op) => gemm::backward(op, cx),
        Op::Conv2d(op) => conv2d::launches(op, cx),
        Op::Conv2dBackward(op) => conv2d::backward(op, cx),
        Op::Attention(op) => attention::launches(op, cx),
        Op::AttentionBackward(op) => attention::backward(op, cx),
        Op::Norm(op) => norm::launches(op, cx),
        Op::Rowwise(op) => rowwise::launches(op, cx),
        Op::Elementwise(op) => elementwise::launches(op, cx),
        Op::Resample(op) => resample::launches(op, cx),
        Op::Embedding(op) => embedding::launches(op, cx),
        Op::Update(op) => update::launches(op, cx),
    }
}

/// The product that an op is, if it is one.
pub fn product(program: &Program, node: &Node, hopper: Hopper) -> Option<Shape> {
    match &node.op {
        Op::Gemm(op) => Some(gemm::shape(op, program, hopper)),
        Op::GemmBackward(op) => Some(gemm::backward_shape(op, program, hopper)),
        Op::Conv2d(op) => Some(conv2d::shape(op, program, node.outputs[0], hopper)),
        Op::Conv2dBackward(op) => Some(conv2d::backward_shape(op, program, node.outputs[0], hopper)),
        Op::Attention(_) | Op::AttentionBackward(_) | Op::Norm(_) | Op::Rowwise(_) | Op::Elementwise(_) => None,
        Op::Resample(_) | Op::Embedding(_) | Op::Update(_) => None,
    }
}

/// Refuses a program with a product that cannot be cut as it is forced to be.
fn check_forced(program: &Program, hopper: Hopper) -> Result<()> {
    let Hopper::Forced(cut) = hopper else { return Ok(()) };
    for (op, node) in program.nodes.iter().enumerate() {
        let Some(product) = product(program, node, hopper) else { continue };
        product.check(&cut).map_err(|why| Error::Device(describe(program, op, &why)))?;
    }
    Ok(())
}

/// Bytes of scratch an op needs.
fn workspace(program: &Program, node: &Node, hopper: Hopper) -> usize {
    match &node.op {
        Op::Gemm(_) | Op::GemmBackward(_) | Op::Conv2d(_) | Op::Conv2dBackward(_) => {
            product(program, node, hopper).map_or(0, |product| product.workspace())
        }
        Op::AttentionBackward(op) => attention::backward_workspace(op, program),
        Op::Norm(op) => norm::workspace(op, program),
        Op::Resample(op) => resample::workspace(op, program),
        Op::Attention(_) | Op::Rowwise(_) | Op::Elementwise(_) | Op::Embedding(_) | Op::Update(_) => 0,
    }
}

impl Executor for Cuda {
    fn workspace(&self, program: &Program, node: &Node) -> usize {
        workspace(program, node, self.hopper)
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        self.driver.free_memory().map(Some)
    }

    fn load(&mut self, planned: Planned, weights: &Model) -> Result<ProgramId> {
        let program = &planned.program;
        if program.dtype == DType::F64 {
            let what = "computes in f64, the kernels in f32, f16 and bf16".to_string();
            return Err(Error::Program { program: program.name.clone(), what, at: "load".into() });
        }
        weight_layout::check(program)?;
        attention::check(program)?;
        check_forced(program, self.hopper)?;
        let outside = self.outside(program, weights)?;
        let (needed, bounds) = (planned.plan.arena_bytes, store::bounds(program));
        self.programs.push(Loaded {
            planned,
            hopper: self.hopper,
            outside,
            addresses: vec![],
            outputs: vec![],
            launches: vec![],
            bounds,
            replay: Replay::Cold,
        });
        let added = self.programs.len() - 1;
        if needed > self.arena_bytes {
            if self.arena_bytes > 0 {
                (0..added).try_for_each(|index| self.unrecord(index))?;
                self.arena_bytes = 0;
                self.driver.release(std::mem::replace(&mut self.arena, Address::NULL))?;
            }
            (self.arena, self.arena_bytes) = (self.driver.allocate(needed)?, needed);
            (0..added).try_for_each(|index| self.place(index))?;
        }
        self.place(added)?;
        Ok(ProgramId(added))
    }

    fn clear(&mut self) {
        // What cannot be given back is the driver's to report at the next call.
        for index in 0..self.programs.len() {
            let _ = self.unrecord(index);
        }
        self.programs.clear();
        self.store.clear_buffers(&mut *self.driver);
        if self.arena != Address::NULL {
            let _ = self.driver.release(std::mem::replace(&mut self.arena, Address::NULL));
        }
        self.arena_bytes = 0;
    }

    fn write(&mut self, buffer: &str, data: Data<'_>) -> Result<()> {
        self.store.write(&mut *self.driver, buffer, data)
    }

    fn copy(&mut self, from: (&str, usize), to: (&str, usize), len: usize) -> Result<()> {
        self.store.copy(&mut *self.driver, from, to, len)
    }

    fn run(&mut self, program: ProgramId) -> Result<()> {
        self.check_bounds(program)?;
        if self.guards || self.check_finite || !self.graphs {
            return self.start(program);
        }
        match self.programs[program.0].replay {
            Replay::Cold => {
                self.start(program)?;
                self.programs[program.0].replay = Replay::Warm;
                Ok(())
            }
            Replay::Warm => {
                let graph = self.record(program)?;
                self.programs[program.0].replay = Replay::Ready(graph);
                self.driver.replay(graph)
            }
            Replay::Ready(graph) => self.driver.replay(graph),
        }
    }

    fn set_check_finite(&mut self, on: bool) {
        self.check_finite = on;
    }

    fn wait(&self) -> Result<()> {
        self.driver.synchronize()
    }

    fn read(&self, buffer: &str, out: DataMut<'_>) -> Result<()> {
        self.store.read(&*self.driver, buffer, out)
    }
}
