//! Every kind of op of a sampling step alone: what it takes, and how much of the step it is.

use super::measure::{Row, Times, wave};
use super::report::Case;
use super::setup::Setup;
use crate::Result;
use crate::cli::flags::device::Device;
use crate::exec::Data;
use crate::pipeline::generate::Generator;
use crate::plan::plan;
use crate::program::{DType, Kind, Origin};
use serde_json::json;

/// On a GPU an op is done so many times in a run: what a start takes is not the op's.
const TOGETHER: usize = 20;

/// Of the case.
pub fn name(batch: usize) -> String {
    format!("ops of a step, batch {batch}")
}

/// The ops of a step for this many images, those of one shape once. Their times need not add up to the step's: alone, an op finds
/// its inputs where the last run left them.
pub fn run(setup: &mut Setup<'_>, batch: usize) -> Result<Case> {
    let generator = Generator::plan(setup.pipeline, &*setup.executor, setup.settings.clone(), batch)?;
    setup.check_memory(&generator.footprint(), batch)?;
    let step = &generator.programs().step.program;
    let together = if matches!(setup.device.device, Device::Cuda(_)) { TOGETHER } else { 1 };
    let mut rows = vec![];
    for Kind { name, node, count } in step.kinds() {
        setup.executor.clear();
        let program = step.single_op(node, together);
        let planned = plan(program.clone(), |program, node| setup.executor.workspace(program, node));
        let id = setup.executor.load(planned, &setup.pipeline.model)?;
        for value in program.inputs.iter().map(|id| program.value(*id)) {
            if let (Origin::Input(buffer), true) = (&value.origin, value.dtype != DType::I32) {
                setup.executor.write(buffer, Data::F32(&wave(value.len())))?;
            }
        }
        let times = setup.plan.time_program(&mut *setup.executor, id)?;
        let each = Times { ms: times.ms.into_iter().map(|ms| ms / together as f64).collect() };
        rows.push(Row::of(name, count, &step.single_op(node, 1), each));
    }
    setup.executor.clear();
    let most = |row: &Row| row.calls as f64 * row.times.median();
    rows.sort_by(|a, b| most(b).total_cmp(&most(a)));
    Ok(Case { name: name(batch), rows, total: None, facts: json!({}) })
}
