//! What a program will do on a GPU, op by op, before it runs there: kernels, grids, memory, and the time that peak rates allow.

use super::cx::Cx;
use super::kernels::HOPPER;
use super::launch::{Address, Launch};
use super::shape::Hopper;
use super::{attention, kernels, launches_of, workspace};
use crate::exec::guard::describe;
use crate::exec::{Data, DataMut, Executor, ProgramId};
use crate::plan::Planned;
use crate::program::{DType, Node, Program};
use crate::weights::Model;
use crate::{Error, Result};
use std::collections::HashMap;
use std::fmt;

/// The peak rates of a GPU, dense, at its boost clock (NVIDIA's data sheets).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peak {
    pub name: &'static str,
    /// As nvcc names it.
    pub arch: &'static str,
    /// TFLOP/s of 16-bit products summed in f32.
    pub tensor: f64,
    /// TFLOP/s of f32 outside the tensor cores.
    pub vector: f64,
    /// GB/s of device memory.
    pub bandwidth: f64,
}

pub const PEAKS: [Peak; 8] = [
    Peak { name: "a100", arch: "80", tensor: 312.0, vector: 19.5, bandwidth: 2039.0 },
    Peak { name: "l4", arch: "89", tensor: 121.0, vector: 30.3, bandwidth: 300.0 },
    Peak { name: "l40s", arch: "89", tensor: 362.0, vector: 91.6, bandwidth: 864.0 },
    Peak { name: "rtx4090", arch: "89", tensor: 165.2, vector: 82.6, bandwidth: 1008.0 },
    Peak { name: "h100", arch: "90a", tensor: 989.4, vector: 66.9, bandwidth: 3350.0 },
    Peak { name: "h200", arch: "90a", tensor: 989.4, vector: 66.9, bandwidth: 4800.0 },
    Peak { name: "b200", arch: "100", tensor: 2250.0, vector: 75.0, bandwidth: 8000.0 },
    Peak { name: "rtx5090", arch: "120", tensor: 209.5, vector: 104.8, bandwidth: 1792.0 },
];

impl Peak {
    /// What the kernels for Hopper do there, asked for so much.
    pub fn hopper(&self, asked: Hopper) -> Hopper {
        asked.where_it_can(self.arch == HOPPER)
    }
}

impl std::str::FromStr for Peak {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Peak, String> {
        let names = || PEAKS.map(|peak| peak.name).join(", ");
        PEAKS.into_iter().find(|peak| peak.name == name).ok_or_else(|| format!("one of {}", names()))
    }
}

/// Plans as a GPU would need it, on machines that have none; it runs nothing.
pub struct Planner {
    pub hopper: Hopper,
}

impl Planner {
    fn refuse<T>() -> Result<T> {
        Err(Error::Device("this executor plans and does not run".into()))
    }
}

impl Executor for Planner {
    fn workspace(&self, program: &Program, node: &Node) -> usize {
        workspace(program, node, self.hopper)
    }

    fn load(&mut self, _: Planned, _: &Model) -> Result<ProgramId> {
        Planner::refuse()
    }

    fn clear(&mut self) {}

    fn write(&mut self, _: &str, _: Data<'_>) -> Result<()> {
        Planner::refuse()
    }

    fn copy(&mut self, _: (&str, usize), _: (&str, usize), _: usize) -> Result<()> {
        Planner::refuse()
    }

    fn run(&mut self, _: ProgramId) -> Result<()> {
        Planner::refuse()
    }

    fn read(&self, _: &str, _: DataMut<'_>) -> Result<()> {
        Planner::refuse()
    }
}

/// One op.
#[derive(Clone, Debug)]
pub struct Row {
    pub op: String,
    /// With the registers of a thread, where this build has the kernel for the GPU.
    pub launches: Vec<(Launch, Option<u32>)>,
    /// Read and written, each value once, and scratch once each way.
    pub bytes: usize,
    pub flops: u64,
    /// The least time that the peak rates allow.
    pub seconds: f64,
    /// Whether that is the memory's time.
    pub memory_bound: bool,
}

/// A program's ops on a GPU.
#[derive(Clone, Debug)]
pub struct Explained {
    pub program: String,
    pub peak: Peak,
    pub rows: Vec<Row>,
}

/// Explains a program that was planned with a [`Planner`] for this GPU, and with the same `hopper`. Nothing runs. What a driver would
/// refuse to launch is an error, as it is when the program is loaded.
pub fn explain(planned: &Planned, peak: Peak, hopper: Hopper) -> Result<Explained> {
    let Planned { program, plan } = planned;
    attention::check(program)?;
    // Somewhere, aligned as the executor aligns.
    let (mut next, arena) = (Address(1 << 40), Address(1 << 20));
    let mut addresses = Vec::with_capacity(program.values.len());
    for (value, region) in program.values.iter().zip(&plan.regions) {
        addresses.push(region.map_or(next, |region| arena.offset(region.offset)));
        next = next.offset(value.bytes().next_multiple_of(256));
    }
    let registers = registers(peak.arch);
    let explained = |(index, node): (usize, &Node)| {
        let workspace = plan.workspace[index].map_or(Address::NULL, |region| arena.offset(region.offset));
        let cx = Cx { program, node, addresses: &addresses, workspace, hopper };
        let bytes = program.bytes_of(node) + 2 * super::workspace(program, node, hopper);
        let launches = launches_of(&cx);
        let failed = |error: Error| Error::Device(describe(program, index, &error.to_string()));
        launches.iter().try_for_each(|launch| launch.check().map_err(failed))?;
        Ok(row(program, node, bytes, launches, peak, &registers))
    };
    let rows = program.nodes.iter().enumerate().map(explained).collect::<Result<Vec<Row>>>()?;
    Ok(Explained { program: program.name.clone(), peak, rows })
}

fn row(
    program: &Program,
    node: &Node,
    bytes: usize,
    launches: Vec<Launch>,
    peak: Peak,
    registers: &HashMap<&str, u32>,
) -> Row {
    let flops = 2 * node.op.macs(program, &node.outputs);
    let single = node.op.inputs().first().is_some_and(|id| program.value(*id).dtype == DType::F32);
    let rate = if single { peak.vector } else { peak.tensor };
    let (memory, compute) = (bytes as f64 / (peak.bandwidth * 1e9), flops as f64 / (rate * 1e12));
    let launches = launches.into_iter().map(|launch| {
        let registers = registers.get(launch.kernel.as_str()).copied();
        (launch, registers)
    });
    Row {
        op: program.show_op(&node.op),
        launches: launches.collect(),
        bytes,
        flops,
        seconds: memory.max(compute),
        memory_bound: memory >= compute,
    }
}

/// Registers of every kernel on an architecture, from ptxas' report.
fn registers(arch: &str) -> HashMap<&'static str, u32> {
    let rows = kernels::REPORT.lines().map(|line| line.split('\t').collect::<Vec<_>>());
    rows.filter(|row| row.len() > 2 && row[1] == arch).filter_map(|row| Some((row[0], row[2].parse().ok()?))).collect()
}

impl Explained {
    /// The least time of all ops one after another.
    pub fn seconds(&self) -> f64 {
        self.rows.iter().map(|row| row.seconds).sum()
    }
}

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let launches: usize = self.rows.iter().map(|row| row.launches.len()).sum();
        let flops: u64 = self.rows.iter().map(|row| row.flops).sum();
        writeln!(
            f,
            "{}: {} ops, {launches} launches, {:.3} TFLOP, at least {:.3} ms on {} ({} TFLOP/s, {} GB/s)",
            self.program,
            self.rows.len(),
            flops as f64 / 1e12,
            1e3 * self.seconds(),
            self.peak.name,
            self.peak.tensor,
            self.peak.bandwidth
        )?;
        for (index, row) in self.rows.iter().enumerate() {
            let bound = if row.memory_bound { "memory" } else { "compute" };
            writeln!(
                f,
                "{index:>5} {:>9.3} MB {:>9.3} GFLOP {:>9.2} us {bound:<7} {}",
                row.bytes as f64 / 1e6,
                row.flops as f64 / 1e9,
                1e6 * row.seconds,
                row.op
            )?;
            for (launch, registers) in &row.launches {
                let registers = registers.map_or("? registers".to_string(), |n| format!("{n} registers"));
                writeln!(f, "      {launch} {registers}")?;
            }
        }
        Ok(())
    }
}
