//! The CPU executor: planned programs on all cores, in f32 (fast) or f64 (the oracle), one code for both.
//!
//! Weights are packed once at load, the way products stream them; everything a run touches is allocated by `load`. Work is cut
//! so that the bits of a sample depend on neither its batch, nor the number of threads, nor earlier runs. Call from inside a
//! rayon pool (`pool.install`): work handed to a pool from outside goes through a queue that allocates now and then.

mod attention;
mod attention_backward;
mod check;
mod chunks;
mod columns;
mod context;
mod conv2d;
mod conv2d_backward;
mod elementwise;
mod embedding;
mod gemm;
mod gemm_mainloop;
mod microkernel;
mod norm;
mod norm_backward;
mod pack;
mod real;
mod reduce;
mod resample;
mod resize;
mod rhs;
mod rowwise;
mod store;
mod transpose;
mod update;

pub use real::Float;

use super::guard::{Guard, describe};
use super::{Data, DataMut, Executor, ProgramId, weight_layout};
use crate::plan::{Planned, Region};
use crate::program::{Node, Op, Origin, Program};
use crate::weights::Model;
use crate::{Error, Result};
use context::{Cx, Loaded, MOST_RANGES, Machine, Outputs, Place, Scratch, carve};
use pack::Aligned;
use pulp::Arch;
use store::{Buffer, Store};

/// Runs programs of type f32 (`Cpu<f32>`) or f64 (`Cpu<f64>`).
pub struct Cpu<T> {
    machine: Machine,
    store: Store<T>,
    programs: Vec<Loaded>,
    arena: Aligned<T>,
    scratch: Scratch<T>,
    guards: bool,
    check_finite: bool,
}

impl<T: Float> Cpu<T> {
    /// An executor for the rayon pool it is made in.
    pub fn new() -> Cpu<T> {
        Cpu::on(Arch::new())
    }

    /// An executor that uses the given instruction set instead of the best one.
    pub fn on(arch: Arch) -> Cpu<T> {
        let tiling = arch.dispatch(microkernel::Detect::<T>(std::marker::PhantomData));
        let threads = rayon::current_num_threads();
        Cpu {
            machine: Machine { arch, tiling, threads },
            store: Store::default(),
            programs: Vec::new(),
            arena: Aligned::empty(),
            scratch: Scratch::new(threads),
            guards: false,
            check_finite: false,
        }
    }

    /// For tests, slow: fills dead memory with NaN and fails when an op writes outside its outputs and workspace.
    pub fn with_guards(mut self, on: bool) -> Cpu<T> {
        self.guards = on;
        self
    }

    /// Fails at the first op whose output is not finite, naming it.
    pub fn check_finite(mut self, on: bool) -> Cpu<T> {
        self.check_finite = on;
        self
    }

    /// Elements of thread scratch an op needs.
    fn scratch(&self, program: &Program, node: &Node) -> usize {
        match &node.op {
            Op::Gemm(op) => gemm::scratch(op, program, self.machine.tiling),
            Op::Conv2d(op) => conv2d::scratch(op, program, self.machine.tiling),
            Op::Attention(op) => attention::scratch(op, program, self.machine.tiling),
            Op::GemmBackward(op) => gemm::backward_scratch(op, program, self.machine.tiling),
            Op::Conv2dBackward(op) => conv2d_backward::scratch(op, program, self.machine.tiling),
            Op::AttentionBackward(op) => attention_backward::scratch(op, program, self.machine.tiling),
            Op::Resample(op) => resample::scratch(op, program),
            Op::Norm(_) | Op::Rowwise(_) | Op::Elementwise(_) | Op::Embedding(_) | Op::Update(_) => 0,
        }
    }

    /// Runs op `index`.
    fn step(&mut self, program: ProgramId, index: usize) -> Result<()> {
        let Loaded { planned: Planned { program, plan }, places, .. } = &self.programs[program.0];
        let node = &program.nodes[index];
        let elements = |r: Region| r.offset / size_of::<T>()..r.end().div_ceil(size_of::<T>());
        let mut ranges = [const { 0..0 }; MOST_RANGES];
        for (range, output) in ranges.iter_mut().zip(&node.outputs) {
            *range = plan.regions[output.index()].map_or(0..0, elements);
        }
        ranges[MOST_RANGES - 1] = plan.workspace[index].map_or(0..0, elements);
        let ([a, b, c, workspace], arena) = carve(self.arena.as_mut_slice(), &ranges);
        let cx = Cx { program, places, store: &self.store, arena, machine: self.machine, scratch: &self.scratch };
        let outputs = Outputs { values: [a, b, c], workspace, in_place: plan.in_place[index].is_some() };
        let wrong = |what: String| Error::Numeric(describe(program, index, &what));
        match &node.op {
            Op::Gemm(op) => gemm::run(&cx, op, outputs),
            Op::Conv2d(op) => conv2d::run(&cx, op, outputs),
            Op::Attention(op) => attention::run(&cx, op, outputs),
            Op::GemmBackward(op) => gemm::backward(&cx, op, outputs),
            Op::Conv2dBackward(op) => conv2d_backward::run(&cx, op, outputs),
            Op::AttentionBackward(op) => attention_backward::run(&cx, op, outputs),
            Op::Norm(op) => norm::run(&cx, op, outputs),
            Op::Rowwise(op) => return rowwise::run(&cx, op, outputs).map_err(wrong),
            Op::Elementwise(op) => elementwise::run(&cx, op, outputs),
            Op::Resample(op) => resample::run(&cx, op, outputs),
            Op::Embedding(op) => return embedding::run(&cx, op, outputs).map_err(wrong),
            Op::Update(op) => update::run(&cx, op, outputs),
        }
        Ok(())
    }

    fn workspace_of(&self, program: &Program, node: &Node) -> usize {
        let elements = match &node.op {
            Op::Gemm(op) => gemm::workspace(op, program, &self.machine),
            Op::Conv2d(op) => conv2d::workspace(op, program, &self.machine),
            Op::Attention(op) => attention::workspace(op, program, &self.machine),
            Op::GemmBackward(op) => gemm::backward_workspace(op, program, &self.machine),
            Op::Conv2dBackward(op) => conv2d_backward::workspace(op, program, &self.machine),
            Op::AttentionBackward(op) => attention_backward::workspace(op, program, self.machine.tiling),
            Op::Norm(op) => norm::workspace::<T>(op, program),
            Op::Resample(op) => resample::workspace::<T>(op, program),
            Op::Rowwise(_) | Op::Elementwise(_) | Op::Embedding(_) | Op::Update(_) => 0,
        };
        elements * size_of::<T>()
    }

    fn load_program(&mut self, planned: Planned, weights: &Model) -> Result<ProgramId> {
        let program = &planned.program;
        if program.dtype != T::DTYPE {
            let what = format!("computes in {}, this executor in {}", program.dtype, T::DTYPE);
            return Err(Error::Program { program: program.name.clone(), what, at: "load".into() });
        }
        weight_layout::check(program)?;
        let mut places = Vec::with_capacity(program.values.len());
        for (index, value) in program.values.iter().enumerate() {
            places.push(match &value.origin {
                Origin::Input(name) => Place::Buffer(self.store.buffer(program, name, value)?),
                Origin::Weight(weight) => Place::Weight(self.store.weight(weight, self.machine.tiling, weights)?),
                Origin::Op(_) => {
                    let offset = planned.plan.regions[index].map_or(0, |r| r.offset);
                    Place::Arena(offset / size_of::<T>(), value.len())
                }
            });
        }
        let mut outputs = Vec::new();
        for (name, id) in &program.outputs {
            outputs.push((self.store.buffer(program, name, program.value(*id))?, *id));
        }
        let scratch = program.nodes.iter().map(|node| self.scratch(program, node)).max();
        self.scratch.grow(scratch.unwrap_or(0))?;
        let arena = planned.plan.arena_bytes.div_ceil(size_of::<T>());
        if arena > self.arena.as_slice().len() {
            self.arena = Aligned::empty(); // the old one goes first
            self.arena = Aligned::zeroed(arena)?;
        }
        self.programs.push(Loaded { planned, places, outputs });
        Ok(ProgramId(self.programs.len() - 1))
    }

    fn run_program(&mut self, program: ProgramId) -> Result<()> {
        let mut guard = self.guards.then(|| Guard::new(bytemuck::cast_slice_mut(self.arena.as_mut_slice())));
        for index in 0..self.programs[program.0].planned.program.nodes.len() {
            self.step(program, index)?;
            let planned = &self.programs[program.0].planned;
            if let Some(guard) = &mut guard {
                guard.check(planned, index, bytemuck::cast_slice_mut(self.arena.as_mut_slice()))?;
            }
            if self.check_finite {
                check::finite(&self.programs[program.0], index, self.arena.as_slice(), &self.store)?;
            }
        }
        let Loaded { outputs, places, .. } = &self.programs[program.0];
        for &(buffer, id) in outputs {
            if let (Place::Arena(offset, len), Buffer::Float(values)) =
                (places[id.index()], &mut self.store.buffers[buffer].values)
            {
                chunks::copy(values, &self.arena.as_slice()[offset..offset + len]);
            }
        }
        Ok(())
    }
}

/// f32 or f64, with what runs its kernels compiled once, here: generic code would be compiled again by every crate that runs a
/// program.
pub trait Real: Float {
    fn workspace(cpu: &Cpu<Self>, program: &Program, node: &Node) -> usize;
    fn load(cpu: &mut Cpu<Self>, planned: Planned, weights: &Model) -> Result<ProgramId>;
    fn run(cpu: &mut Cpu<Self>, program: ProgramId) -> Result<()>;
}

macro_rules! kernels {
    ($($real:ty),*) => {$(
        impl Real for $real {
            fn workspace(cpu: &Cpu<$real>, program: &Program, node: &Node) -> usize {
                cpu.workspace_of(program, node)
            }

            fn load(cpu: &mut Cpu<$real>, planned: Planned, weights: &Model) -> Result<ProgramId> {
                cpu.load_program(planned, weights)
            }

            fn run(cpu: &mut Cpu<$real>, program: ProgramId) -> Result<()> {
                cpu.run_program(program)
            }
        }
    )*};
}

kernels!(f32, f64);

impl<T: Real> Executor for Cpu<T> {
    fn workspace(&self, program: &Program, node: &Node) -> usize {
        T::workspace(self, program, node)
    }

    fn load(&mut self, planned: Planned, weights: &Model) -> Result<ProgramId> {
        T::load(self, planned, weights)
    }

    fn clear(&mut self) {
        self.programs.clear();
        self.store.clear_buffers();
        self.arena = Aligned::empty();
        self.scratch = Scratch::new(self.machine.threads);
    }

    fn write(&mut self, buffer: &str, data: Data<'_>) -> Result<()> {
        self.store.write(buffer, data)
    }

    fn copy(&mut self, from: (&str, usize), to: (&str, usize), len: usize) -> Result<()> {
        self.store.copy(from, to, len)
    }

    fn run(&mut self, program: ProgramId) -> Result<()> {
        // From outside the pool each op would be handed over by itself.
        rayon::scope(|_| T::run(self, program))
    }

    fn set_check_finite(&mut self, on: bool) {
        self.check_finite = on;
    }

    fn read(&self, buffer: &str, out: DataMut<'_>) -> Result<()> {
        self.store.read(buffer, out)
    }
}

impl<T: Float> Default for Cpu<T> {
    fn default() -> Cpu<T> {
        Cpu::new()
    }
}
