//! Which forward values to keep for the backward: the rest is computed again, segment by segment.
//!
//! The forward is cut into segments of about equal weight at places where little crosses (Chen et al., "Training Deep Nets with
//! Sublinear Memory Cost", 2016). Kept are the values that cross a cut, and all of the last segment, whose backward comes at once.

use crate::program::Program;

/// Per value whether it is kept with `segments` segments.
pub fn kept(program: &Program, segments: usize) -> Vec<bool> {
    let cuts = cuts(program, segments);
    let mut made = vec![0; program.values.len()];
    let mut kept = vec![false; program.values.len()];
    let last = cuts.last().copied().unwrap_or(0);
    for (index, node) in program.nodes.iter().enumerate() {
        for id in &node.outputs {
            made[id.index()] = index;
            kept[id.index()] = index >= last;
        }
        for id in node.op.inputs() {
            // It crosses a cut when one lies between the op that made it and this one.
            let from = made[id.index()];
            let next = cuts.partition_point(|cut| *cut <= from);
            kept[id.index()] |= cuts.get(next).is_some_and(|cut| *cut <= index);
        }
    }
    program.outputs.iter().for_each(|(_, id)| kept[id.index()] = true);
    kept
}

/// Indices of the ops that begin the second and every later segment: near equal shares of the bytes made, where least crosses.
fn cuts(program: &Program, segments: usize) -> Vec<usize> {
    let bytes: Vec<usize> =
        program.nodes.iter().map(|node| node.outputs.iter().map(|id| program.value(*id).bytes()).sum()).collect();
    let total: usize = bytes.iter().sum();
    let crossing = crossing(program);
    // A cut may move by a quarter of a segment.
    let (share, slack) = (total / segments, total / segments / 4);
    let mut before = 0;
    let ends: Vec<usize> = bytes
        .iter()
        .map(|bytes| {
            before += bytes;
            before - bytes
        })
        .collect();
    let mut cuts: Vec<usize> = (1..segments)
        .filter_map(|segment| {
            let ideal = segment * share;
            let near = (1..program.nodes.len()).filter(|index| ends[*index].abs_diff(ideal) <= slack);
            near.min_by_key(|index| (crossing[*index], ends[*index].abs_diff(ideal)))
        })
        .collect();
    cuts.dedup();
    cuts
}

/// Per op: bytes made before it and read by it or later.
fn crossing(program: &Program) -> Vec<usize> {
    let mut made = vec![usize::MAX; program.values.len()];
    let mut last = vec![0; program.values.len()];
    for (index, node) in program.nodes.iter().enumerate() {
        node.outputs.iter().for_each(|id| made[id.index()] = index);
        node.op.inputs().iter().for_each(|id| last[id.index()] = index);
    }
    let mut change = vec![0i64; program.nodes.len() + 1];
    for (index, value) in program.values.iter().enumerate().filter(|(index, _)| made[*index] < last[*index]) {
        change[made[index] + 1] += value.bytes() as i64;
        change[last[index] + 1] -= value.bytes() as i64;
    }
    let mut live = 0;
    change[..program.nodes.len()]
        .iter()
        .map(|delta| {
            live += delta;
            live as usize
        })
        .collect()
}
