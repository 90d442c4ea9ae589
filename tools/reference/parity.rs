//! The engine's side of `parity.py`: computes in f32 every `out/…` whose inputs the dump holds (the protocol is at the top of that file).

use rarebit::exec::Executor;
use rarebit::exec::cpu::Cpu;
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::conditioning::Text;
use rarebit::pipeline::generate::{Generator, Job, Settings};
use rarebit::pipeline::networks::{AddedConditions, Networks, Tensor, UnetGradient};
use rarebit::program::DType;
use rarebit::sampler::{self, Rng};
use rarebit::weights::Model;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;
use std::error::Error;
use std::path::Path;

#[path = "parity_networks.rs"]
mod networks;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The tensors of a dump.
struct Dump<'a>(SafeTensors<'a>);

impl Dump<'_> {
    fn has(&self, name: &str) -> bool {
        self.0.tensor(name).is_ok()
    }

    fn floats(&self, name: &str) -> Result<Tensor> {
        let tensor = self.0.tensor(name)?;
        if tensor.dtype() != Dtype::F32 {
            return Err(format!("{name} is not F32").into());
        }
        let data = tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        Ok(Tensor { shape: tensor.shape().to_vec(), data })
    }

    fn ints(&self, name: &str) -> Result<Vec<i32>> {
        Ok(self.0.tensor(name)?.data().as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect())
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, dump, out] = &args[..] else { return Err("usage: parity MODEL_DIR DUMP OUT".into()) };
    let bytes = std::fs::read(dump)?;
    let (_, metadata) = SafeTensors::read_metadata(&bytes)?;
    let settings =
        metadata.metadata().as_ref().and_then(|m| m.get("parity")).ok_or("the dump has no 'parity' metadata")?;
    let settings: Value = serde_json::from_str(settings)?;
    let dump = Dump(SafeTensors::deserialize(&bytes)?);
    let results = rayon::ThreadPoolBuilder::new().build()?.install(|| {
        // Errors are not `Send`; their text is.
        compute(Path::new(model), &dump, &settings).map_err(|error| error.to_string())
    })?;

    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = results
        .into_iter()
        .map(|(name, t)| (name, t.shape, t.data.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let views = bytes.iter().map(|(name, shape, data)| Ok((name, TensorView::new(Dtype::F32, shape.clone(), data)?)));
    std::fs::write(out, safetensors::serialize(views.collect::<Result<Vec<_>>>()?, None)?)?;
    Ok(())
}

type Named = Vec<(String, Tensor)>;

fn compute(folder: &Path, dump: &Dump<'_>, settings: &Value) -> Result<Named> {
    match settings["phase"].as_str() {
        Some("clip_gradient") => networks::clip(folder, dump),
        Some("policy_gradient") => networks::policy(folder, dump),
        _ => {
            let pipeline = Pipeline::open(Model::open(folder)?, None)?;
            let results = of_pipeline(&pipeline, dump, settings)?;
            Ok(results.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect())
        }
    }
}

fn of_pipeline(pipeline: &Pipeline, dump: &Dump<'_>, settings: &Value) -> Result<Vec<(&'static str, Tensor)>> {
    let mut cpu = Cpu::<f32>::new();
    let mut networks = Networks::new(pipeline, &mut cpu, DType::F32);
    let mut results = Vec::new();
    if dump.has("in/ids") {
        results.extend(text(&mut networks, pipeline, dump)?);
    }
    if dump.has("in/timestep") {
        let (latents, timestep) = (dump.floats("in/latents")?, dump.floats("in/timestep")?.data[0]);
        let added = match dump.has("in/pooled") {
            true => Some(AddedConditions {
                pooled: dump.floats("in/pooled")?.data,
                size_ids: dump.floats("in/time_ids")?.data,
            }),
            false => None,
        };
        let Tensor { shape, data: context } = dump.floats("in/context")?;
        let (timestep, added) = (f64::from(timestep), added.as_ref());
        if dump.has("in/d_unet") {
            let cotangent = dump.floats("in/d_unet")?;
            let UnetGradient { latents: d_latents, context, pooled } =
                networks.unet_gradient(&latents, timestep, &context, added, &cotangent)?;
            results.extend([("out/d_latents", d_latents), ("out/d_context", Tensor { shape, data: context })]);
            let rows = latents.shape[0];
            results.extend(pooled.map(|data| ("out/d_pooled", Tensor { shape: vec![rows, data.len() / rows], data })));
        } else {
            results.push(("out/unet", networks.unet(&latents, timestep, &context, added)?));
        }
    }
    if dump.has("in/vae_latents") {
        let latents = dump.floats("in/vae_latents")?;
        results.push(match dump.has("in/d_image") {
            true => ("out/d_vae_latents", networks.decode_gradient(&latents, &dump.floats("in/d_image")?)?),
            false => ("out/image", networks.decode(&latents)?),
        });
    }
    if dump.has("in/image") {
        let (mean, logvar) = networks.encode(&dump.floats("in/image")?)?;
        results.extend([("out/mean", mean), ("out/logvar", logvar)]);
    }
    if dump.has("in/noise") {
        drop(cpu);
        results.push(("out/final", sample(pipeline, dump, settings)?));
    }
    Ok(results)
}

fn text(networks: &mut Networks<'_, '_>, pipeline: &Pipeline, dump: &Dump<'_>) -> Result<Vec<(&'static str, Tensor)>> {
    let tokens = pipeline.tokens();
    let first = dump.ints("in/ids")?;
    let second = if dump.has("in/ids_2") { Some(dump.ints("in/ids_2")?) } else { None };
    let (mut context, mut pooled) = (Vec::new(), Vec::new());
    let rows = first.len() / tokens;
    for row in 0..rows {
        let cut = |ids: &[i32]| ids[row * tokens..(row + 1) * tokens].to_vec();
        let ids: Vec<Vec<i32>> = [Some(&first), second.as_ref()].into_iter().flatten().map(|ids| cut(ids)).collect();
        // The end-of-text id is CLIP's largest.
        let last = ids.last().ok_or("no ids")?;
        let eos = last.iter().position(|id| Some(id) == last.iter().max()).ok_or("no ids")?;
        let views: Vec<&[i32]> = ids.iter().map(|ids| &ids[..]).collect();
        let (states, projection) = networks.text(&views, eos)?;
        context.extend(states);
        pooled.extend(projection.unwrap_or_default());
    }
    let width = context.len() / (rows * tokens);
    let mut results = vec![("out/context", Tensor { shape: vec![rows, tokens, width], data: context })];
    if !pooled.is_empty() {
        results.push(("out/pooled", Tensor { shape: vec![rows, pooled.len() / rows], data: pooled }));
    }
    Ok(results)
}

fn sample(pipeline: &Pipeline, dump: &Dump<'_>, settings: &Value) -> Result<Tensor> {
    let word = |field: &str| settings[field].as_str().ok_or(format!("no '{field}' in the settings"));
    let number = |field: &str| settings[field].as_f64().ok_or(format!("no '{field}' in the settings"));
    let noise = dump.floats("in/noise")?;
    let factor = pipeline.config.vae.factor();
    let settings = Settings {
        width: factor * noise.shape[3],
        height: factor * noise.shape[2],
        sampler: sampler::Settings {
            method: word("sampler")?.parse()?,
            spacing: Some(word("spacing")?.parse()?),
            steps: number("steps")? as usize,
            eta: 0.0,
            guidance: number("guidance")?,
            cfg_pp: false,
        },
        rng: Rng::Philox,
        dtype: DType::F32,
    };
    let mut executor: Box<dyn Executor> = Box::new(Cpu::<f32>::new());
    let mut generator = Generator::plan(pipeline, &*executor, settings, 1)?.load(&mut *executor)?;
    for prompt in ["positive", "negative"] {
        let pooled = format!("in/{prompt}_pooled");
        let pooled = if dump.has(&pooled) { dump.floats(&pooled)?.data } else { vec![] };
        generator.set_text(prompt, Text { context: dump.floats(&format!("in/{prompt}"))?.data, pooled });
    }
    let job = Job { prompt: "positive".into(), negative: Some("negative".into()), seed: 0, draws: vec![noise.data] };
    let images = generator.run(&[job], &mut |_| Ok(()))?;
    Ok(Tensor { shape: noise.shape, data: images[0].latents.clone() })
}
