//! Gradients of whole sampling runs: central differences in f64, the same bits for every way of storing activations, memory as
//! planned, no work that no leaf asked for.

use crate::common::golden::{Golden, data_folder};
use crate::common::inputs;
use rarebit::Error;
use rarebit::autodiff::{Cotangent, Request, differentiate};
use rarebit::exec::cpu::{Cpu, Real};
use rarebit::exec::{Data, HostFloat};
use rarebit::models::detect;
use rarebit::models::unet::Unet;
use rarebit::optimize::chain::{Chain, Evaluation, Options, Storage, Term};
use rarebit::optimize::objective::{Objective, StepContext};
use rarebit::optimize::variable::Entry;
use rarebit::pipeline::Pipeline;
use rarebit::program::*;
use rarebit::sampler::{Method, Settings};
use rarebit::weights::Component;

const MODELS: [&str; 3] = ["tiny-sd1", "tiny-sd2", "tiny-sdxl"];

/// Uniform in [-2, 2].
fn noise(seed: usize, len: usize) -> Vec<f64> {
    inputs::noise("chain", seed, len)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn options(pipeline: &Pipeline, dtype: DType, steps: usize, guidance: f64, batch: usize, method: Method) -> Options {
    let side = 8 * pipeline.config.vae.factor().max(2);
    let sampler = Settings { method, spacing: None, steps, eta: 0.0, guidance, cfg_pp: false };
    Options { width: side, height: side, batch, dtype, sampler, image_steps: None, budget: None }
}

/// A tiny pipeline with a CLIP image tower.
fn pipeline(name: &str) -> Pipeline {
    let mut pipeline = Golden::open(name).pipeline();
    pipeline.model.add(Component::Clip, &data_folder("tiny-clip-h")).unwrap();
    pipeline
}

/// The spherical distance of the image's CLIP features from a direction, plus the mean square of the latents two steps earlier.
fn terms(pipeline: &Pipeline, steps: usize) -> Vec<Term<'_>> {
    let mean_square = Objective::new("mean square", |s: &mut StepContext<'_>| {
        let len = s.b.shape(s.latents)[1..].iter().product::<usize>() as f64;
        let squares = s.squares(s.latents);
        s.b.affine(squares, 1.0 / len, 0.0)
    });
    let clip = detect::clip_config(&pipeline.model, Component::Clip).unwrap();
    let image = Objective::new("clip", move |s: &mut StepContext<'_>| {
        let image = s.decode(s.latents);
        // Random decoders go far beyond [-1, 1], and central differences stumble over the clamp's kinks.
        let image = s.b.affine(image, 0.05, 0.0);
        let unit = s.image_features(&clip.image, Component::Clip, &clip.preprocess, image);
        let shape = s.b.shape(unit);
        let target = s.b.constant(&shape, (shape[1] as f64).sqrt().recip());
        let cosine = s.b.dot(unit, target);
        s.b.map(cosine, Scalar::Spherical)
    });
    vec![Term::at_end(image), Term::after(steps.saturating_sub(2), mean_square)]
}

/// Text states of all rows, and their pooled text.
#[derive(Clone)]
struct Texts {
    context: Vec<f64>,
    pooled: Vec<f64>,
}

impl Texts {
    fn random(pipeline: &Pipeline, rows: usize) -> Texts {
        let config = &pipeline.config;
        let pooled = config.text.last().and_then(|tower| tower.projection).unwrap_or(0);
        Texts {
            context: noise(900, rows * pipeline.tokens() * config.unet.context_width),
            pooled: noise(950, rows * pooled),
        }
    }
}

/// One evaluation.
fn evaluate<T: Real, F: HostFloat>(
    pipeline: &Pipeline,
    options: &Options,
    leaves: &[Entry],
    texts: &Texts,
    start: &[F],
) -> (Evaluation<F>, Storage) {
    let mut cpu = Cpu::<T>::new();
    let chain = Chain::plan(pipeline, &cpu, options, leaves, terms(pipeline, options.sampler.steps)).unwrap();
    let storage = chain.storage();
    let mut chain = chain.load::<F>(&mut cpu).unwrap();
    chain.condition(Data::F64(&texts.context), Data::F64(&texts.pooled)).unwrap();
    (chain.evaluate(start, &[]).unwrap(), storage)
}

/// Every leaf of every family against central differences along a random line: CLIP of the decoded image of four steps.
#[test]
fn central_differences() {
    for name in MODELS {
        let pipeline = pipeline(name);
        for (guidance, method) in [(1.0, Method::Ddim), (7.5, Method::Ddim), (3.0, Method::Dpmpp2m)] {
            let options = options(&pipeline, DType::F64, 4, guidance, 1, method);
            let options = Options { budget: Some(usize::MAX), ..options };
            let added = pipeline.config.unet.added.is_some();
            let leaves: Vec<Entry> = [Some(Entry::Latents), Some(Entry::Context), added.then_some(Entry::Pooled)]
                .into_iter()
                .flatten()
                .collect();
            let texts = Texts::random(&pipeline, if guidance == 1.0 { 1 } else { 2 });
            let start = noise(1, 64 * pipeline.config.unet.in_channels);
            let (found, storage) = evaluate::<f64, f64>(&pipeline, &options, &leaves, &texts, &start);
            assert_eq!(storage, Storage::Activations);
            for (leaf, gradient) in leaves.iter().zip(&found.gradients) {
                let along = noise(77, gradient.len());
                let slope = dot(gradient, &along);
                let loss = |h: f64| {
                    let (mut start, mut texts) = (start.clone(), texts.clone());
                    let moved = match leaf {
                        Entry::Latents => &mut start,
                        Entry::Context => &mut texts.context,
                        Entry::Pooled => &mut texts.pooled,
                        Entry::Tokens => panic!("no entry of a chain"),
                    };
                    moved.iter_mut().zip(&along).for_each(|(x, a)| *x += h * a);
                    let (found, _) = evaluate::<f64, f64>(&pipeline, &options, &leaves, &texts, &start);
                    found.losses.iter().flatten().sum::<f64>()
                };
                let error = |h: f64| ((loss(h) - loss(-h)) / (2.0 * h) - slope).abs() / slope.abs().max(1e-9);
                let best = [1e-3, 1e-4, 1e-5, 1e-6].into_iter().map(error).fold(f64::INFINITY, f64::min);
                println!("{name} {method} guidance {guidance} {leaf:?}: {best:.1e}");
                assert!(best <= 1e-6, "{name} {method} guidance {guidance} {leaf:?}: {best:e}");
            }
        }
    }
}

/// Kept activations, kept latents, and kept latents with recomputed segments: the same bits; and again, and with one thread.
#[test]
fn storage_does_not_change_bits() {
    let mut segments = 0;
    for name in MODELS {
        let pipeline = pipeline(name);
        for (guidance, method) in [(1.0, Method::Ddim), (7.5, Method::Pndm)] {
            let base = options(&pipeline, DType::F32, 4, guidance, 2, method);
            let leaves = [Entry::Latents, Entry::Context];
            let texts = Texts::random(&pipeline, if guidance == 1.0 { 2 } else { 4 });
            let start: Vec<f32> =
                noise(5, 2 * 64 * pipeline.config.unet.in_channels).into_iter().map(|x| x as f32).collect();
            let run = |budget| {
                let options = Options { budget, ..base.clone() };
                evaluate::<f32, f32>(&pipeline, &options, &leaves, &texts, &start)
            };
            let (whole, storage) = run(Some(usize::MAX));
            assert_eq!(storage, Storage::Activations);
            let (latents, _) = run(None);
            assert_eq!(whole.losses, latents.losses, "{name} {method}");
            assert_eq!(whole.gradients, latents.gradients, "{name} {method}");

            let cpu = Cpu::<f32>::new();
            let chain = Chain::plan(&pipeline, &cpu, &base, &leaves, terms(&pipeline, 4)).unwrap();
            let footprint = chain.footprint();
            let needed = footprint.arena_bytes;
            // What has no backward cannot be cut.
            let uncut = footprint.lines.iter().filter(|line| !line.program.ends_with("gradient"));
            let budget = uncut.map(|line| line.arena_bytes).fold(needed * 3 / 4, usize::max);
            let tight = Options { budget: Some(budget), ..base.clone() };
            let chain = Chain::plan(&pipeline, &cpu, &tight, &leaves, terms(&pipeline, 4)).unwrap();
            assert!(chain.footprint().arena_bytes <= budget, "{} of {budget}", chain.footprint().arena_bytes);
            let (tight, storage) = run(Some(budget));
            println!("{name} {method}: {needed} bytes, within {budget}: {storage:?}");
            // Of the step: where a loss needs more than a step, it may be the only one that is cut.
            segments = segments.max(if let Storage::Latents(recompute) = storage { recompute.segments } else { 0 });
            let none = Options { budget: Some(needed / 8), ..base.clone() };
            let refused = Chain::plan(&pipeline, &cpu, &none, &leaves, terms(&pipeline, 4)).err();
            assert!(matches!(refused, Some(Error::Memory(_))), "{refused:?}");
            assert_eq!(whole.gradients, tight.gradients, "{name} {method}");

            let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
            let (single, _) = pool.install(|| run(None));
            assert_eq!(single.gradients, latents.gradients, "{name} {method}: threads");
        }
    }
    assert!(segments > 1, "nothing was computed again");
}

/// More steps cost the states of the sampler and nothing else.
#[test]
fn memory_does_not_grow_with_steps() {
    let pipeline = pipeline("tiny-sd1");
    let cpu = Cpu::<f32>::new();
    let bytes = |steps| {
        let options = options(&pipeline, DType::F32, steps, 4.0, 1, Method::Ddim);
        let chain = Chain::plan(&pipeline, &cpu, &options, &[Entry::Latents], terms(&pipeline, steps)).unwrap();
        chain.footprint().arena_bytes + chain.state_bytes()
    };
    let side = 8 * pipeline.config.vae.factor().max(2) / pipeline.config.vae.factor();
    let latent = side * side * pipeline.config.unet.in_channels * size_of::<f32>();
    assert!(bytes(50) - bytes(10) <= 40 * latent, "{} for 40 latents of {latent}", bytes(50) - bytes(10));
}

/// Ops of a UNet's gradient to its latents, or to its keys and values, by family; printed.
fn count(to: &str) -> (Program, Vec<(String, usize)>) {
    let pipeline = Pipeline::open(rarebit::assets::shapes().unwrap(), None).unwrap();
    let config = &pipeline.config.unet;
    let unet = Unet::new(config);
    let mut b = Builder::new("unet", DType::F32);
    let latents = b.input("latents", &[1, 16, 16, config.in_channels]);
    let kv = b.input("kv", &[1, pipeline.tokens(), unet.kv_width()]);
    let time = b.input("time", &[1, unet.time_width()]);
    let prediction = unet.forward(&mut b, latents, kv, time);
    b.output("prediction", prediction);
    let program = b.finish().unwrap();
    let forward = program.nodes.len();
    let leaf = if to == "latents" { latents } else { kv };
    let objectives = vec![(prediction, Cotangent::Input("cotangent".into()))];
    let gradient =
        differentiate(&program, &Request { objectives, leaves: vec![(leaf, "gradient".into())] }, None).unwrap();
    let mut families: Vec<(String, usize)> = Vec::new();
    for node in &gradient.nodes {
        let text = gradient.show_op(&node.op);
        let name = text.split(' ').next().unwrap().to_string();
        match families.iter_mut().find(|(family, _)| *family == name) {
            Some((_, count)) => *count += 1,
            None => families.push((name, 1)),
        }
    }
    println!("gradient to {to}: {} ops forward, {} in all: {families:?}", forward, gradient.nodes.len());
    (gradient, families)
}

#[test]
fn only_what_a_leaf_asks_for() {
    let (to_latents, _) = count("latents");
    let (to_text, _) = count("kv");
    let attentions = |program: &Program| -> Vec<(bool, bool)> {
        let wanted = program.nodes.iter().filter_map(|node| match &node.op {
            Op::AttentionBackward(op) => Some((op.to_q, op.to_kv, op.forward.k.value == op.forward.q.value)),
            _ => None,
        });
        wanted.map(|(to_q, to_kv, own)| (own, to_q && to_kv == own)).collect()
    };
    // To the latents: self-attentions in full, cross-attentions without keys and values.
    let found = attentions(&to_latents);
    assert!(found.len() > 4 && found.iter().all(|(_, fits)| *fits), "{found:?}");
    // To the text: what comes before the first cross-attention has no backward.
    let is_input = |id: ValueId, name: &str| to_text.value(id).origin == Origin::Input(name.into());
    let first = to_text.nodes.iter().position(|node| match &node.op {
        Op::Attention(op) => is_input(op.k.value, "kv"),
        _ => false,
    });
    let first = first.expect("a cross-attention");
    let reads: Vec<ValueId> = to_text.nodes[..first].iter().flat_map(|node| node.outputs.clone()).collect();
    for node in &to_text.nodes {
        let backward = match &node.op {
            Op::Norm(Norm::GroupBackward { x, .. } | Norm::LayerBackward { x, .. }) => Some(*x),
            Op::Elementwise(Elementwise::ActivateBackward { x, .. } | Elementwise::GegluBackward { x, .. }) => Some(*x),
            Op::AttentionBackward(op) if op.to_q => Some(op.forward.q.value),
            _ => None,
        };
        assert!(!backward.is_some_and(|x| reads.contains(&x)), "{}", to_text.show_op(&node.op));
    }
    let is = |kind: fn(&Op) -> bool, program: &Program| program.nodes.iter().filter(|node| kind(&node.op)).count();
    let convolutions = |program: &Program| is(|op| matches!(op, Op::Conv2dBackward(_)), program);
    assert!(convolutions(&to_text) < convolutions(&to_latents));
}
