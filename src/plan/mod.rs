//! The memory plan: a pure function of a program that says where every value lives in one arena, before anything is allocated.

mod arena;
mod budget;
mod report;

pub use budget::{Recompute, plan_gradient};
pub use report::{Footprint, Line, show_bytes};

use crate::program::{Node, Origin, Program, ValueId};
use arena::Arena;

/// Every arena offset is a multiple of this many bytes.
pub const ALIGNMENT: usize = 256;

/// A stretch of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub offset: usize,
    pub bytes: usize,
}

impl Region {
    pub fn end(&self) -> usize {
        self.offset + self.bytes
    }

    pub fn overlaps(&self, other: &Region) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }
}

/// Offsets for one program. Sizes only: nothing here knows a device.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Per value: its arena region; `None` for inputs (named buffers) and weights.
    pub regions: Vec<Option<Region>>,
    /// Per op: scratch that lives only while it runs.
    pub workspace: Vec<Option<Region>>,
    /// Per op: the value whose region output 0 took over, where `may_alias` allowed it.
    pub in_place: Vec<Option<ValueId>>,
    /// Bytes the arena needs.
    pub arena_bytes: usize,
    /// The largest sum of live bytes over the ops: no plan can need less.
    pub live_bytes: usize,
    /// The op at which that sum is reached.
    pub peak_op: usize,
}

/// A program with its plan: what an executor loads.
#[derive(Clone, Debug)]
pub struct Planned {
    pub program: Program,
    pub plan: Plan,
}

/// First and last op that touch each op-made value; outputs of the program live past the last op.
fn lifetimes(program: &Program) -> Vec<Option<(usize, usize)>> {
    let mut lives: Vec<Option<(usize, usize)>> = vec![None; program.values.len()];
    for (index, node) in program.nodes.iter().enumerate() {
        for &id in &node.outputs {
            lives[id.index()] = Some((index, index));
        }
        for id in node.op.inputs() {
            if let Some((_, last)) = &mut lives[id.index()] {
                *last = index;
            }
        }
    }
    for (_, id) in &program.outputs {
        if let Some((_, last)) = &mut lives[id.index()] {
            *last = program.nodes.len();
        }
    }
    lives
}

/// The value output 0 of `node` may take over: allowed by the op, dead after it, made by an op, read once, of the same size.
fn in_place(program: &Program, index: usize, node: &Node, lives: &[Option<(usize, usize)>]) -> Option<ValueId> {
    let id = node.op.may_alias()?;
    let dies_here = lives[id.index()].is_some_and(|(_, last)| last == index);
    let read_once = node.op.inputs().iter().filter(|&&input| input == id).count() == 1;
    let same_size = program.value(id).bytes() == program.value(node.outputs[0]).bytes();
    let made_by_op = matches!(program.value(id).origin, Origin::Op(_));
    (dies_here && read_once && same_size && made_by_op).then_some(id)
}

/// Plans a program; `workspace` gives each op's scratch bytes on the executor that will run it.
pub fn plan(program: Program, workspace: impl Fn(&Program, &Node) -> usize) -> Planned {
    let lives = lifetimes(&program);
    let mut arena = Arena::new();
    let mut plan = Plan {
        regions: vec![None; program.values.len()],
        workspace: vec![None; program.nodes.len()],
        in_place: vec![None; program.nodes.len()],
        arena_bytes: 0,
        live_bytes: 0,
        peak_op: 0,
    };

    // Values with their birth, death and size; an in-place chain is one block that lives from its first op to its last.
    for (index, node) in program.nodes.iter().enumerate() {
        plan.in_place[index] = in_place(&program, index, node, &lives);
    }
    let mut block_of: Vec<Option<usize>> = vec![None; program.values.len()];
    for (index, node) in program.nodes.iter().enumerate() {
        for (slot, &id) in node.outputs.iter().enumerate() {
            let Some((birth, death)) = lives[id.index()] else { continue };
            let taken = if slot == 0 { plan.in_place[index].and_then(|from| block_of[from.index()]) } else { None };
            let block = match taken {
                Some(block) => {
                    arena.extend(block, death);
                    block
                }
                None => arena.block(program.value(id).bytes(), birth, death),
            };
            block_of[id.index()] = Some(block);
        }
    }
    let scratch: Vec<Option<usize>> = program
        .nodes
        .iter()
        .enumerate()
        .map(|(index, node)| match workspace(&program, node) {
            0 => None,
            bytes => Some(arena.block(bytes, index, index)),
        })
        .collect();

    let offsets = arena.place();
    let region = |block: usize, bytes: usize| Region { offset: offsets[block], bytes };
    for (id, block) in block_of.iter().enumerate() {
        plan.regions[id] = block.map(|b| region(b, program.values[id].bytes()));
    }
    for (index, block) in scratch.iter().enumerate() {
        plan.workspace[index] = block.map(|b| region(b, arena.bytes_of(b)));
    }
    plan.arena_bytes = arena.extent(&offsets);
    (plan.peak_op, plan.live_bytes) = arena.live_peak(program.nodes.len());
    Planned { program, plan }
}
