//! Whole models on the emulated driver: the tiny pipelines' networks and their gradients against the CPU, and the embedded model
//! end to end: its image, the gradient of the minority objective to a token, the same bits alone and in a batch.

use crate::common::emulated::cuda;
use crate::common::golden::{Golden, copied, relative_error};
use crate::common::inputs::noise;
use crate::common::low_precision::LowPrecision;
use crate::common::minority::settings;
use crate::common::optimised::{Distance, Optimised, optimise};
use crate::common::seedselect::Run;
use crate::common::tolerance::TYPES;
use rarebit::Result;
use rarebit::exec::cpu::Cpu;
use rarebit::exec::cuda::Settings as Emulation;
use rarebit::exec::{Data, DataMut, Executor, ProgramId};
use rarebit::methods::minority::Minority;
use rarebit::methods::seedselect::{Convention, LearningRate, Options, References, SeedSelect};
use rarebit::methods::{ImageMethod, Request};
use rarebit::optimize::chain;
use rarebit::optimize::objective::loss_scale;
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::Progress;
use rarebit::pipeline::generate::{Generator, Image, Job, Settings};
use rarebit::pipeline::networks::{AddedConditions, Networks, Tensor};
use rarebit::pipeline::programs::gradient_of;
use rarebit::plan::Planned;
use rarebit::program::*;
use rarebit::sampler::{self, Method, Rng};
use rarebit::weights::Model;
use std::cell::RefCell;
use std::sync::Arc;

/// A network in 16 bits may be this many times as far off as exact arithmetic with the same storage, and in f32 this far.
const MARGIN: f64 = 2.0;
const SINGLE: f64 = 2e-5;
/// The same after two iterations of SeedSelect.
const SELECTED: f64 = 1e-4;

fn emulated() -> Emulation {
    Emulation::default().workers(2)
}

fn tensor(name: &str, shape: &[usize]) -> Tensor {
    let data = noise(name, 0, shape.iter().product()).into_iter().map(|x| x as f32).collect();
    Tensor { shape: shape.to_vec(), data }
}

/// Every network of a pipeline and the gradients of UNet and decoder: names and values.
fn networks(pipeline: &Pipeline, mut executor: Box<dyn Executor>, dtype: DType) -> Vec<(&'static str, Vec<f32>)> {
    let config = &pipeline.config;
    let mut networks = Networks::new(pipeline, &mut *executor, dtype);
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
            let honest = networks(&pipeline, Box::<LowPrecision>::default(), dtype);
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

fn optimised(pipeline: &Pipeline, executor: &mut dyn Executor, dtype: DType, jobs: &[Job]) -> Optimised {
    optimise(pipeline, executor, dtype, jobs).unwrap()
}

#[test]
fn a_minority_prompt_agrees_with_the_cpu() {
    let pipeline = shapes();
    let jobs = [job(1)];
    let exact = optimised(&pipeline, &mut Cpu::<f64>::new(), DType::F64, &jobs);
    for dtype in TYPES {
        let found = optimised(&pipeline, &mut cuda(emulated()), dtype, &jobs).distance(&exact);
        let storage = (dtype != DType::F32)
            .then(|| optimised(&pipeline, &mut LowPrecision::default(), dtype, &jobs).distance(&exact));
        println!("{dtype}, of storage: {storage:?}, cosine {:.7}", found.gradient.cos());
        for ((what, error), (_, allowed)) in found.parts().into_iter().zip(Distance::allowed(dtype, storage).parts()) {
            println!("{dtype} {what}: {error:.2e} of {allowed:.2e}");
            assert!(error <= allowed, "{dtype} {what}: {error:e} of {allowed:e}");
        }
    }
}

#[test]
fn an_optimised_image_has_the_same_bits_in_a_batch() {
    let pipeline = shapes();
    let make = |jobs: &[Job]| optimised(&pipeline, &mut cuda(emulated()), DType::BF16, jobs);
    // Of different lengths.
    let jobs = [job(3), job(4)];
    let together = make(&jobs);
    for (index, one) in jobs.iter().enumerate() {
        let (alone, seed) = (make(std::slice::from_ref(one)), one.seed);
        let width = alone.learned[0].len();
        let own = index * width..(index + 1) * width;
        assert!(together.gradient[0][own.clone()] == alone.gradient[0], "seed {seed}");
        assert!(together.learned[0][own] == alone.learned[0], "seed {seed}");
        assert!(together.images[index].latents == alone.images[0].latents, "seed {seed}");
    }
    assert!(together.images[0].latents != together.images[1].latents);
}

/// What two iterations of SeedSelect lead to: the losses, the gradient of the second, the noise, the latents. Those of a run of which f64
/// says that no number of its first gradient is near 0: Adam's first step is a sign.
fn selected(executor: &mut dyn Executor, dtype: DType) -> [(&'static str, Vec<f32>); 4] {
    let golden = Golden::open("seedselect");
    let run = Run::short(&golden).into_iter().find(|run| run.name() == "tiny-sd1/default").unwrap();
    let pipeline = run.pipeline();
    let lr = LearningRate { first: run.lr(0), from: 3, later: run.lr(3) };
    let options = Options { convention: Convention::Default, iterations: 2, lr, ..Options::RELEASED };
    let references = References::read(&run.references()).unwrap();
    let method = SeedSelect { trace: true, ..SeedSelect::new(options, Arc::new(references), 0) };
    let [height, width] = run.size().map(|side| side * pipeline.config.vae.factor());
    let settings = Settings { width, height, sampler: run.sampler(), rng: Rng::Philox, dtype };
    let prompt = run.case.text("prompt");
    let request = Request { settings: &settings, batch: 1, prompts: &[&prompt], memory: None };
    let mut loaded = method.plan(&pipeline, executor, &request).unwrap().load(executor).unwrap();
    let job = Job { prompt: prompt.clone(), negative: run.negative(), seed: run.count("seed") as u64, draws: vec![] };
    let mut losses = vec![];
    let mut images = loaded
        .run(&[job], &mut |progress| {
            if let Progress::Iteration(Some(iteration)) = progress {
                losses.push(iteration.score[0] as f32);
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(losses.len(), 2);
    let noise = loaded.noise(0).unwrap();
    let mut gradient = vec![0.0; noise.len()];
    loaded.executor().read(&gradient_of(chain::NOISE), DataMut::F32(&mut gradient)).unwrap();
    gradient.iter_mut().for_each(|x| *x /= loss_scale(dtype) as f32);
    [("losses", losses), ("gradient", gradient), ("noise", noise), ("latents", images.remove(0).latents)]
}

#[test]
fn a_selected_seed_agrees_with_the_cpu() {
    let expected = selected(&mut Cpu::<f64>::new(), DType::F64);
    for dtype in [DType::F32, DType::F16] {
        let found = selected(&mut cuda(emulated()), dtype);
        let honest = (dtype != DType::F32).then(|| selected(&mut LowPrecision::default(), dtype));
        for (index, ((what, found), (_, expected))) in found.iter().zip(&expected).enumerate() {
            let error = relative_error(found, expected);
            let storage = honest.as_ref().map(|honest| relative_error(&honest[index].1, expected));
            println!("{dtype:5} {what:10} {error:.2e}, of storage {storage:?}");
            let limit = storage.map_or(SELECTED, |storage| MARGIN * storage);
            assert!(error <= limit, "{dtype} {what}: {error:e} of {limit:e}");
        }
    }
}

/// Notes what the host sends to a device and fetches from it.
struct Noting<'a> {
    device: Cpu<f32>,
    /// Name and bytes since the last reset; what is fetched with a `<`.
    notes: &'a RefCell<Vec<(String, usize)>>,
}

impl Executor for Noting<'_> {
    fn workspace(&self, program: &Program, node: &Node) -> usize {
        self.device.workspace(program, node)
    }
    fn load(&mut self, planned: Planned, weights: &Model) -> Result<ProgramId> {
        self.device.load(planned, weights)
    }
    fn clear(&mut self) {
        self.device.clear();
    }
    fn write(&mut self, buffer: &str, data: Data<'_>) -> Result<()> {
        let len = match data {
            Data::F32(values) => values.len(),
            Data::F64(values) => values.len(),
            Data::I32(values) => values.len(),
        };
        self.notes.borrow_mut().push((buffer.to_string(), 4 * len));
        self.device.write(buffer, data)
    }
    fn copy(&mut self, from: (&str, usize), to: (&str, usize), len: usize) -> Result<()> {
        self.notes.borrow_mut().push(("copy".into(), 4 * len));
        self.device.copy(from, to, len)
    }
    fn run(&mut self, program: ProgramId) -> Result<()> {
        self.notes.borrow_mut().push(("run".into(), 0));
        self.device.run(program)
    }
    fn read(&self, buffer: &str, out: DataMut<'_>) -> Result<()> {
        let len = match &out {
            DataMut::F32(values) => values.len(),
            DataMut::F64(values) => values.len(),
        };
        self.notes.borrow_mut().push((format!("< {buffer}"), 4 * len));
        self.device.read(buffer, out)
    }
}

#[test]
fn an_iteration_sends_a_few_numbers_to_the_device() {
    let pipeline = Golden::open("tiny-sdxl").pipeline();
    let notes = RefCell::new(vec![]);
    let mut device = Noting { device: Cpu::new(), notes: &notes };
    let mut settings = settings(&pipeline, DType::F32);
    (settings.trace, settings.schedule.iterations) = (false, 3);
    let jobs = [job(0), job(1)];
    let prompts: Vec<&str> = jobs.iter().map(|job| job.prompt.as_str()).collect();
    let planned = Minority::plan(&pipeline, &device, settings, &prompts).unwrap();
    let mut loaded = planned.load(&mut device).unwrap();
    let mut iterations = vec![];
    let observe = &mut |progress: Progress<'_>| {
        let since = notes.take();
        if let Progress::Iteration(_) = progress {
            iterations.push(since);
        }
        Ok(())
    };
    loaded.run(&jobs, &[1, 2], observe).unwrap();
    assert_eq!(iterations.len(), 3);
    // The first sends what holds for the step as well.
    for sent in &iterations[1..] {
        let named: Vec<(&str, usize)> = sent.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
        assert_eq!(named, [("objective.counter", 32), ("run", 0), ("optimizer.scalars", 28), ("run", 0)]);
    }
}

/// What is staged of a file that was cut off is not taken for its weights.
#[test]
fn a_file_that_is_cut_off_while_its_weights_load_is_an_error() {
    let folder = copied("tiny-sd1");
    let pipeline = Pipeline::open(Model::open(folder.path()).unwrap(), None).unwrap();
    let unet = folder.path().join("unet/diffusion_pytorch_model.safetensors");
    std::fs::OpenOptions::new().write(true).open(unet).unwrap().set_len(20_000).unwrap();
    let mut executor = cuda(emulated());
    let mut networks = Networks::new(&pipeline, &mut executor, DType::F32);
    let error = networks.load_unet([1, 4, 8, 8], pipeline.config.unet.context_width, false).unwrap_err().to_string();
    assert!(error.ends_with("was cut off while it was read; start again once it is whole"), "{error}");
}
