//! Named buffers under a prefix, so that one executor holds the same programs in two sizes.

use super::{Data, DataMut, Executor, ProgramId};
use crate::Result;
use crate::plan::Planned;
use crate::program::{Node, Origin, Program};
use crate::weights::Model;

/// An executor as the host of [`scoped`] programs sees it: buffers are called as if they had no prefix.
pub struct Scope<'e> {
    executor: &'e mut dyn Executor,
    prefix: &'static str,
}

impl<'e> Scope<'e> {
    pub fn new(executor: &'e mut dyn Executor, prefix: &'static str) -> Scope<'e> {
        Scope { executor, prefix }
    }

    fn name(&self, buffer: &str) -> String {
        format!("{}{buffer}", self.prefix)
    }
}

/// The program with all its named buffers under the prefix; it is renamed before it is planned, so that its buffers are counted.
pub fn scoped(mut program: Program, prefix: &str) -> Program {
    let inputs = program.values.iter_mut().filter_map(|value| match &mut value.origin {
        Origin::Input(name) => Some(name),
        Origin::Weight(_) | Origin::Op(_) => None,
    });
    let outputs = program.outputs.iter_mut().map(|(name, _)| name);
    inputs.chain(outputs).for_each(|name| name.insert_str(0, prefix));
    program
}

impl Executor for Scope<'_> {
    fn workspace(&self, program: &Program, node: &Node) -> usize {
        self.executor.workspace(program, node)
    }

    fn free_memory(&self) -> Result<Option<usize>> {
        self.executor.free_memory()
    }

    fn load(&mut self, planned: Planned, weights: &Model) -> Result<ProgramId> {
        self.executor.load(planned, weights)
    }

    fn clear(&mut self) {
        self.executor.clear();
    }

    fn write(&mut self, buffer: &str, data: Data<'_>) -> Result<()> {
        self.executor.write(&self.name(buffer), data)
    }

    fn copy(&mut self, from: (&str, usize), to: (&str, usize), len: usize) -> Result<()> {
        let (source, target) = (self.name(from.0), self.name(to.0));
        self.executor.copy((&source, from.1), (&target, to.1), len)
    }

    fn run(&mut self, program: ProgramId) -> Result<()> {
        self.executor.run(program)
    }

    fn set_check_finite(&mut self, on: bool) {
        self.executor.set_check_finite(on);
    }

    fn wait(&self) -> Result<()> {
        self.executor.wait()
    }

    fn read(&self, buffer: &str, out: DataMut<'_>) -> Result<()> {
        self.executor.read(&self.name(buffer), out)
    }
}
