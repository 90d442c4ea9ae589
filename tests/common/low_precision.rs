//! An executor that computes exactly and stores as a device does: what 16-bit kernels are measured against.

use super::inputs::no_weights;
use super::tolerance::round;
use rarebit::exec::cpu::Cpu;
use rarebit::exec::{Data, DataMut, Executor, ProgramId};
use rarebit::plan::{Planned, plan};
use rarebit::program::*;
use rarebit::weights::Model;
use rarebit::{Error, Result};
use std::collections::HashMap;

/// Runs programs op by op in f64 and rounds every op's outputs, every weight and every buffer to their types.
#[derive(Default)]
pub struct LowPrecision {
    /// With what weights hold, per value.
    programs: Vec<(Program, Vec<Vec<f64>>)>,
    buffers: HashMap<String, Buffer>,
}

/// Of i32 in `ints`, of floats in `floats`.
struct Buffer {
    dtype: DType,
    floats: Vec<f64>,
    ints: Vec<i32>,
}

impl LowPrecision {
    fn buffer(&self, name: &str) -> Result<&Buffer> {
        self.buffers.get(name).ok_or_else(|| Error::Usage(format!("no buffer '{name}'")))
    }

    fn make(&mut self, name: &str, value: &Value) {
        let (floats, ints) = match value.dtype {
            DType::I32 => (vec![], vec![0; value.len()]),
            DType::F16 | DType::BF16 | DType::F32 | DType::F64 => (vec![0.0; value.len()], vec![]),
        };
        self.buffers.entry(name.to_string()).or_insert(Buffer { dtype: value.dtype, floats, ints });
    }

    /// What an op makes of the values so far, before it is rounded.
    fn evaluate(&self, program: &Program, node: &Node, values: &[Vec<f64>], nothing: &Model) -> Result<Vec<Vec<f64>>> {
        match &node.op {
            // In f64 there are no other types to go from and to.
            Op::Elementwise(Elementwise::Cast { x, .. }) => return Ok(vec![values[x.index()].clone()]),
            Op::Elementwise(Elementwise::Constant { shape, value, .. }) => {
                return Ok(vec![vec![*value; shape.iter().product()]]);
            }
            _ => {}
        }
        let mut b = Builder::new(program.name.clone(), DType::F64);
        let name = |id: ValueId| format!("v{}", id.0);
        let op = node.op.with_inputs(|id| match program.value(id).dtype {
            DType::I32 => b.input_i32(name(id), program.shape(id)),
            DType::F16 | DType::BF16 | DType::F32 | DType::F64 => b.input(name(id), program.shape(id)),
        });
        for (i, id) in b.push(op).into_iter().enumerate() {
            b.output(format!("out{i}"), id);
        }
        let one = b.finish()?;
        let mut cpu = Cpu::<f64>::new();
        let id = cpu.load(plan(one.clone(), |program, node| cpu.workspace(program, node)), nothing)?;
        for operand in node.op.inputs() {
            match &program.value(operand).origin {
                Origin::Input(held) if program.value(operand).dtype == DType::I32 => {
                    cpu.write(&name(operand), Data::I32(&self.buffer(held)?.ints))?;
                }
                Origin::Input(_) | Origin::Weight(_) | Origin::Op(_) => {
                    cpu.write(&name(operand), Data::F64(&values[operand.index()]))?;
                }
            }
        }
        cpu.run(id)?;
        let read = |(name, id): &(String, ValueId)| {
            let mut out = vec![0.0; one.value(*id).len()];
            cpu.read(name, DataMut::F64(&mut out))?;
            Ok(out)
        };
        one.outputs.iter().map(read).collect()
    }
}

impl Executor for LowPrecision {
    fn workspace(&self, _: &Program, _: &Node) -> usize {
        0
    }

    fn load(&mut self, planned: Planned, model: &Model) -> Result<ProgramId> {
        let program = planned.program;
        let mut weights = vec![];
        for value in &program.values {
            weights.push(match &value.origin {
                Origin::Weight(weight) => {
                    model.value(weight)?.into_iter().map(|x| round(value.dtype, f64::from(x))).collect()
                }
                Origin::Input(name) => {
                    self.make(name, value);
                    vec![]
                }
                Origin::Op(_) => vec![],
            });
        }
        program.outputs.iter().for_each(|(name, id)| self.make(name, program.value(*id)));
        self.programs.push((program, weights));
        Ok(ProgramId(self.programs.len() - 1))
    }

    fn clear(&mut self) {
        *self = LowPrecision::default();
    }

    fn write(&mut self, buffer: &str, data: Data<'_>) -> Result<()> {
        let held = self.buffers.get_mut(buffer).ok_or_else(|| Error::Usage(format!("no buffer '{buffer}'")))?;
        match data {
            Data::I32(values) => held.ints = values.to_vec(),
            Data::F32(values) => held.floats = values.iter().map(|x| round(held.dtype, f64::from(*x))).collect(),
            Data::F64(values) => held.floats = values.iter().map(|x| round(held.dtype, *x)).collect(),
        }
        Ok(())
    }

    fn copy(&mut self, from: (&str, usize), to: (&str, usize), len: usize) -> Result<()> {
        let values = self.buffer(from.0)?.floats[from.1..from.1 + len].to_vec();
        let held = self.buffers.get_mut(to.0).ok_or_else(|| Error::Usage(format!("no buffer '{}'", to.0)))?;
        held.floats[to.1..to.1 + len].copy_from_slice(&values);
        Ok(())
    }

    fn run(&mut self, id: ProgramId) -> Result<()> {
        let nothing = no_weights();
        let (program, weights) = &self.programs[id.0];
        let mut values = weights.clone();
        for &id in &program.inputs {
            if let Origin::Input(name) = &program.value(id).origin {
                values[id.index()] = self.buffer(name)?.floats.clone();
            }
        }
        for node in &program.nodes {
            for (id, mut made) in node.outputs.iter().zip(self.evaluate(program, node, &values, &nothing)?) {
                let dtype = program.value(*id).dtype;
                made.iter_mut().for_each(|x| *x = round(dtype, *x));
                values[id.index()] = made;
            }
        }
        for (name, id) in &program.outputs {
            if let Some(held) = self.buffers.get_mut(name) {
                held.floats.clone_from(&values[id.index()]);
            }
        }
        Ok(())
    }

    fn read(&self, buffer: &str, out: DataMut<'_>) -> Result<()> {
        let values = &self.buffer(buffer)?.floats;
        match out {
            DataMut::F32(out) => out.iter_mut().zip(values).for_each(|(out, x)| *out = *x as f32),
            DataMut::F64(out) => out.copy_from_slice(values),
        }
        Ok(())
    }
}
