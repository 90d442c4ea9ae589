//! The range of 16 bits: a VAE whose activations pass 65504 is decoded, encoded and differentiated in f16 models as in exact ones, and
//! where it may not, the error names the op.

use crate::common::emulated::cuda;
use crate::common::golden::relative_error;
use crate::common::inputs::noise;
use crate::common::layouts::{copy_of, scale_tensors, weights_of};
use crate::common::low_precision::LowPrecision;
use crate::common::minority::{images, job};
use rarebit::exec::cpu::Cpu;
use rarebit::exec::cuda::{Cuda, Settings as Emulation};
use rarebit::exec::{Data, Executor, Lockstep};
use rarebit::optimize::chain::{Chain, Evaluation, Options, Storage, Term};
use rarebit::optimize::objective::{Objective, StepContext};
use rarebit::optimize::variable::Entry;
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::generate::{Generator, Image};
use rarebit::pipeline::networks::{Networks, Tensor};
use rarebit::program::*;
use rarebit::sampler::{Method, Settings};
use rarebit::weights::Model;
use rarebit::{Error, Result};

fn emulated() -> Cuda {
    cuda(Emulation::default().workers(2))
}

/// A pipeline whose decoder makes what is `factor` times as large between its first two layers, and the same image.
fn swollen(factor: f32) -> Pipeline {
    let model = copy_of("tiny-sdxl");
    let file = weights_of(&model, "vae");
    let factors = [("post_quant_conv.weight", factor), ("post_quant_conv.bias", factor)];
    scale_tensors(&file, &[&factors[..], &[("decoder.conv_in.weight", 1.0 / factor)]].concat());
    scale_tensors(&file, &[("encoder.conv_in.weight", factor), ("encoder.conv_in.bias", factor)]);
    // The mapping outlives the folder.
    Pipeline::open(Model::open(model.path()).unwrap(), None).unwrap()
}

/// A power of two, which rounds nothing, that takes latents beyond the range of f16, but no weight.
const FACTOR: f32 = 32768.0;

fn tensor(name: &str, shape: &[usize]) -> Tensor {
    let data = noise(name, 0, shape.iter().product()).into_iter().map(|x| x as f32).collect();
    Tensor { shape: shape.to_vec(), data }
}

/// The image of some latents, the gradient to them, and an image's latents.
fn network(pipeline: &Pipeline, mut executor: Box<dyn Executor>, dtype: DType) -> [Vec<f32>; 3] {
    let mut networks = Networks::new(pipeline, &mut *executor, dtype);
    let latents = tensor("latents", &[1, 4, 6, 4]);
    let image = networks.decode(&latents).unwrap();
    let gradient = networks.decode_gradient(&latents, &tensor("d_image", &image.shape)).unwrap();
    let (mean, _) = networks.encode(&tensor("image", &[1, 3, 12, 8])).unwrap();
    [image.data, gradient.data, mean.data]
}

fn finite(values: &[f32]) -> bool {
    values.iter().all(|x| x.is_finite())
}

#[test]
fn networks_keep_their_numbers() {
    let (plain, swollen) = (swollen(1.0), swollen(FACTOR));
    let expected = network(&swollen, Box::new(Cpu::<f64>::new()), DType::F64);
    let honest = network(&swollen, Box::<LowPrecision>::default(), DType::F16);
    let found = network(&swollen, Box::new(emulated()), DType::F16);
    let of_plain = network(&plain, Box::new(emulated()), DType::F16);
    assert!(found[..2] == of_plain[..2], "a factor of two changes no bit of the image or its gradient");
    for (what, ((found, honest), expected)) in
        ["image", "gradient", "latents"].into_iter().zip(found.iter().zip(&honest).zip(&expected))
    {
        let (error, storage) = (relative_error(found, expected), relative_error(honest, expected));
        println!("{what}: {error:.2e}, of storage {storage:.2e}");
        assert!(finite(found) && error <= 2.0 * storage, "{what}: {error:e}, of storage {storage:e}");
    }
    let mut narrow = swollen;
    narrow.config.vae.force_upcast = false;
    let lost = network(&narrow, Box::new(emulated()), DType::F16);
    assert!(lost.iter().all(|values| !finite(values)), "the model needs more than f16");
}

fn make(pipeline: &Pipeline, executor: &mut dyn Executor, dtype: DType) -> Result<Vec<Image>> {
    let generator = Generator::plan(pipeline, executor, images(pipeline, 2, 4.0, dtype), 2)?;
    generator.load(executor)?.run(&[job("a red star", 3), job("a red star", 4)], &mut |_| Ok(()))
}

#[test]
fn images_do_too_and_errors_name_the_op() {
    let (plain, mut swollen) = (swollen(1.0), swollen(FACTOR));
    let made = make(&swollen, &mut emulated(), DType::F16).unwrap();
    let of_plain = make(&plain, &mut emulated(), DType::F16).unwrap();
    assert!(made.iter().zip(&of_plain).all(|(a, b)| a.rgb == b.rgb && a.latents == b.latents));
    swollen.config.vae.force_upcast = false;
    let mut in_steps = Lockstep::new(emulated());
    in_steps.set_check_finite(true);
    for executor in [&mut emulated() as &mut dyn Executor, &mut in_steps] {
        let Err(Error::Numeric(what)) = make(&swollen, executor, DType::F16) else { panic!("an image") };
        for word in ["image of seed 3: program 'decode'", "conv2d", "post_quant_conv.weight", "65504", "--dtype bf16"] {
            assert!(what.contains(word), "'{word}' is not in: {what}");
        }
    }
    make(&swollen, &mut emulated(), DType::BF16).unwrap();
}

#[test]
fn plans_count_the_types() {
    let pipeline = swollen(1.0);
    let generator = Generator::plan(&pipeline, &emulated(), images(&pipeline, 2, 4.0, DType::F16), 1).unwrap();
    let types =
        |program: &Program| -> Vec<DType> { program.weights().map(|(id, _)| program.value(id).dtype).collect() };
    let programs = generator.programs();
    assert!(types(&programs.step.program).iter().all(|dtype| *dtype == DType::F16));
    assert!(types(&programs.decode.program).iter().all(|dtype| *dtype == DType::BF16));
}

/// The mean square of the decoded image, in units of its own.
fn objective() -> Term<'static> {
    Term::at_end(Objective::new("mean square", |s: &mut StepContext<'_>| {
        let image = s.decode(s.latents);
        let pixels = s.b.shape(image)[1..].iter().product::<usize>();
        let squares = s.squares(image);
        // Gradients beside each other in f16, not below its smallest numbers.
        s.b.affine(squares, 256.0 / pixels as f64, 0.0)
    }))
}

fn evaluate(pipeline: &Pipeline, executor: &mut dyn Executor, dtype: DType, at_once: bool) -> Evaluation<f32> {
    let side = pipeline.config.image_size;
    let sampler = Settings { method: Method::Ddim, spacing: None, steps: 2, eta: 0.0, guidance: 3.0, cfg_pp: false };
    let budget = at_once.then_some(usize::MAX);
    let options = Options { width: side, height: side, batch: 1, dtype, sampler, image_steps: None, budget };
    let chain = Chain::plan(pipeline, executor, &options, &[Entry::Latents], vec![objective()]).unwrap();
    assert_eq!(chain.storage() == Storage::Activations, at_once);
    let mut chain = chain.load::<f32>(executor).unwrap();
    let (config, numbers) = (&pipeline.config, |name: &str, len: usize| tensor(name, &[len]).data);
    let pooled = config.text.last().and_then(|tower| tower.projection).unwrap_or(0);
    let context = numbers("context", 2 * pipeline.tokens() * config.unet.context_width);
    chain.condition(Data::F32(&context), Data::F32(&numbers("pooled", 2 * pooled))).unwrap();
    let latents = side / config.vae.factor();
    chain.evaluate(&numbers("start", latents * latents * config.unet.in_channels), &[]).unwrap()
}

/// UNet and VAE in one program, and the VAE in a program of its own.
#[test]
fn gradients_of_runs_pass_through_the_decoder() {
    let (plain, swollen) = (swollen(1.0), swollen(FACTOR));
    let exact = evaluate(&swollen, &mut Cpu::<f64>::new(), DType::F64, false);
    for at_once in [false, true] {
        let honest = evaluate(&swollen, &mut LowPrecision::default(), DType::F16, at_once);
        let found = evaluate(&swollen, &mut emulated(), DType::F16, at_once);
        let [error, storage] = [&found, &honest].map(|of| relative_error(&of.gradients[0], &exact.gradients[0]));
        println!("gradient {error:.2e}, of storage {storage:.2e}; loss {:?}, exact {:?}", found.losses, exact.losses);
        assert!(finite(&found.gradients[0]) && error <= 2.0 * storage, "{error:e}, of storage {storage:e}");
        let of_plain = evaluate(&plain, &mut emulated(), DType::F16, at_once);
        assert!(found.losses == of_plain.losses && found.gradients == of_plain.gradients, "of the plain model");
        let checked = evaluate(&swollen, &mut Lockstep::new(emulated()), DType::F16, at_once);
        assert!(found.losses == checked.losses && found.gradients == checked.gradients, "op by op");
    }
}

/// What rounding to 8 bits more or less leaves of the embedded model's images: bf16 is less exact than f16, and exact enough.
#[test]
fn bf16_is_exact_enough_for_pixels() {
    let mut pipeline = Pipeline::open(rarebit::assets::shapes().unwrap(), None).unwrap();
    let mut settings = images(&pipeline, 20, 4.0, DType::F32);
    let mut cpu = Cpu::<f32>::new();
    settings.sampler.method = Method::Ddim;
    let generator = Generator::plan(&pipeline, &cpu, settings, 1).unwrap();
    let made = generator.load(&mut cpu).unwrap().run(&[job("a red star", 3)], &mut |_| Ok(())).unwrap();
    let latents = Tensor { shape: vec![1, 4, 16, 16], data: made[0].latents.clone() };
    let mut decode = |mut executor: Box<dyn Executor>, dtype, upcast| {
        pipeline.config.vae.force_upcast = upcast;
        let mut networks = Networks::new(&pipeline, &mut *executor, dtype);
        let image = networks.decode(&latents).unwrap();
        let gradient = networks.decode_gradient(&latents, &tensor("d_image", &image.shape)).unwrap();
        (image.data, gradient.data)
    };
    let exact = decode(Box::new(Cpu::<f64>::new()), DType::F64, false);
    let byte = |x: f32| f64::from((x / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round();
    for (what, dtype, upcast) in [("f16", DType::F16, false), ("bf16", DType::F16, true), ("f32", DType::F32, false)] {
        let (image, gradient) = decode(Box::<LowPrecision>::default(), dtype, upcast);
        let squares: f64 = image.iter().zip(&exact.0).map(|(a, b)| (byte(*a) - byte(*b)).powi(2)).sum();
        let psnr = 10.0 * (255.0f64.powi(2) / (squares / image.len() as f64).max(1e-9)).log10();
        let most = image.iter().zip(&exact.0).map(|(a, b)| (byte(*a) - byte(*b)).abs()).fold(0.0, f64::max);
        println!("{what}: {psnr:.1} dB, at most {most} of 255; gradient {:.2e}", relative_error(&gradient, &exact.1));
        assert!(psnr >= 50.0 && most <= 2.0, "{what}: {psnr:.1} dB, {most} of 255");
    }
}
