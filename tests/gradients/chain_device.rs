//! A chain whose noise lives on the device: what crosses the host, objectives that predict, optimizers, and single networks beside it.

use crate::common::golden::{Golden, data_folder};
use crate::common::inputs;
use crate::common::minority::{relative, token};
use rarebit::exec::cpu::Cpu;
use rarebit::exec::{Data, DataMut, Executor, ProgramId};
use rarebit::models::{clip_image, detect};
use rarebit::optimize::chain::{Chain, Options, Term};
use rarebit::optimize::objective::{At, Condition, Minority, Objective, RewardPrompts, StepContext, minority, reward};
use rarebit::optimize::optimizer::{Clip, Optimizer, Rule};
use rarebit::optimize::variable::token::Init;
use rarebit::optimize::variable::{CONTEXT, Entry, POOLED, Parameter, Variable, VariableSpec};
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::conditioning::{Branch, States};
use rarebit::pipeline::networks::{Networks, Tensor};
use rarebit::pipeline::programs::{Sizes, gradient_of};
use rarebit::plan::{Planned, plan};
use rarebit::program::*;
use rarebit::rewards::Clip as ClipReward;
use rarebit::sampler::{Method, Settings};
use rarebit::weights::{Component, Model};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

const PROMPT: &str = "a red star on a dark blue background";

/// What crossed between an executor and the host, and what was run.
#[derive(Default)]
struct Counts {
    written: Cell<usize>,
    read: Cell<usize>,
    programs: RefCell<Vec<String>>,
    run: RefCell<Vec<usize>>,
}

/// An executor that counts.
#[derive(Default)]
struct Counting {
    cpu: Cpu<f32>,
    counts: Rc<Counts>,
}

impl Executor for Counting {
    fn workspace(&self, program: &Program, node: &Node) -> usize {
        self.cpu.workspace(program, node)
    }

    fn load(&mut self, planned: Planned, weights: &Model) -> rarebit::Result<ProgramId> {
        self.counts.programs.borrow_mut().push(planned.program.name.clone());
        self.cpu.load(planned, weights)
    }

    fn clear(&mut self) {
        self.counts.programs.borrow_mut().clear();
        self.cpu.clear();
    }

    fn write(&mut self, buffer: &str, data: Data<'_>) -> rarebit::Result<()> {
        let bytes = match data {
            Data::F32(values) => size_of_val(values),
            Data::F64(values) => size_of_val(values),
            Data::I32(values) => size_of_val(values),
        };
        self.counts.written.set(self.counts.written.get() + bytes);
        self.cpu.write(buffer, data)
    }

    fn copy(&mut self, from: (&str, usize), to: (&str, usize), len: usize) -> rarebit::Result<()> {
        self.cpu.copy(from, to, len)
    }

    fn run(&mut self, program: ProgramId) -> rarebit::Result<()> {
        self.counts.run.borrow_mut().push(program.0);
        self.cpu.run(program)
    }

    fn read(&self, buffer: &str, out: DataMut<'_>) -> rarebit::Result<()> {
        let bytes = match &out {
            DataMut::F32(values) => size_of_val(*values),
            DataMut::F64(values) => size_of_val(*values),
        };
        self.counts.read.set(self.counts.read.get() + bytes);
        self.cpu.read(buffer, out)
    }
}

fn options(pipeline: &Pipeline, dtype: DType, method: Method, budget: Option<usize>) -> Options {
    let side = 8 * pipeline.config.vae.factor().max(2);
    let sampler = Settings { method, spacing: None, steps: 4, eta: 0.0, guidance: 3.0, cfg_pp: false };
    Options { width: side, height: side, batch: 2, dtype, sampler, image_steps: None, budget }
}

fn noise(name: &str, chain: &Chain<'_>) -> Vec<f64> {
    inputs::noise(name, 1, chain.noise_parameter().len())
}

fn single(values: &[f64]) -> Vec<f32> {
    values.iter().map(|x| *x as f32).collect()
}

fn mean_square() -> Objective<'static> {
    Objective::new("mean square", |s: &mut StepContext<'_>| {
        let len = s.b.shape(s.latents)[1..].iter().product::<usize>() as f64;
        let squares = s.squares(s.latents);
        s.b.affine(squares, 1.0 / len, 0.0)
    })
}

/// Adam on the noise, on the device: the bits of gradients and updates that go by way of the host.
#[test]
fn the_noise_stays_on_the_device() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    for (method, budget) in [
        (Method::Ddim, None),
        (Method::Ddim, Some(usize::MAX)),
        (Method::Dpmpp2m, None),
        (Method::EulerAncestral, None),
        (Method::EulerAncestral, Some(usize::MAX)),
    ] {
        let options = options(&pipeline, DType::F32, method, budget);
        let mut cpu = Cpu::<f32>::new();
        let terms = || vec![Term::at_end(mean_square()), Term::after(2, mean_square())];
        let entries = [Entry::Latents, Entry::Context];
        let chain = Chain::plan(&pipeline, &cpu, &options, &entries, terms()).unwrap();
        let (parameter, start) = (chain.noise_parameter(), single(&noise("start", &chain)));
        let adam =
            || Optimizer::ADAM.plan(&Cpu::<f32>::new(), DType::F32, std::slice::from_ref(&parameter), 1.0).unwrap();
        let steps = if method == Method::EulerAncestral { 4 } else { 0 };
        let draws: Vec<Vec<f32>> = (0..steps).map(|k| single(&inputs::noise("draw", k, start.len()))).collect();

        let mut chain = chain.load::<f32>(&mut cpu).unwrap();
        let mut optimizer = adam().load(chain.executor(), &pipeline.model).unwrap();
        chain.prompts(&[PROMPT; 2], &[""; 2]).unwrap();
        chain.set_noise(&start).unwrap();
        chain.set_draws(&draws).unwrap();
        optimizer.reset(chain.executor()).unwrap();
        let mut losses = vec![];
        for _ in 0..3 {
            losses.push(chain.gradient().unwrap());
            optimizer.step(chain.executor(), 0.05).unwrap();
        }
        let learned = chain.noise().unwrap();
        assert!(losses[2][0][0] < losses[0][0][0], "{method}: {losses:?}");

        // The same by way of the host.
        let mut cpu = Cpu::<f32>::new();
        let chain = Chain::plan(&pipeline, &cpu, &options, &entries, terms()).unwrap();
        let mut chain = chain.load::<f32>(&mut cpu).unwrap();
        chain.prompts(&[PROMPT; 2], &[""; 2]).unwrap();
        let mut host = Cpu::<f32>::new();
        let mut optimizer = adam().load(&mut host, &pipeline.model).unwrap();
        host.write(parameter.name, Data::F32(&start)).unwrap();
        let mut now = start.clone();
        for seen in &losses {
            let found = chain.evaluate(&now, &draws).unwrap();
            assert_eq!(&found.losses, seen, "{method}");
            host.write(&gradient_of(parameter.name), Data::F32(&found.gradients[0])).unwrap();
            optimizer.step(&mut host, 0.05).unwrap();
            host.read(parameter.name, DataMut::F32(&mut now)).unwrap();
        }
        assert!(now == learned, "{method}: device and host");
    }
}

/// Per evaluation and update nothing crosses but the numbers of the steps on the way in and the losses on the way out.
#[test]
fn bytes_over_the_host() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    for (method, budget) in [(Method::Ddim, None), (Method::Ddim, Some(usize::MAX)), (Method::EulerAncestral, None)] {
        let options = options(&pipeline, DType::F32, method, budget);
        let mut counting = Counting::default();
        let counts = Rc::clone(&counting.counts);
        let terms = vec![Term::at_end(mean_square())];
        let chain = Chain::plan(&pipeline, &counting, &options, &[Entry::Latents], terms).unwrap();
        let start = single(&noise("start", &chain));
        let adam = Optimizer::ADAM.plan(&counting, DType::F32, &[chain.noise_parameter()], 1.0).unwrap();
        let mut chain = chain.load::<f32>(&mut counting).unwrap();
        let mut adam = adam.load(chain.executor(), &pipeline.model).unwrap();
        chain.prompts(&[PROMPT; 2], &[""; 2]).unwrap();
        chain.set_noise(&start).unwrap();
        let draws = if method == Method::EulerAncestral { vec![start.clone(); 4] } else { vec![] };
        chain.set_draws(&draws).unwrap();
        let before = (counts.written.get(), counts.read.get());
        let evaluations = 3;
        for _ in 0..evaluations {
            chain.gradient().unwrap();
            adam.step(chain.executor(), 0.05).unwrap();
        }
        let (written, read) = (counts.written.get() - before.0, counts.read.get() - before.1);
        println!("{method} {budget:?}: {written} bytes in, {read} out, latents are {}", size_of_val(&start[..]));
        assert_eq!(read, evaluations * 2 * size_of::<f32>(), "the losses of two samples");
        // A step's number and coefficients [x, e_c, e_u, noise], forward and back, and the seven numbers of Adam.
        let passes = if budget.is_none() { 2 } else { 1 };
        let coefficients = if method == Method::EulerAncestral { 4 } else { 3 };
        assert_eq!(written, evaluations * (passes * 4 * (4 + 8 * coefficients) + 8 * 7), "{method}");
    }
}

/// A loss alone: the same bits, and no backward is run.
#[test]
fn a_loss_without_a_gradient() {
    let pipeline = Golden::open("tiny-sdxl").pipeline();
    for budget in [None, Some(usize::MAX)] {
        let options = options(&pipeline, DType::F32, Method::Pndm, budget);
        let mut counting = Counting::default();
        let counts = Rc::clone(&counting.counts);
        let terms = vec![Term::at_end(mean_square()), Term::after(0, mean_square()), Term::after(2, mean_square())];
        let chain = Chain::plan(&pipeline, &counting, &options, &[Entry::Latents, Entry::Pooled], terms).unwrap();
        let start = single(&noise("start", &chain));
        let mut chain = chain.load::<f32>(&mut counting).unwrap();
        chain.prompts(&[PROMPT; 2], &[""; 2]).unwrap();
        chain.set_noise(&start).unwrap();
        let alone = chain.loss().unwrap();
        assert_eq!(alone, chain.gradient().unwrap());
        assert_eq!(alone, chain.loss().unwrap(), "after a backward");
        let programs = counts.programs.borrow();
        let ran: Vec<&String> = counts.run.borrow().iter().map(|id| &programs[*id]).collect();
        let first = ran.iter().position(|name| name.contains("gradient") || name.contains("backward")).unwrap();
        // The text of four rows, the conditions, the start, five calls of PNDM and three losses.
        assert_eq!(first, if budget.is_none() { 4 + 1 + 9 + 1 + 5 } else { 4 + 1 + 9 + 1 }, "{ran:?}");
    }
}

/// MinorityPrompt's objective, guided, on latents after two steps, and the denoising loss of the final ones: central differences in
/// f64 to noise and text; both forms agree.
#[test]
fn objectives_predict_in_a_chain() {
    for name in ["tiny-sd1", "tiny-sdxl"] {
        let pipeline = Golden::open(name).pipeline();
        let terms = || {
            let denoising = Objective::new("denoising", |s: &mut StepContext<'_>| {
                let n = s.draw();
                let noised = s.renoise(s.latents, n);
                let prediction = s.predict(noised, At::T2, Condition::Prompt);
                let e = s.noise(prediction);
                let error = s.difference(e, n);
                s.squares(error)
            });
            let guided = Minority { guided: true, ..Minority::default() };
            vec![Term::after(2, minority(guided)), Term { t2: 0.3, ..Term::at_end(denoising) }]
        };
        let mut forms = vec![];
        for budget in [None, Some(usize::MAX)] {
            let options = options(&pipeline, DType::F64, Method::Ddim, budget);
            let mut cpu = Cpu::<f64>::new();
            let chain = Chain::plan(&pipeline, &cpu, &options, &[Entry::Latents, Entry::Context], terms()).unwrap();
            let start = noise("start", &chain);
            let mut chain = chain.load::<f64>(&mut cpu).unwrap();
            let context = inputs::noise("context", 3, 4 * pipeline.tokens() * pipeline.config.unet.context_width);
            let pooled = pipeline.config.text.last().and_then(|tower| tower.projection).unwrap_or(0);
            let pooled = inputs::noise("pooled", 3, 4 * pooled);
            chain.set_seeds(&[5, 6], 7).unwrap();
            let mut at = |start: &[f64], context: &[f64]| {
                chain.condition(Data::F64(context), Data::F64(&pooled)).unwrap();
                chain.evaluate(start, &[]).unwrap()
            };
            let found = at(&start, &context);
            // The second form is held against the first.
            let entries = if forms.is_empty() { vec![("noise", &start), ("text", &context)] } else { vec![] };
            for (index, (what, from)) in entries.into_iter().enumerate() {
                let along = inputs::noise("along", 4, from.len());
                let slope: f64 = found.gradients[index].iter().zip(&along).map(|(a, b)| a * b).sum();
                let mut loss = |h: f64| {
                    let moved: Vec<f64> = from.iter().zip(&along).map(|(x, a)| x + h * a).collect();
                    let found = if index == 0 { at(&moved, &context) } else { at(&start, &moved) };
                    found.losses.iter().flatten().sum::<f64>()
                };
                let mut error = |h: f64| ((loss(h) - loss(-h)) / (2.0 * h) - slope).abs() / slope.abs();
                let best = [1e-4, 1e-5, 1e-6].into_iter().map(&mut error).fold(f64::INFINITY, f64::min);
                println!("{name} {what}: {best:.1e}");
                assert!(best < 1e-6, "{name} {what}: {best:e}");
            }
            forms.push(found);
        }
        assert_eq!(forms[0].losses, forms[1].losses, "{name}");
        // What an objective adds to keys and values meets the steps' shares in another order.
        for (one, other) in forms[0].gradients.iter().zip(&forms[1].gradients) {
            let error = relative(one, other);
            assert!(error < 1e-12, "{name}: the forms are {error:e} apart");
        }
    }
}

/// A learnable token through the text towers and a whole run: its gradient, carried on from that to the text states on the device, is
/// the central difference in f64.
#[test]
fn tokens_enter_a_chain() {
    for name in ["tiny-sd1", "tiny-sdxl"] {
        let pipeline = Golden::open(name).pipeline();
        let options = options(&pipeline, DType::F64, Method::Ddim, None);
        let added = pipeline.config.unet.added.is_some();
        let entries = [Some(Entry::Context), added.then_some(Entry::Pooled)].into_iter().flatten();
        let entries: Vec<Entry> = entries.collect();
        let mut cpu = Cpu::<f64>::new();
        let chain = Chain::plan(&pipeline, &cpu, &options, &entries, vec![Term::at_end(mean_square())]).unwrap();
        let start = noise("start", &chain);

        let settings = token(Init::White { scale: 1.0 });
        let ids = settings.tokenize(&pipeline, &[PROMPT, "a red heart"]).unwrap();
        let begin = settings.initial(&pipeline, &[1, 2]).unwrap();
        let variable = Variable::Token(settings);
        let (height, width) = pipeline.latent_size(options.width, options.height).unwrap();
        let sizes = Sizes { batch: 2, height, width, tokens: pipeline.tokens() };
        let spec =
            VariableSpec { pipeline: &pipeline, dtype: DType::F64, sizes, variable: &variable, prefix: ids.prefix };
        let programs = [spec.prefix(), spec.forward(), spec.backward()].map(|program| {
            let workspace = |program: &Program, node: &Node| cpu.workspace(program, node);
            plan(program.unwrap().unwrap(), workspace)
        });
        let mut chain = chain.load::<f64>(&mut cpu).unwrap();
        let [prefix, forward, backward] =
            programs.map(|planned| chain.executor().load(planned, &pipeline.model).unwrap());
        ids.write(chain.executor(), pipeline.tokens()).unwrap();
        chain.executor().run(prefix).unwrap();
        chain.prompts(&[PROMPT, "a red heart"], &[""; 2]).unwrap();
        chain.set_noise(&start).unwrap();

        let states = States { context: CONTEXT, pooled: added.then_some(POOLED) };
        let gradients = [CONTEXT, POOLED].map(gradient_of);
        let to = States { context: &gradients[0], pooled: added.then_some(&gradients[1]) };
        let mut at = |rows: &[Vec<f64>], with_gradient: bool| -> (f64, Vec<Vec<f64>>) {
            for (parameter, rows) in spec.parameters().iter().zip(rows) {
                chain.executor().write(parameter.name, Data::F64(rows)).unwrap();
            }
            chain.executor().run(forward).unwrap();
            chain.condition_on_states(Branch::Prompt, states).unwrap();
            let losses = if with_gradient { chain.gradient() } else { chain.loss() }.unwrap();
            let mut found = vec![];
            if with_gradient {
                chain.copy_gradient(Branch::Prompt, to).unwrap();
                chain.executor().run(backward).unwrap();
                for parameter in spec.parameters() {
                    let mut values = vec![0.0; parameter.len()];
                    let name = gradient_of(parameter.name);
                    chain.executor().read(&name, DataMut::F64(&mut values)).unwrap();
                    found.push(values);
                }
            }
            (losses.iter().flatten().sum(), found)
        };
        let begin: Vec<Vec<f64>> = begin.iter().map(|rows| rows.iter().map(|x| f64::from(*x)).collect()).collect();
        let (_, gradient) = at(&begin, true);
        for tower in 0..begin.len() {
            let along = inputs::noise("along", 4, begin[tower].len());
            let slope: f64 = gradient[tower].iter().zip(&along).map(|(a, b)| a * b).sum();
            let mut loss = |h: f64| {
                let mut moved = begin.clone();
                moved[tower].iter_mut().zip(&along).for_each(|(x, a)| *x += h * a);
                at(&moved, false).0
            };
            let mut error = |h: f64| ((loss(h) - loss(-h)) / (2.0 * h) - slope).abs() / slope.abs();
            let best = [1e-4, 1e-5, 1e-6].into_iter().map(&mut error).fold(f64::INFINITY, f64::min);
            println!("{name} tower {tower}: {best:.1e}");
            assert!(best < 1e-6, "{name} tower {tower}: {best:e} from a slope of {slope:e}");
        }
    }
}

/// A network on the executor of a loaded chain: encoding an image changes nothing of the run's bits.
#[test]
fn networks_beside_a_chain() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    let options = options(&pipeline, DType::F32, Method::Ddim, None);
    let mut cpu = Cpu::<f32>::new();
    let chain = Chain::plan(&pipeline, &cpu, &options, &[Entry::Latents], vec![Term::at_end(mean_square())]).unwrap();
    let start = single(&noise("start", &chain));
    let mut chain = chain.load::<f32>(&mut cpu).unwrap();
    chain.prompts(&[PROMPT; 2], &[""; 2]).unwrap();
    let before = chain.evaluate(&start, &[]).unwrap();
    let side = options.width;
    let image = Tensor { shape: vec![1, 3, side, side], data: single(&inputs::noise("image", 1, 3 * side * side)) };
    let beside = Networks::new(&pipeline, chain.executor(), DType::F32).encode(&image).unwrap();
    let after = chain.evaluate(&start, &[]).unwrap();
    assert!(before.losses == after.losses && before.gradients == after.gradients);
    drop(chain);
    let mut alone = Cpu::<f32>::new();
    assert!(beside == Networks::new(&pipeline, &mut alone, DType::F32).encode(&image).unwrap());
}

/// The similarity of the embedded CLIP, raised through three steps on the device; another CLIP scores the images on the same executor.
#[test]
fn a_reward_is_an_objective() {
    let mut pipeline = Pipeline::open(rarebit::assets::shapes().unwrap(), None).unwrap();
    pipeline.model.add(Component::HeldOutClip, &data_folder("tiny-clip-h")).unwrap();
    let clip = ClipReward::new(&pipeline.model, Component::Clip).unwrap();
    let sampler = Settings { method: Method::Ddim, spacing: None, steps: 3, eta: 0.0, guidance: 1.0, cfg_pp: false };
    let options =
        Options { width: 64, height: 64, batch: 1, dtype: DType::F32, sampler, image_steps: None, budget: None };
    let mut cpu = Cpu::<f32>::new();
    let terms = vec![Term::at_end(reward(&clip))];
    let chain = Chain::plan(&pipeline, &cpu, &options, &[Entry::Latents], terms).unwrap();
    let adam = Optimizer::ADAM.plan(&cpu, DType::F32, &[chain.noise_parameter()], 1.0).unwrap();
    let start = single(&noise("start", &chain));
    let mut chain = chain.load::<f32>(&mut cpu).unwrap();
    let mut adam = adam.load(chain.executor(), &pipeline.model).unwrap();
    let prompts = RewardPrompts::load(&clip, chain.executor(), &pipeline.model, DType::F32, 1).unwrap();
    prompts.set(chain.executor(), &[PROMPT]).unwrap();
    chain.prompts(&[PROMPT], &[""]).unwrap();
    chain.set_noise(&start).unwrap();
    let mut similarity = vec![];
    for _ in 0..5 {
        similarity.push(-chain.gradient().unwrap()[0][0]);
        adam.step(chain.executor(), 0.02).unwrap();
    }
    println!("{similarity:?}");
    assert!(similarity[4] > similarity[0] + 0.01 && similarity.iter().all(|s| s.abs() <= 1.0), "{similarity:?}");

    // What stands beside it does not change it: features of the held-out CLIP on the same executor.
    let held_out = detect::clip_config(&pipeline.model, Component::HeldOutClip).unwrap();
    let mut b = Builder::new("held out", DType::F32);
    let image = b.accumulator_input("held out image", &[1, 64, 64, 3]);
    let image = held_out.preprocess.append(&mut b, image);
    let features = clip_image::features(&mut b, &held_out.image, Component::HeldOutClip, image);
    b.output("held out features", features);
    let planned = plan(b.finish().unwrap(), |program, node| Cpu::<f32>::new().workspace(program, node));
    let program = chain.executor().load(planned, &pipeline.model).unwrap();
    let before = chain.loss().unwrap();
    chain.executor().run(program).unwrap();
    assert_eq!(chain.loss().unwrap(), before);
}

/// `clip_grad_norm_` and `clip_grad_value_` before SGD with momentum 0, whose step is the gradient itself.
#[test]
fn clipped_gradients() {
    let model = Golden::open("tiny-sd1").pipeline().model;
    let parameters = [Parameter { name: "p", shape: vec![2, 3] }, Parameter { name: "q", shape: vec![4] }];
    let gradients = [vec![0.3, -0.4, 1.2, 2.0, -0.1, 0.0], vec![-3.0, 0.5, 0.25, 1.0]];
    let norm = gradients.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
    let step = |clip: Option<Clip>| -> Vec<Vec<f64>> {
        let mut cpu = Cpu::<f64>::new();
        let optimizer = Optimizer { rule: Rule::Nesterov { momentum: 0.0 }, clip };
        let planned = optimizer.plan(&cpu, DType::F64, &parameters, 1.0).unwrap();
        let mut loaded = planned.load(&mut cpu, &model).unwrap();
        for (parameter, gradient) in parameters.iter().zip(&gradients) {
            cpu.write(&gradient_of(parameter.name), Data::F64(gradient)).unwrap();
        }
        loaded.reset(&mut cpu).unwrap();
        loaded.step(&mut cpu, 1.0).unwrap();
        let read = |parameter: &Parameter| {
            let mut values = vec![0.0; parameter.len()];
            cpu.read(parameter.name, DataMut::F64(&mut values)).unwrap();
            values
        };
        parameters.iter().map(read).collect()
    };
    let close = |found: &[Vec<f64>], expected: &dyn Fn(f64) -> f64| {
        for (found, g) in found.iter().flatten().zip(gradients.iter().flatten()) {
            assert!((found + expected(*g)).abs() < 1e-12, "{found} for {g}");
        }
    };
    close(&step(None), &|g| g);
    close(&step(Some(Clip::Value(0.5))), &|g| g.clamp(-0.5, 0.5));
    close(&step(Some(Clip::GlobalNorm(1.0))), &|g| g / (norm + 1e-6));
    close(&step(Some(Clip::GlobalNorm(100.0))), &|g| g);
}
