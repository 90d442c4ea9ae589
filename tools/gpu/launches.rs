//! What a program launches, found without running it.

use rarebit::exec::Executor;
use rarebit::exec::cuda::{Hopper, PEAKS, Planner, explain};
use rarebit::plan::plan;
use rarebit::program::{DType, Program};
use std::collections::BTreeSet;

/// Per op the names of its kernels; of what a driver would refuse to launch none.
fn of_ops(program: &Program, hopper: Hopper) -> Vec<Vec<String>> {
    let planner = Planner { hopper };
    let planned = plan(program.clone(), |program, node| planner.workspace(program, node));
    // Of which GPU are the peak rates, and nothing else.
    let rows = explain(&planned, PEAKS[0], hopper).map_or(vec![], |explained| explained.rows);
    rows.into_iter().map(|row| row.launches.into_iter().map(|(launch, _)| launch.kernel).collect()).collect()
}

/// The kernels of a program.
pub fn kernels(program: &Program, hopper: Hopper) -> BTreeSet<String> {
    of_ops(program, hopper).into_iter().flatten().collect()
}

/// The kernels of the last op, which is the one that a program of a case is about.
pub fn under_test(program: &Program, hopper: Hopper) -> Vec<String> {
    of_ops(program, hopper).pop().unwrap_or_default()
}

/// What a program is checked with: the kernels for any GPU, and where there are others for Hopper that it would launch, also those.
pub fn variants(program: &Program) -> Vec<Hopper> {
    let is_hopper = |kernel: &String| kernel.contains("sm90");
    let too = program.dtype != DType::F32 && kernels(program, Hopper::Always).iter().any(is_hopper);
    [Hopper::Off, Hopper::Always].into_iter().take(if too { 2 } else { 1 }).collect()
}

/// What is added to the name of a run.
pub fn suffix(hopper: Hopper) -> &'static str {
    if hopper == Hopper::Off { "" } else { ", Hopper" }
}
