//! Networks and images on the device, in 16 bits by the kernels for any GPU and by those for Hopper.
//!
//! The tiny networks against what diffusers and torch computed with them. In f32 the relative error may be 1e-4, as for the CPU. In f16
//! and bf16 it may be twice that of exact arithmetic in which every op rounds its outputs to the same storage, and those 1e-4: the
//! rule of single ops (`tests/common/storage.rs`), carried through a network. What is allowed so comes from the network itself.
//!
//! MinorityPrompt on all of them against the CPU in f64, by the rule of `tests/common/optimised.rs`.
//!
//! The embedded model's image against the CPU's in f32: at least 40 dB.

use crate::common::golden::{Golden, relative_error};
use crate::common::low_precision::LowPrecision;
use crate::common::optimised::{Distance, optimise};
use crate::common::tolerance::{TYPES, whereabouts};
use crate::device::Device;
use crate::launches::suffix;
use crate::section::{Item, Row, Run};
use rarebit::exec::Executor;
use rarebit::exec::cpu::Cpu;
use rarebit::exec::cuda::Hopper;
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::generate::{Generator, Job, Settings};
use rarebit::pipeline::networks::{AddedConditions, Networks, Tensor};
use rarebit::program::DType;
use rarebit::sampler::{self, Rng};
use rarebit::{Error, Result};
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MODELS: [&str; 3] = ["tiny-sd1", "tiny-sd2", "tiny-sdxl"];
const EMBEDDED: &str = "shapes";
/// Of f32, and what f32 sums may add in 16-bit networks.
const LIMIT: f64 = 1e-4;
/// A 16-bit network may be this many times as far off as exact arithmetic with the same storage.
const MARGIN: f64 = 2.0;

/// What one network gave, and what it should: a name and two tensors each.
type Results = Vec<(String, Vec<f32>, Vec<f32>)>;
type Part = fn(&Golden, &Pipeline, &mut Networks) -> Result<Results>;

const PARTS: [(&str, Part); 5] =
    [("text", text), ("unet", unet), ("vae", vae), ("unet gradient", unet_gradient), ("vae gradient", vae_gradient)];

/// Every part of every model in every type, and of a subset each part once, types and models taking turns; and MinorityPrompt.
pub fn networks(data: &Path, subset: bool) -> Vec<Item> {
    let mut items = vec![];
    for (m, model) in MODELS.into_iter().enumerate() {
        for (p, (name, part)) in PARTS.into_iter().enumerate() {
            for (t, dtype) in [DType::F32, DType::F16, DType::BF16].into_iter().enumerate() {
                if subset && (m != p % 3 || t != (p + 1) % 3) {
                    continue;
                }
                let (folder, title) = (data.join(model), format!("{model} {name}"));
                let prepare = {
                    let title = title.clone();
                    move || network(folder.clone(), model, part, &title, dtype)
                };
                items.push(Item::new(title, dtype, prepare));
            }
        }
    }
    items.extend(prompts(data, subset));
    items
}

/// MinorityPrompt, which reaches from the token through text encoder and network, on every model; of a subset on one.
fn prompts(data: &Path, subset: bool) -> Vec<Item> {
    let mut items = vec![];
    for model in MODELS.into_iter().chain([EMBEDDED]) {
        for dtype in TYPES {
            if subset && (model, dtype) != (MODELS[1], DType::F32) {
                continue;
            }
            let folder = data.join(model);
            items.push(Item::new(format!("{model} optimised"), dtype, move || prompt(folder.clone(), model, dtype)));
        }
    }
    items
}

/// With the kernels for any GPU, and in 16 bits also with those for Hopper, by `hopper`.
fn variants(dtype: DType, hopper: Hopper) -> Vec<Hopper> {
    if dtype == DType::F32 { vec![Hopper::Off] } else { vec![Hopper::Off, hopper] }
}

/// A run of each of them.
fn runs(
    name: &str,
    variants: Vec<Hopper>,
    on_device: impl Fn(&Device, Hopper, &str) -> Result<Vec<Row>> + Clone + Send + 'static,
) -> Vec<Run> {
    let run = |hopper| {
        let (name, on_device) = (format!("{name}{}", suffix(hopper)), on_device.clone());
        Run::new(name.clone(), move |device| on_device(device, hopper, &name)).for_hopper(hopper != Hopper::Off)
    };
    variants.into_iter().map(run).collect()
}

fn prompt(folder: PathBuf, model: &'static str, dtype: DType) -> Result<Vec<Run>> {
    let optimised = move |executor: &mut dyn Executor, dtype| {
        let pipeline = match model {
            EMBEDDED => Pipeline::open(rarebit::assets::shapes()?, None)?,
            _ => Golden::at(folder.clone()).pipeline(),
        };
        let job = Job { prompt: PROMPT.into(), negative: None, seed: 1, draws: vec![] };
        optimise(&pipeline, executor, dtype, &[job])
    };
    let exact = Arc::new(optimised(&mut Cpu::<f64>::new(), DType::F64)?);
    let honest = if dtype == DType::F32 { None } else { Some(optimised(&mut LowPrecision::default(), dtype)?) };
    let storage = honest.map(|honest| honest.distance(&exact));
    let allowed = Distance::allowed(dtype, storage).parts();
    Ok(runs(&format!("{model} optimised"), variants(dtype, Hopper::Always), move |device, hopper, name| {
        let found = optimised(&mut device.cuda(false, hopper), dtype)?.distance(&exact);
        let rows = found.parts().into_iter().zip(&allowed);
        Ok(rows.map(|((what, error), (_, allowed))| Row::new(name, dtype, error, *allowed, what)).collect())
    }))
}

fn network(folder: PathBuf, model: &'static str, part: Part, title: &str, dtype: DType) -> Result<Vec<Run>> {
    let results = move |mut executor: Box<dyn Executor>| -> Result<Results> {
        let golden = Golden::at(folder.clone());
        let pipeline = golden.pipeline();
        part(&golden, &pipeline, &mut Networks::new(&pipeline, &mut *executor, dtype))
    };
    // In f32 nothing is rounded that f32 arithmetic would not round too.
    let honest = if dtype == DType::F32 { vec![] } else { results(Box::<LowPrecision>::default())? };
    let storage: Vec<f64> = honest.iter().map(|(_, got, expected)| relative_error(got, expected)).collect();
    // Seen are 0.008 of f16 and 0.06 of bf16: a reference that is further off allows no more.
    let plausible = if dtype == DType::BF16 { 0.1 } else { 0.0125 };
    Ok(runs(title, variants(dtype, Hopper::Always), move |device, hopper, _| {
        let rows = results(Box::new(device.cuda(true, hopper)))?.into_iter().enumerate();
        let row = |(i, (name, got, expected)): (usize, (String, Vec<f32>, Vec<f32>))| {
            let (error, storage) = (relative_error(&got, &expected), storage.get(i).copied().unwrap_or_default());
            let allowed = MARGIN * storage.min(plausible) + LIMIT;
            let mut what = format!("relative error, of storage {storage:.3e}");
            if error.is_nan() || error > allowed {
                let [got, expected] = [&got, &expected].map(|values| values.iter().map(|x| f64::from(*x)).collect());
                what += &format!("; {}", farthest(got, expected));
            }
            Row::new(format!("{model} {name}{}", suffix(hopper)), dtype, error, allowed, what)
        };
        Ok(rows.map(row).collect())
    }))
}

/// The largest difference, in words.
fn farthest(got: Vec<f64>, expected: Vec<f64>) -> String {
    let largest = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    whereabouts(&got, &expected, largest)
}

fn wanted(golden: &Golden, name: &str) -> Result<Tensor> {
    golden.tensor(name).ok_or_else(|| Error::Model(format!("the golden file has no '{name}'")))
}

fn text(golden: &Golden, pipeline: &Pipeline, networks: &mut Networks) -> Result<Results> {
    let mut results = vec![];
    for case in golden.cases("ids/") {
        let context = case.name.replace("ids/", "context/");
        let Some(expected) = golden.tensor(&context) else { continue };
        let encoded = pipeline.tokenize(&case.text("text"))?;
        let ids: Vec<&[i32]> = encoded.iter().map(|tokens| &tokens.ids[..]).collect();
        let (got, pooled) = networks.text(&ids, encoded.last().map_or(0, |tokens| tokens.eos))?;
        results.push((context, got, expected.data));
        if let Some(pooled) = pooled {
            let name = case.name.replace("ids/", "pooled/");
            let expected = wanted(golden, &name)?.data;
            results.push((name, pooled, expected));
        }
    }
    Ok(results)
}

/// The added conditions of the first rows, where the model has them.
fn added(golden: &Golden, rows: usize) -> Option<AddedConditions> {
    let rows_of = |name: &str| golden.tensor(name).map(|t| t.data[..t.data.len() / t.shape[0] * rows].to_vec());
    Some(AddedConditions { pooled: rows_of("unet/pooled")?, size_ids: rows_of("unet/time_ids")? })
}

fn unet(golden: &Golden, _: &Pipeline, networks: &mut Networks) -> Result<Results> {
    let mut results = vec![];
    let context = wanted(golden, "unet/context")?;
    for (folder, timestep) in [("unet", 999), ("unet_wide", 500)] {
        let latents = wanted(golden, &format!("{folder}/latents"))?;
        let rows = latents.shape[0];
        let context = &context.data[..context.data.len() / context.shape[0] * rows];
        let got = networks.unet(&latents, f64::from(timestep), context, added(golden, rows).as_ref())?;
        let name = format!("{folder}/out_t{timestep}");
        let expected = wanted(golden, &name)?.data;
        results.push((name, got.data, expected));
    }
    Ok(results)
}

fn vae(golden: &Golden, _: &Pipeline, networks: &mut Networks) -> Result<Results> {
    let mut results = vec![];
    for size in ["vae", "vae_wide"] {
        let image = networks.decode(&wanted(golden, &format!("{size}/latents"))?)?;
        let (mean, logvar) = networks.encode(&wanted(golden, &format!("{size}/input"))?)?;
        for (field, got) in [("image", image), ("mean", mean), ("logvar", logvar)] {
            let name = format!("{size}/{field}");
            let expected = wanted(golden, &name)?.data;
            results.push((name, got.data, expected));
        }
    }
    Ok(results)
}

/// A tensor of gradients.safetensors beside the golden file.
fn stored(golden: &Golden, name: &str) -> Result<Tensor> {
    let path = golden.folder().join("gradients.safetensors");
    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let wrong = |error: safetensors::SafeTensorError| Error::file(&path, format!("'{name}': {error}"));
    let file = SafeTensors::deserialize(&bytes).map_err(wrong)?;
    let tensor = file.tensor(name).map_err(wrong)?;
    let data = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    Ok(Tensor { shape: tensor.shape().to_vec(), data })
}

fn unet_gradient(golden: &Golden, _: &Pipeline, networks: &mut Networks) -> Result<Results> {
    let (latents, context) = (wanted(golden, "unet/latents")?, wanted(golden, "unet/context")?);
    let added = added(golden, latents.shape[0]);
    let cotangent = stored(golden, "unet/cotangent")?;
    let found = networks.unet_gradient(&latents, 420.5, &context.data, added.as_ref(), &cotangent)?;
    let parts = [("latents", Some(found.latents.data)), ("context", Some(found.context)), ("pooled", found.pooled)];
    let mut results = vec![];
    for (name, got) in parts.into_iter().filter_map(|(name, got)| Some((format!("unet/d_{name}"), got?))) {
        let expected = stored(golden, &name)?.data;
        results.push((name, got, expected));
    }
    Ok(results)
}

fn vae_gradient(golden: &Golden, _: &Pipeline, networks: &mut Networks) -> Result<Results> {
    let found = networks.decode_gradient(&wanted(golden, "vae/latents")?, &stored(golden, "vae/cotangent")?)?;
    Ok(vec![("vae/d_latents".into(), found.data, stored(golden, "vae/d_latents")?.data)])
}

const PROMPT: &str = "a red star on a dark blue background";
/// Decibels. Storage alone leaves 61 in f16 and 50 in bf16.
const PSNR: f64 = 40.0;

/// The embedded model's image by graphs, of a batch of two the first again, and launch by launch.
pub fn images(subset: bool) -> Vec<Item> {
    let steps = if subset { 2 } else { 20 };
    let types = if subset { &[DType::F16][..] } else { &[DType::F32, DType::F16, DType::BF16] };
    let items = types.iter().map(|&dtype| {
        let title = format!("image of {steps} steps");
        Item::new(title.clone(), dtype, move || {
            let expected = Arc::new(image(&mut Cpu::<f32>::new(), DType::F32, steps, 1)?);
            // As an image is made there: on Hopper its kernels where they are expected to be faster.
            let on_device = move |device: &Device, hopper, name: &str| {
                // Of a subset the bits once: images take long on the emulation.
                let bits = !subset || hopper == Hopper::Off;
                images_on(device, hopper, name, dtype, steps, &expected, bits)
            };
            Ok(runs(&title, variants(dtype, Hopper::Auto), on_device))
        })
    });
    items.collect()
}

/// An image against the CPU's; with `bits` also made again, in a batch and launch by launch.
fn images_on(
    device: &Device,
    hopper: Hopper,
    name: &str,
    dtype: DType,
    steps: usize,
    expected: &[u8],
    bits: bool,
) -> Result<Vec<Row>> {
    // Whole networks many times over: without guards.
    let cuda = || device.cuda(false, hopper);
    let found = image(&mut cuda(), dtype, steps, 1)?;
    let squares: f64 = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    let error = (squares / expected.len() as f64).sqrt();
    let what = format!("rms of bytes; PSNR {:.1} dB", 20.0 * (255.0 / error).log10());
    let allowed = 255.0 / 10f64.powf(PSNR / 20.0);
    let mut rows = vec![Row::new(format!("{name}, against the CPU in f32"), dtype, error, allowed, what)];
    for (batch, graphs, how) in [(2, true, "in a batch of two"), (1, false, "launch by launch")] {
        if bits {
            let again = image(&mut cuda().with_graphs(graphs), dtype, steps, batch)?;
            let differ = again.iter().zip(&found).filter(|(a, b)| a != b).count() as f64;
            rows.push(Row::new(format!("{name}, {how}"), dtype, differ, 0.0, "bytes that differ"));
        }
    }
    Ok(rows)
}

/// The pixels of the first of some images.
fn image(executor: &mut dyn Executor, dtype: DType, steps: usize, batch: usize) -> Result<Vec<u8>> {
    let pipeline = Pipeline::open(rarebit::assets::shapes()?, None)?;
    let sampler = sampler::Settings {
        method: sampler::Method::Ddim,
        spacing: None,
        steps,
        eta: 0.0,
        guidance: 7.5,
        cfg_pp: false,
    };
    let settings = Settings { width: 64, height: 64, sampler, rng: Rng::Philox, dtype };
    let generator = Generator::plan(&pipeline, &*executor, settings, batch)?;
    let jobs: Vec<Job> =
        (0..batch as u64).map(|seed| Job { prompt: PROMPT.into(), negative: None, seed, draws: vec![] }).collect();
    let images = generator.load(executor)?.run(&jobs, &mut |_| Ok(()))?;
    Ok(images.into_iter().next().map(|image| image.rgb).unwrap_or_default())
}
