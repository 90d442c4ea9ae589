//! Everything that a run of a method may need is planned, and held against the memory, before anything is loaded.

use crate::common::command::{fails, files, path, succeeds};
use crate::common::minority::{images, job, token};
use rarebit::Result;
use rarebit::exec::cpu::Cpu;
use rarebit::exec::{Data, DataMut, Executor, ProgramId};
use rarebit::methods::minority::{Convention, MinorityPrompt, Raised, Schedule};
use rarebit::methods::{ImageMethod, Request};
use rarebit::optimize::objective;
use rarebit::optimize::variable::Variable;
use rarebit::optimize::variable::token::Init;
use rarebit::pipeline::Pipeline;
use rarebit::plan::Planned;
use rarebit::program::{DType, Node, Program};
use rarebit::weights::Model;
use std::cell::Cell;
use std::fs;
use tempfile::TempDir;

/// Seventeen tokens or more before the learnable one, and fewer: programs of their own each.
const LONG: &str =
    "a picture of a small flat plain red star with a hole in the top left corner on a dark blue background";
const SHORT: &str = "a red star";

/// A CPU that counts what is planned for it and loaded on it.
#[derive(Default)]
struct Counting {
    cpu: Cpu<f32>,
    planned: Cell<usize>,
    loaded: usize,
    ran: usize,
}

impl Executor for Counting {
    fn workspace(&self, program: &Program, node: &Node) -> usize {
        self.planned.set(self.planned.get() + 1);
        self.cpu.workspace(program, node)
    }
    fn load(&mut self, planned: Planned, weights: &Model) -> Result<ProgramId> {
        self.loaded += 1;
        self.cpu.load(planned, weights)
    }
    fn clear(&mut self) {
        self.cpu.clear();
    }
    fn write(&mut self, buffer: &str, data: Data<'_>) -> Result<()> {
        self.cpu.write(buffer, data)
    }
    fn copy(&mut self, from: (&str, usize), to: (&str, usize), len: usize) -> Result<()> {
        self.cpu.copy(from, to, len)
    }
    fn run(&mut self, program: ProgramId) -> Result<()> {
        self.ran += 1;
        self.cpu.run(program)
    }
    fn read(&self, buffer: &str, out: DataMut<'_>) -> Result<()> {
        self.cpu.read(buffer, out)
    }
}

fn shapes() -> Pipeline {
    Pipeline::open(rarebit::assets::shapes().unwrap(), None).unwrap()
}

/// One optimised step of two.
fn method(pipeline: &Pipeline) -> MinorityPrompt {
    let schedule = Schedule::of(pipeline, Convention::Diffusers).unwrap();
    MinorityPrompt {
        variable: Variable::Token(token(Init::Word("a".into()))),
        schedule: Schedule { iterations: 1, t_lo: 0.4, t_hi: 1.0, ..schedule },
        objectives: vec![Raised::Minority],
        switches: objective::Minority::default(),
        trace: false,
        opt_seed: 0,
    }
}

#[test]
fn after_the_first_batch_nothing_is_planned_or_loaded() {
    let pipeline = shapes();
    let (method, settings) = (method(&pipeline), images(&pipeline, 2, 3.0, DType::F32));
    let plan = |prompts: &[&str], batch: usize, executor: &dyn Executor| {
        let request = Request { settings: &settings, batch, prompts, memory: None };
        method.plan(&pipeline, executor, &request)
    };
    let mut executor = Counting::default();
    let planned = plan(&[SHORT, LONG, SHORT], 1, &executor).unwrap();
    let (programs, counted) = (planned.programs().len(), executor.planned.get());
    assert!(counted > 0);
    let mut loaded = planned.load(&mut executor).unwrap();
    let batches = [job(SHORT, 1), job(LONG, 2), job(SHORT, 3)];
    let made: Vec<_> =
        batches.iter().map(|job| loaded.run(std::slice::from_ref(job), &mut |_| Ok(())).unwrap().remove(0)).collect();
    drop(loaded);
    assert_eq!((executor.loaded, executor.planned.get()), (programs, counted));
    assert!(executor.ran > programs);

    // The images are those of runs alone, and a batch that was not planned for is refused.
    for (job, image) in batches.iter().zip(&made) {
        let mut cpu = Cpu::<f32>::new();
        let mut alone = plan(&[job.prompt.as_str()], 1, &cpu).unwrap().load(&mut cpu).unwrap();
        assert!(alone.run(std::slice::from_ref(job), &mut |_| Ok(())).unwrap()[0].latents == image.latents);
        let other = if job.prompt == SHORT { LONG } else { SHORT };
        let message = alone.run(&[crate::common::minority::job(other, 1)], &mut |_| Ok(())).unwrap_err().to_string();
        assert!(message.contains("before the learnable one") && message.contains("all its batches"), "{message}");
    }
    let message = plan(&[SHORT, LONG, SHORT], 2, &Cpu::<f32>::new()).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("3 prompts are no whole batches of 2"), "{message}");
}

/// The least memory that a run over these prompts is planned within.
fn least(pipeline: &Pipeline, method: &MinorityPrompt, prompts: &[&str]) -> usize {
    let settings = images(pipeline, 2, 3.0, DType::F32);
    let fits = |memory: usize| {
        let request = Request { settings: &settings, batch: 1, prompts, memory: Some(memory) };
        let planned = method.plan(pipeline, &Cpu::<f32>::new(), &request).unwrap();
        planned.footprint().total() <= memory
    };
    let (mut below, mut enough) = (0, 1 << 30);
    assert!(fits(enough));
    while enough - below > 1 {
        let middle = below + (enough - below) / 2;
        if fits(middle) { enough = middle } else { below = middle }
    }
    enough
}

#[test]
fn a_later_batch_that_does_not_fit_is_refused_at_the_start() {
    let pipeline = shapes();
    let method = method(&pipeline);
    let (first, both) = (least(&pipeline, &method, &[LONG]), least(&pipeline, &method, &[LONG, SHORT]));
    assert!(first < both, "{first} {both}");
    let limit = (both - 1).to_string();
    let out = TempDir::new().unwrap();
    let (prompts, folder) = (path(&out, "prompts.txt"), path(&out, "images"));
    let flags =
        ["--steps", "2", "--guidance", "3", "--t-lo", "0.4", "--t-hi", "1", "--iterations", "1", "--every", "1"];
    let token = ["--tokens", "1", "--init", "word:a", "--lr", "0.07", "--quiet", "--memory-limit", &limit];
    let args = [&["minority", "--prompts", &prompts, "--out", &folder][..], &flags, &token].concat();
    fs::write(&prompts, format!("{LONG}\n{SHORT}\n")).unwrap();
    fails(&args, 1, &["--memory-limit", "the plan needs"]);
    assert!(files(out.path().join("images").as_path()).is_empty(), "refused before an image is made");
    fs::write(&prompts, format!("{LONG}\n")).unwrap();
    assert_eq!(succeeds(&args).lines().count(), 1);
}
