//! What a set of programs will need, said before anything is allocated.

use super::Planned;
use crate::program::{DType, Origin};
use std::collections::{HashMap, HashSet};
use std::fmt;

/// One program's share.
#[derive(Clone, Debug)]
pub struct Line {
    pub program: String,
    pub ops: usize,
    pub macs: u64,
    pub arena_bytes: usize,
    pub live_bytes: usize,
    pub peak_op: String,
}

/// Bytes that loading these programs on one executor takes.
#[derive(Clone, Debug)]
pub struct Footprint {
    pub weight_bytes: usize,
    pub buffer_bytes: usize,
    /// The largest arena: programs run one after another in the same one.
    pub arena_bytes: usize,
    pub lines: Vec<Line>,
}

impl Footprint {
    /// Weights and named buffers shared by several programs count once.
    pub fn of(programs: &[&Planned]) -> Footprint {
        let mut weights: HashSet<(&crate::weights::Weight, DType)> = HashSet::new();
        let mut buffers: HashMap<&str, usize> = HashMap::new();
        let mut footprint = Footprint { weight_bytes: 0, buffer_bytes: 0, arena_bytes: 0, lines: vec![] };
        for Planned { program, plan } in programs {
            for value in &program.values {
                match &value.origin {
                    Origin::Weight(w) if weights.insert((w, value.dtype)) => footprint.weight_bytes += value.bytes(),
                    Origin::Input(name) => {
                        buffers.insert(name, value.bytes());
                    }
                    Origin::Weight(_) | Origin::Op(_) => {}
                }
            }
            for (name, id) in &program.outputs {
                buffers.insert(name, program.value(*id).bytes());
            }
            footprint.arena_bytes = footprint.arena_bytes.max(plan.arena_bytes);
            footprint.lines.push(Line {
                program: program.name.clone(),
                ops: program.nodes.len(),
                macs: program.nodes.iter().map(|n| n.op.macs(program, &n.outputs)).sum(),
                arena_bytes: plan.arena_bytes,
                live_bytes: plan.live_bytes,
                peak_op: program.nodes.get(plan.peak_op).map(|n| program.show_op(&n.op)).unwrap_or_default(),
            });
        }
        footprint.buffer_bytes = buffers.values().sum();
        footprint
    }

    pub fn total(&self) -> usize {
        self.weight_bytes + self.buffer_bytes + self.arena_bytes
    }
}

/// Bytes for a person: `3.21 GiB`, `12.0 MiB`.
pub fn show_bytes(bytes: usize) -> String {
    let (mib, gib) = (bytes as f64 / (1u64 << 20) as f64, bytes as f64 / (1u64 << 30) as f64);
    if gib >= 1.0 { format!("{gib:.2} GiB") } else { format!("{mib:.1} MiB") }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "memory {}: weights {}, buffers {}, arena {}",
            show_bytes(self.total()),
            show_bytes(self.weight_bytes),
            show_bytes(self.buffer_bytes),
            show_bytes(self.arena_bytes)
        )?;
        for line in &self.lines {
            writeln!(
                f,
                "  {:<12} {:>5} ops {:>9.3} GMAC  arena {:>10}, {:.3} x live; peak at {}",
                line.program,
                line.ops,
                line.macs as f64 / 1e9,
                show_bytes(line.arena_bytes),
                line.arena_bytes as f64 / line.live_bytes.max(1) as f64,
                line.peak_op
            )?;
        }
        Ok(())
    }
}
