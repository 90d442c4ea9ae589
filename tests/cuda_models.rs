//! Whole models on the emulated driver: the tiny pipelines' networks and their gradients against the CPU, and the embedded model
//! end to end: its image, the gradient of the minority objective to a token, the same bits alone and in a batch.

mod common;

use common::emulated::cuda;
use common::feed::noise;
use common::golden::{Golden, relative_error};
use common::rounded::Rounded;
use common::storage::TYPES;
use rarebit::autodiff::{Cotangent, Request, differentiate};
use rarebit::exec::cpu::Cpu;
use rarebit::exec::cuda::Settings as Emulation;
use rarebit::exec::{Data, DataMut, Executor};
use rarebit::methods::generate::{Generator, Image, Job, Settings};
use rarebit::methods::networks::{AddedConditions, Networks, Tensor};
use rarebit::methods::pipeline::Pipeline;
use rarebit::models::clip_text::ClipText;
use rarebit::models::config::Prediction;
use rarebit::models::unet::Unet;
use rarebit::plan::plan;
use rarebit::program::*;
use rarebit::sampler::{self, Method, Rng};
use rarebit::weights::{Component, Pack, Weight};

/// A network in 16 bits may be this many times as far off as exact arithmetic with the same storage, and in f32 this far.
const MARGIN: f64 = 2.0;
const SINGLE: f64 = 2e-5;

fn emulated() -> Emulation {
    Emulation::default().workers(2)
}

fn tensor(name: &str, shape: &[usize]) -> Tensor {
    let data = noise(name, 0, shape.iter().product()).into_iter().map(|x| x as f32).collect();
    Tensor { shape: shape.to_vec(), data }
}

/// Every network of a pipeline and the gradients of UNet and decoder: names and values.
fn networks(pipeline: &Pipeline, executor: Box<dyn Executor>, dtype: DType) -> Vec<(&'static str, Vec<f32>)> {
    let config = &pipeline.config;
    let mut networks = Networks::new(pipeline, executor, dtype);
    let tokens = pipeline.tokenize("a photo of a red cat").unwrap();
    let ids: Vec<&[i32]> = tokens.iter().map(|tokens| &tokens.ids[..]).collect();
    let (context, pooled) = networks.text(&ids, tokens.last().unwrap().eos).unwrap();
    let (c, f) = (config.unet.in_channels, config.vae.factor());
    let latents = tensor("latents", &[1, c, 8, 12]);
    let added =
        pooled.clone().map(|pooled| AddedConditions { pooled, size_ids: vec![64.0, 96.0, 0.0, 0.0, 64.0, 96.0] });
    let prediction = networks.unet(&latents, 501.0, &context, added.as_ref()).unwrap();
    let cotangent = tensor("cotangent", &prediction.shape);
    let gradient = networks.unet_gradient(&latents, 501.0, &context, added.as_ref(), &cotangent).unwrap();
    let image = networks.decode(&latents).unwrap();
    let d_decode = networks.decode_gradient(&latents, &tensor("d_image", &image.shape)).unwrap();
    let (mean, log_variance) = networks.encode(&tensor("image", &[1, 3, 8 * f, 4 * f])).unwrap();
    let mut found = vec![
        ("context", context),
        ("prediction", prediction.data),
        ("gradient to latents", gradient.latents.data),
        ("gradient to context", gradient.context),
        ("image", image.data),
        ("gradient of the image", d_decode.data),
        ("encoded mean", mean.data),
        ("encoded log-variance", log_variance.data),
    ];
    found.extend(pooled.map(|pooled| ("pooled", pooled)));
    found.extend(gradient.pooled.map(|pooled| ("gradient to pooled", pooled)));
    found
}

#[test]
fn tiny_models_agree_with_the_cpu() {
    for name in ["tiny-sd1", "tiny-sd2", "tiny-sdxl"] {
        let pipeline = Golden::open(name).pipeline();
        let expected = networks(&pipeline, Box::new(Cpu::<f64>::new()), DType::F64);
        for dtype in TYPES {
            let found = networks(&pipeline, Box::new(cuda(emulated())), dtype);
            let honest = networks(&pipeline, Box::<Rounded>::default(), dtype);
            for (((what, found), (_, honest)), (_, expected)) in found.iter().zip(&honest).zip(&expected) {
                let (error, storage) = (relative_error(found, expected), relative_error(honest, expected));
                println!("{name:10} {dtype:5} {what:24} {error:.2e}, of storage {storage:.2e}");
                let limit = if dtype == DType::F32 { SINGLE } else { MARGIN * storage };
                assert!(error <= limit, "{name} {dtype} {what}: {error:e}, of storage {storage:e}");
            }
        }
    }
}

fn shapes() -> Pipeline {
    Pipeline::open(rarebit::assets::shapes().unwrap(), None).unwrap()
}

fn images(pipeline: &Pipeline, mut executor: impl Executor, dtype: DType, steps: usize, jobs: &[Job]) -> Vec<Image> {
    let side = pipeline.config.image_size;
    let sampler =
        sampler::Settings { method: Method::Ddim, spacing: None, steps, eta: 0.0, guidance: 4.0, cfg_pp: false };
    let settings = Settings { width: side, height: side, sampler, rng: Rng::Philox, dtype };
    let generator = Generator::plan(pipeline, &executor, settings, jobs.len()).unwrap();
    generator.load(&mut executor).unwrap().run(jobs, &mut |_| Ok(())).unwrap()
}

fn job(seed: u64) -> Job {
    let prompt = ["a red star on a dark blue background", "a small green heart"][seed as usize % 2];
    Job { prompt: prompt.into(), negative: None, seed, draws: vec![] }
}

/// Peak signal-to-noise ratio in dB of 8-bit images.
fn psnr(a: &Image, b: &Image) -> f64 {
    let squares: f64 = a.rgb.iter().zip(&b.rgb).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    10.0 * (255.0f64.powi(2) / (squares / a.rgb.len() as f64).max(1e-9)).log10()
}

#[test]
fn the_embedded_models_image_in_16_bits() {
    let pipeline = shapes();
    let expected = &images(&pipeline, Cpu::<f32>::new(), DType::F32, 20, &[job(0)])[0];
    for dtype in [DType::F16, DType::BF16] {
        let found = &images(&pipeline, cuda(emulated()), dtype, 20, &[job(0)])[0];
        let psnr = psnr(found, expected);
        println!("{dtype}: {psnr:.1} dB");
        assert!(psnr >= 40.0, "{dtype}: {psnr:.1} dB");
    }
}

#[test]
fn an_image_has_the_same_bits_in_a_batch() {
    let pipeline = shapes();
    let make = |jobs: &[Job]| images(&pipeline, cuda(emulated()), DType::BF16, 2, jobs);
    let together = make(&[job(3), job(4)]);
    for (seed, of_batch) in [3, 4].into_iter().zip(&together) {
        let alone = &make(&[job(seed)])[0];
        assert!(alone.latents == of_batch.latents && alone.rgb == of_batch.rgb, "seed {seed}");
    }
    assert!(together[0].latents != together[1].latents);
}

/// The minority objective of one sample at timestep 701, and its gradient to the rows of a learnable token (Um & Ye 2025,
/// eq. 8-10): how far the estimate of the clean image moves when it is noised to timestep 601 and estimated again without the
/// token.
fn minority(pipeline: &Pipeline, dtype: DType) -> Program {
    let config = &pipeline.config;
    let (tower, unet) = (&config.text[0], Unet::new(&config.unet));
    let mut b = Builder::new("minority", dtype);
    let table = |key: &str, rows: usize| Weight {
        component: Component::TextEncoder,
        keys: vec![format!("text_model.embeddings.{key}.weight")],
        pack: Pack::Table,
        shape: vec![rows, tower.width],
    };
    let vocabulary = b.weight(table("token_embedding", tower.vocab_size));
    let positions = b.weight(table("position_embedding", tower.max_positions));
    let token = b.wide_input("token", &[1, tower.width]);
    let extra = b.narrow(token);
    let encode = |b: &mut Builder, name: &str| {
        let ids = b.input_i32(name, &[1, pipeline.tokens()]);
        let x = b.tokens_with(ids, vocabulary, extra, positions);
        let mut text = ClipText::new(b, tower, Component::TextEncoder);
        let x = text.layers(x, 0, tower.layers);
        text.final_norm(x)
    };
    let with_token = encode(&mut b, "ids");
    let without = encode(&mut b, "ids without");
    let timesteps = b.wide_input("timesteps", &[2]);
    let time = unet.time(&mut b, timesteps, None);
    let side = config.image_size / config.vae.factor();
    let shape = [1, side, side, config.unet.in_channels];
    let (z, noise) = (b.wide_input("z", &shape), b.wide_input("noise", &shape));
    let clean = |b: &mut Builder, z: ValueId, context: ValueId, at: usize| {
        let kv = unet.context_kv(b, context);
        let time = b.slice(time, at, 1);
        let prediction = unet.forward(b, z, kv, time);
        let prediction = b.widen(prediction);
        let a: f64 = ALPHA_BAR[at];
        let (z, e) = (b.affine(z, a.powf(-0.5), 0.0), b.affine(prediction, -((1.0 - a) / a).sqrt(), 0.0));
        b.add(z, e)
    };
    let first = clean(&mut b, z, with_token, 0);
    let (kept, fresh) = (b.affine(first, ALPHA_BAR[1].sqrt(), 0.0), b.affine(noise, (1.0 - ALPHA_BAR[1]).sqrt(), 0.0));
    let noised = b.add(kept, fresh);
    let second = clean(&mut b, noised, without, 1);
    let [first_fixed, second_fixed] = [first, second].map(|x| b.detach(x));
    let mut loss = None;
    for (x, y) in [(first_fixed, second), (first, second_fixed)] {
        let y = b.affine(y, -1.0, 0.0);
        let difference = b.add(x, y);
        let squares = b.dot(difference, difference);
        let norm = b.map(squares, Scalar::Sqrt);
        loss = Some(match loss {
            None => norm,
            Some(other) => b.add(other, norm),
        });
    }
    let loss = loss.unwrap();
    b.output("loss", loss);
    let program = b.finish().unwrap();
    let leaves = vec![(program.input("token").unwrap(), "d_token".to_string())];
    differentiate(&program, &Request { objectives: vec![(loss, Cotangent::Ones)], leaves }, None).unwrap()
}

const TIMESTEPS: [f64; 2] = [701.0, 601.0];
const ALPHA_BAR: [f64; 2] = [0.0925, 0.182];

fn minority_gradient(pipeline: &Pipeline, mut executor: impl Executor, dtype: DType) -> (f32, Vec<f32>) {
    let tower = &pipeline.config.text[0];
    let program = minority(pipeline, dtype);
    let planned = plan(program, |program, node| executor.workspace(program, node));
    let id = executor.load(planned, &pipeline.model).unwrap();
    let tokens = pipeline.tokenize("a red star on a dark blue background").unwrap().remove(0);
    let mut with_token = tokens.ids.clone();
    with_token.insert(tokens.eos, tower.vocab_size as i32);
    with_token.truncate(tokens.ids.len());
    let side = pipeline.config.image_size / pipeline.config.vae.factor();
    let len = side * side * pipeline.config.unet.in_channels;
    let token: Vec<f64> = noise("token", 0, tower.width).iter().map(|x| 0.02 * x).collect();
    executor.write("ids", Data::I32(&with_token)).unwrap();
    executor.write("ids without", Data::I32(&tokens.ids)).unwrap();
    executor.write("token", Data::F64(&token)).unwrap();
    executor.write("timesteps", Data::F64(&TIMESTEPS)).unwrap();
    executor.write("z", Data::F64(&noise("z", 0, len))).unwrap();
    executor.write("noise", Data::F64(&noise("noise", 0, len))).unwrap();
    executor.run(id).unwrap();
    let (mut loss, mut gradient) = ([0.0f32], vec![0.0f32; tower.width]);
    executor.read("loss", DataMut::F32(&mut loss)).unwrap();
    executor.read("d_token", DataMut::F32(&mut gradient)).unwrap();
    (loss[0], gradient)
}

#[test]
fn the_minority_gradient_in_16_bits() {
    let pipeline = shapes();
    assert_eq!(pipeline.config.scheduler.prediction, Prediction::Epsilon);
    let (expected_loss, expected) = minority_gradient(&pipeline, Cpu::<f64>::new(), DType::F64);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    assert!(dot(&expected, &expected) > 0.0);
    for (dtype, least) in [(DType::F32, 0.999_999), (DType::F16, 0.999), (DType::BF16, 0.999)] {
        let (loss, found) = minority_gradient(&pipeline, cuda(emulated()), dtype);
        let cosine = dot(&found, &expected) / (dot(&found, &found) * dot(&expected, &expected)).sqrt();
        println!("{dtype}: loss {loss} of {expected_loss}, cosine {cosine:.6}");
        assert!(cosine >= least, "{dtype}: cosine {cosine}");
    }
}
