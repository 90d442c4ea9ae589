//! A device and the CPU in lock-step: every op runs on the device, and on the CPU on what the device read; the first op whose results
//! differ by more than storage explains is an error that names it. Slow, and thorough: nothing adds up from op to op.

use super::cpu::Cpu;
use super::cuda::Cuda;
use super::guard::describe;
use super::{Data, DataMut, Executor, ProgramId};
use crate::plan::{Planned, plan};
use crate::program::{DType, Elementwise, Node, Op, Origin, Program, ValueId};
use crate::weights::Model;
use crate::{Error, Result};

/// An executor that answers as its device does.
pub struct Lockstep {
    device: Cuda,
    host: Cpu<f32>,
    programs: Vec<Steps>,
}

/// A program as the host repeats it: per op.
struct Steps {
    program: Program,
    repeats: Vec<Repeat>,
}

struct Repeat {
    on_host: ProgramId,
    /// Values the host is given, with the buffers they go to.
    inputs: Vec<(ValueId, String)>,
    /// Buffers of the results.
    outputs: Vec<String>,
}

impl Lockstep {
    pub fn new(device: Cuda) -> Lockstep {
        Lockstep { device, host: Cpu::new(), programs: vec![] }
    }

    fn step(&mut self, id: ProgramId, index: usize) -> Result<()> {
        let Steps { program, repeats } = &self.programs[id.0];
        let Repeat { on_host, inputs, outputs } = &repeats[index];
        // Before the op runs, which may take over the memory of an input.
        for (value, buffer) in inputs {
            let read = self.device.value(id, *value)?;
            let ints: Vec<i32> = read.iter().map(|x| *x as i32).collect();
            let is_int = program.value(*value).dtype == DType::I32;
            self.host.write(buffer, if is_int { Data::I32(&ints) } else { Data::F64(&read) })?;
        }
        self.host.run(*on_host)?;
        self.device.run_op(id, index, true)?;
        self.device.check_op(id, index)?;
        let node = &program.nodes[index];
        let types = node.op.inputs().into_iter().chain(node.outputs.iter().copied()).map(|id| program.value(id).dtype);
        let limit = types.map(limit).fold(limit(program.dtype), f64::max);
        for (output, buffer) in node.outputs.iter().zip(outputs) {
            let found = self.device.value(id, *output)?;
            let mut expected = vec![0.0; found.len()];
            self.host.read(buffer, DataMut::F64(&mut expected))?;
            let error = difference(&found, &expected);
            if error.is_nan() || error > limit {
                let what = format!("%{} is {error:.1e} from the CPU's, {limit:.0e} are allowed", output.0);
                return Err(Error::Numeric(describe(program, index, &what)));
            }
        }
        Ok(())
    }

    /// An op as a program of the host's, which shares its buffers with all ops of those shapes.
    fn repeat(&mut self, program: &Program, node: &Node, weights: &Model) -> Result<Repeat> {
        let mut single = in_f32(program.single_op(node, 1));
        // `alone` has a value for each that is read, in this order, and then the results.
        let mut read: Vec<ValueId> = vec![];
        for id in node.op.inputs() {
            if !read.contains(&id) {
                read.push(id);
            }
        }
        let mut inputs = vec![];
        for (value, id) in single.values.iter_mut().zip(read) {
            if let Origin::Input(name) = &mut value.origin {
                *name = format!("lockstep.{name}.{}.{:?}", value.dtype, value.shape);
                inputs.push((id, name.clone()));
            }
        }
        let mut outputs = vec![];
        for (slot, id) in single.nodes[0].outputs.clone().into_iter().enumerate() {
            let name = format!("lockstep.out.{slot}.{:?}", single.shape(id));
            single.outputs.push((name.clone(), id));
            outputs.push(name);
        }
        let planned = plan(single, |program, node| self.host.workspace(program, node));
        Ok(Repeat { on_host: self.host.load(planned, weights)?, inputs, outputs })
    }
}

/// How far results may be apart, ‖a − b‖ / ‖b‖: some units of the last place of what they are stored in.
fn limit(dtype: DType) -> f64 {
    match dtype {
        DType::F32 | DType::F64 | DType::I32 => 1e-4,
        DType::F16 => 5e-3,
        DType::BF16 => 4e-2,
    }
}

fn difference(found: &[f64], expected: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let apart = norm(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    let length = norm(&mut expected.iter().copied());
    if apart == 0.0 { 0.0 } else { apart / length.max(f64::MIN_POSITIVE) }
}

/// The program with all its floats in f32, as the host computes.
fn in_f32(mut program: Program) -> Program {
    let wider = |dtype: DType| if dtype == DType::I32 { dtype } else { DType::F32 };
    program.dtype = wider(program.dtype);
    program.values.iter_mut().for_each(|value| value.dtype = wider(value.dtype));
    for node in &mut program.nodes {
        if let Op::Elementwise(Elementwise::Constant { dtype, .. } | Elementwise::Cast { to: dtype, .. }) = &mut node.op
        {
            *dtype = wider(*dtype);
        }
    }
    program
}

impl Executor for Lockstep {
    fn workspace(&self, program: &Program, node: &Node) -> usize {
        self.device.workspace(program, node)
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        self.device.free_memory()
    }

    fn load(&mut self, planned: Planned, weights: &Model) -> Result<ProgramId> {
        let program = planned.program.clone();
        let id = self.device.load(planned, weights)?;
        let repeats = program.nodes.iter().map(|node| self.repeat(&program, node, weights)).collect::<Result<_>>()?;
        self.programs.push(Steps { program, repeats });
        Ok(id)
    }

    fn clear(&mut self) {
        self.device.clear();
        self.host.clear();
        self.programs.clear();
    }

    fn write(&mut self, buffer: &str, data: Data<'_>) -> Result<()> {
        self.device.write(buffer, data)
    }

    fn copy(&mut self, from: (&str, usize), to: (&str, usize), len: usize) -> Result<()> {
        self.device.copy(from, to, len)
    }

    fn run(&mut self, program: ProgramId) -> Result<()> {
        self.device.check_bounds(program)?;
        (0..self.programs[program.0].program.nodes.len()).try_for_each(|index| self.step(program, index))?;
        self.device.copy_outputs(program)
    }

    fn set_check_finite(&mut self, on: bool) {
        self.device.set_check_finite(on);
    }

    fn wait(&self) -> Result<()> {
        self.device.wait()
    }

    fn read(&self, buffer: &str, out: DataMut<'_>) -> Result<()> {
        self.device.read(buffer, out)
    }
}
