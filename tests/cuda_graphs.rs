//! Programs recorded as graphs, on the emulated driver: the same bits as launch by launch, where the arena lies elsewhere too, and
//! what a sampling step asks of the driver.

mod common;

use common::emulated::{build, cuda};
use common::golden::Golden;
use rarebit::Result;
use rarebit::exec::Executor;
use rarebit::exec::cuda::{Address, Cuda, Driver, Emulated, Function, Graph, Launch, Settings as Emulation, Work};
use rarebit::methods::generate::{Generator, Job, Progress, Settings};
use rarebit::methods::pipeline::Pipeline;
use rarebit::program::DType;
use rarebit::sampler::{self, Method, Rng};
use std::cell::RefCell;
use std::rc::Rc;

const STEPS: usize = 4;
const SIDE: usize = 16;

fn settings(method: Method) -> Settings {
    let sampler = sampler::Settings { method, spacing: None, steps: STEPS, eta: 0.0, guidance: 4.0, cfg_pp: false };
    Settings { width: SIDE, height: SIDE, sampler, rng: Rng::Philox, dtype: DType::F16 }
}

fn job(seed: u64) -> Job {
    let prompt = ["a red star", "a small green heart"][seed as usize % 2];
    Job { prompt: prompt.into(), negative: None, seed, draws: vec![] }
}

/// Latents and pixels of images, one after the other.
fn images(pipeline: &Pipeline, executor: &mut Cuda) -> Vec<(Vec<f32>, Vec<u8>)> {
    let generator = Generator::plan(pipeline, executor, settings(Method::EulerAncestral), 1).unwrap();
    let mut loaded = generator.load(executor).unwrap();
    (0..3)
        .map(|seed| loaded.run(&[job(seed)], &mut |_| Ok(())).unwrap().remove(0))
        .map(|i| (i.latents, i.rgb))
        .collect()
}

#[test]
fn replays_have_the_bits_of_their_launches() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    let mut eager = cuda(Emulation::default().workers(2)).with_graphs(false);
    let mut recorded = cuda(Emulation::default().workers(2));
    let expected = images(&pipeline, &mut eager);
    assert!(expected[0] != expected[1], "inputs are read anew by every run");
    assert_eq!(images(&pipeline, &mut recorded), expected);
}

#[test]
fn a_larger_program_moves_the_arena_and_graphs_are_made_anew() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    let calls = Rc::default();
    let mut moved = counted(&calls);
    let small = Generator::plan(&pipeline, &moved, settings(Method::Ddim), 1).unwrap();
    let mut small_alone = cuda(Emulation::default().workers(2));
    let planned = Generator::plan(&pipeline, &small_alone, settings(Method::Ddim), 1).unwrap();
    let expected = planned.load(&mut small_alone).unwrap().run(&[job(0)], &mut |_| Ok(())).unwrap();

    // A small program, recorded; then one that needs a larger arena.
    let text = moved.load(small.programs().text.clone(), &pipeline.model).unwrap();
    for _ in 0..3 {
        moved.run(text).unwrap();
    }
    assert_eq!((count(&calls, "record"), count(&calls, "replay")), (1, 2));
    moved.load(small.programs().step.clone(), &pipeline.model).unwrap();
    assert_eq!(count(&calls, "forget"), 1, "its addresses hold no longer");
    moved.run(text).unwrap();
    let found = small.load(&mut moved).unwrap().run(&[job(0)], &mut |_| Ok(())).unwrap();
    assert_eq!(found[0].latents, expected[0].latents);
    moved.clear();
    assert_eq!(count(&calls, "record"), count(&calls, "forget"), "every recording is given back");
}

#[test]
fn a_step_is_one_replay_and_waits_for_nothing() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    let calls = Rc::default();
    let mut executor = counted(&calls);
    let generator = Generator::plan(&pipeline, &executor, settings(Method::Ddim), 1).unwrap();
    let mut loaded = generator.load(&mut executor).unwrap();
    loaded.run(&[job(0)], &mut |_| Ok(())).unwrap();
    let mut steps: Vec<Vec<&str>> = vec![];
    calls.borrow_mut().clear();
    let observe = &mut |progress: Progress<'_>| {
        if let Progress::Step { .. } = progress {
            steps.push(calls.take());
        }
        Ok(())
    };
    loaded.run(&[job(1)], observe).unwrap();
    assert_eq!(steps.len(), STEPS);
    for step in &steps[1..] {
        // The step's number and its coefficients, then all launches at once.
        assert_eq!(*step, ["stage", "stage", "replay"]);
    }
}

/// An emulated driver that notes what it is asked for.
struct Counting {
    driver: Emulated,
    calls: Rc<RefCell<Vec<&'static str>>>,
}

fn counted(calls: &Rc<RefCell<Vec<&'static str>>>) -> Cuda {
    let driver = Emulated::open(&build(), Emulation::default().workers(2)).unwrap();
    Cuda::new(Box::new(Counting { driver, calls: Rc::clone(calls) }))
}

fn count(calls: &RefCell<Vec<&'static str>>, what: &str) -> usize {
    calls.borrow().iter().filter(|call| **call == what).count()
}

impl Counting {
    fn note(&self, what: &'static str) {
        self.calls.borrow_mut().push(what);
    }
}

impl Driver for Counting {
    fn name(&self) -> String {
        self.driver.name()
    }
    fn free_memory(&self) -> Result<usize> {
        self.driver.free_memory()
    }
    fn allocate(&mut self, bytes: usize) -> Result<Address> {
        self.note("allocate");
        self.driver.allocate(bytes)
    }
    fn release(&mut self, address: Address) -> Result<()> {
        self.note("release");
        self.driver.release(address)
    }
    fn stage(&mut self, to: Address, bytes: usize, fill: &mut dyn FnMut(&mut [u8])) -> Result<()> {
        self.note("stage");
        self.driver.stage(to, bytes, fill)
    }
    fn read(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        self.note("read");
        self.driver.read(from, bytes)
    }
    fn fill(&mut self, to: Address, value: u8, bytes: usize) -> Result<()> {
        self.note("fill");
        self.driver.fill(to, value, bytes)
    }
    fn copy(&mut self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.note("copy");
        self.driver.copy(from, to, bytes)
    }
    fn function(&mut self, kernel: &str, shared: u32) -> Result<Function> {
        self.driver.function(kernel, shared)
    }
    fn launch(&mut self, function: Function, launch: &Launch) -> Result<()> {
        self.note("launch");
        self.driver.launch(function, launch)
    }
    fn record(&mut self, work: &mut dyn Iterator<Item = Work<'_>>) -> Result<Graph> {
        self.note("record");
        self.driver.record(work)
    }
    fn replay(&mut self, graph: Graph) -> Result<()> {
        self.note("replay");
        self.driver.replay(graph)
    }
    fn forget(&mut self, graph: Graph) -> Result<()> {
        self.note("forget");
        self.driver.forget(graph)
    }
    fn synchronize(&self) -> Result<()> {
        self.note("synchronize");
        self.driver.synchronize()
    }
}
