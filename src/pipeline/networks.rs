//! Single networks as host calls: text towers, one UNet prediction, VAE decode and encode, and gradients, on tensors in PyTorch's
//! layouts.
//!
//! For comparisons, tools and library users who bring their own loop; the methods run longer programs. The executor is borrowed and
//! may hold other programs, a loaded chain say: buffers here are named by their shape and clash with none.

use crate::autodiff::{Cotangent, Request, differentiate};
use crate::exec::{Data, DataMut, Executor, ProgramId};
use crate::models::unet::{Added, Unet};
use crate::models::vae;
use crate::pipeline::Pipeline;
use crate::pipeline::generate::{to_channels_first, to_channels_last};
use crate::pipeline::programs::{self, buffer, gradient_of};
use crate::plan::{Footprint, plan};
use crate::program::{Builder, DType, Program};
use crate::sampler::LATENTS;
use crate::{Error, Result};
use std::collections::HashMap;

/// A host tensor; images and latents are `[B, C, H, W]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

impl Tensor {
    fn image_shape(&self) -> Result<[usize; 4]> {
        let shape: Result<[usize; 4], _> = self.shape.clone().try_into();
        match shape {
            Ok(shape) if shape.iter().product::<usize>() == self.data.len() => Ok(shape),
            Ok(_) | Err(_) => Err(Error::Usage(format!("a tensor of shape {:?} is no [B, C, H, W]", self.shape))),
        }
    }

    fn channels_last(&self) -> Result<Vec<f32>> {
        let [_, c, h, w] = self.image_shape()?;
        Ok(self.data.chunks(c * h * w).flat_map(|image| to_channels_last(image, c)).collect())
    }

    fn from_channels_last(data: &[f32], [b, h, w, c]: [usize; 4]) -> Tensor {
        let data = data.chunks(h * w * c).flat_map(|image| to_channels_first(image, c)).collect();
        Tensor { shape: vec![b, c, h, w], data }
    }
}

/// SDXL's added conditions: pooled text `[B, P]` and size numbers `[B, 6]`.
#[derive(Clone, Debug)]
pub struct AddedConditions {
    pub pooled: Vec<f32>,
    pub size_ids: Vec<f32>,
}

/// Gradients to what the UNet reads, each laid out like it.
#[derive(Clone, Debug)]
pub struct UnetGradient {
    pub latents: Tensor,
    pub context: Vec<f32>,
    pub pooled: Option<Vec<f32>>,
}

/// The networks of one pipeline on an executor. Each is loaded at its first call of a shape.
pub struct Networks<'p, 'e> {
    pipeline: &'p Pipeline,
    executor: &'e mut dyn Executor,
    dtype: DType,
    loaded: HashMap<String, (ProgramId, Footprint)>,
    /// Key of the program of the last call.
    last: Option<String>,
}

const PREDICTION: &str = "prediction";
const PIXELS: &str = "pixels";
const MOMENTS: &str = "moments";

/// The buffer of a network's input or output `what` where images or latents are `[B, C, H, W]`.
fn named(what: &str, shape: [usize; 4]) -> String {
    let [b, c, h, w] = shape;
    format!("networks.{what}.{b}x{c}x{h}x{w}")
}

/// The buffer of text states of `len` numbers beside latents of this shape.
fn context(len: usize, shape: [usize; 4]) -> String {
    named(&format!("{}.{len}", buffer::CONTEXT), shape)
}

/// A program and the gradient of its one output, times a cotangent of that name, to inputs `to`.
fn vector_jacobian(program: &Program, to: &[String]) -> Result<Program> {
    let objectives = program.outputs.iter().map(|(name, id)| (*id, Cotangent::Input(gradient_of(name)))).collect();
    let leaves = to.iter().filter_map(|name| Some((program.input(name)?, gradient_of(name)))).collect();
    differentiate(program, &Request { objectives, leaves }, None)
}

impl<'p, 'e> Networks<'p, 'e> {
    /// `dtype` must be one the executor runs.
    pub fn new(pipeline: &'p Pipeline, executor: &'e mut dyn Executor, dtype: DType) -> Networks<'p, 'e> {
        Networks { pipeline, executor, dtype, loaded: HashMap::new(), last: None }
    }

    /// Loads the program called `key` unless it is loaded already.
    fn load(&mut self, key: String, program: impl FnOnce(&Self) -> Result<Program>) -> Result<ProgramId> {
        self.last = Some(key.clone());
        if let Some((id, _)) = self.loaded.get(&key) {
            return Ok(*id);
        }
        let planned = plan(program(self)?, |program, node| self.executor.workspace(program, node));
        let footprint = Footprint::of(&[&planned]);
        let id = self.executor.load(planned, &self.pipeline.model)?;
        self.loaded.insert(key, (id, footprint));
        Ok(id)
    }

    /// Forgets all programs and buffers of the executor, those of others too; weights stay.
    pub fn clear(&mut self) {
        self.executor.clear();
        self.loaded.clear();
        self.last = None;
    }

    /// The program of the last call, whose buffers still hold what it read, and the memory it was planned to take.
    pub fn loaded(&self) -> Option<&(ProgramId, Footprint)> {
        self.loaded.get(self.last.as_ref()?)
    }

    pub fn executor(&mut self) -> &mut dyn Executor {
        &mut *self.executor
    }

    fn read(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let mut data = vec![0.0; len];
        self.executor.read(name, DataMut::F32(&mut data))?;
        Ok(data)
    }

    /// One prompt's states: context `[T, D]`, and with two towers the pooled projection `[P]`. `ids` per tower, `eos` in the last.
    pub fn text(&mut self, ids: &[&[i32]], eos: usize) -> Result<(Vec<f32>, Option<Vec<f32>>)> {
        let config = &self.pipeline.config;
        let text = self.load("text".into(), |networks| programs::text(networks.pipeline, networks.dtype))?;
        for (name, ids) in buffer::IDS.iter().zip(ids) {
            self.executor.write(name, Data::I32(ids))?;
        }
        let projection = if config.text.len() > 1 {
            self.executor.write(buffer::EOS, Data::I32(&[eos as i32]))?;
            config.text[1].projection
        } else {
            None
        };
        self.executor.run(text)?;
        let context = self.read(buffer::TEXT_CONTEXT, self.pipeline.tokens() * config.unet.context_width)?;
        let pooled = projection.map(|width| self.read(buffer::TEXT_POOLED, width)).transpose()?;
        Ok((context, pooled))
    }

    /// The UNet's raw output for `latents [B, C, h, w]` at one timestep, `context [B, T, D]`.
    pub fn unet(
        &mut self,
        latents: &Tensor,
        timestep: f64,
        context: &[f32],
        added: Option<&AddedConditions>,
    ) -> Result<Tensor> {
        let step = self.load_unet(latents.image_shape()?, context.len(), added.is_some())?;
        self.write_unet(latents, timestep, context, added, None)?;
        self.executor.run(step)?;
        let [b, c, h, w] = latents.image_shape()?;
        let shape = [b, h, w, self.pipeline.config.unet.out_channels];
        let prediction = self.read(&named(PREDICTION, [b, c, h, w]), shape.iter().product())?;
        Ok(Tensor::from_channels_last(&prediction, shape))
    }

    /// Gradients of `Σ prediction ∘ cotangent` of [`Networks::unet`]; `cotangent [B, C, h, w]`.
    pub fn unet_gradient(
        &mut self,
        latents: &Tensor,
        timestep: f64,
        context: &[f32],
        added: Option<&AddedConditions>,
        cotangent: &Tensor,
    ) -> Result<UnetGradient> {
        let shape = latents.image_shape()?;
        let mut to = vec![LATENTS, buffer::CONTEXT];
        to.extend(added.map(|_| buffer::POOLED));
        let gradient = self.load_unet_gradient(shape, context.len(), added.is_some(), &to)?;
        self.write_unet(latents, timestep, context, added, Some(cotangent))?;
        self.executor.run(gradient)?;
        let [b, c, h, w] = shape;
        let gradient = |name: String, len: usize| self.read(&gradient_of(&name), len);
        Ok(UnetGradient {
            latents: Tensor::from_channels_last(&gradient(named(LATENTS, shape), b * c * h * w)?, [b, h, w, c]),
            context: gradient(self::context(context.len(), shape), context.len())?,
            pooled: added.map(|added| gradient(named(buffer::POOLED, shape), added.pooled.len())).transpose()?,
        })
    }

    /// What a program of [`Networks::load_unet`] reads, and one of [`Networks::load_unet_gradient`] with the cotangent.
    pub fn write_unet(
        &mut self,
        latents: &Tensor,
        timestep: f64,
        context: &[f32],
        added: Option<&AddedConditions>,
        cotangent: Option<&Tensor>,
    ) -> Result<()> {
        let shape = latents.image_shape()?;
        self.executor.write(&self::context(context.len(), shape), Data::F32(context))?;
        let mut write = |what: &str, data: Data<'_>| self.executor.write(&named(what, shape), data);
        write(LATENTS, Data::F32(&latents.channels_last()?))?;
        write(buffer::TIMESTEPS, Data::F64(&[timestep]))?;
        if let Some(added) = added {
            write(buffer::POOLED, Data::F32(&added.pooled))?;
            write(buffer::SIZE_IDS, Data::F32(&added.size_ids))?;
        }
        if let Some(cotangent) = cotangent {
            let name = gradient_of(&named(PREDICTION, shape));
            self.executor.write(&name, Data::F32(&cotangent.channels_last()?))?;
        }
        Ok(())
    }

    /// Loads the UNet as one program with everything it is conditioned on inside; run it with [`Networks::run`].
    pub fn load_unet(&mut self, shape: [usize; 4], context_len: usize, with_added: bool) -> Result<ProgramId> {
        let key = format!("unet {shape:?} {context_len} {with_added}");
        self.load(key, |networks| networks.unet_program(shape, context_len, with_added))
    }

    /// Loads the same and its gradient to the named buffers (`latents`, `context`, `pooled`), forward and backward in one.
    pub fn load_unet_gradient(
        &mut self,
        shape: [usize; 4],
        context_len: usize,
        with_added: bool,
        to: &[&str],
    ) -> Result<ProgramId> {
        let key = format!("unet gradient {shape:?} {context_len} {with_added} {to:?}");
        self.load(key, |networks| networks.unet_gradient_program(shape, context_len, with_added, to))
    }

    /// The same, not loaded.
    pub fn unet_gradient_program(
        &self,
        shape: [usize; 4],
        context_len: usize,
        with_added: bool,
        to: &[&str],
    ) -> Result<Program> {
        let to: Vec<String> = to
            .iter()
            .map(|&what| if what == buffer::CONTEXT { context(context_len, shape) } else { named(what, shape) })
            .collect();
        vector_jacobian(&self.unet_program(shape, context_len, with_added)?, &to)
    }

    /// The program of [`Networks::load_unet`], not loaded.
    pub fn unet_program(&self, shape: [usize; 4], context_len: usize, with_added: bool) -> Result<Program> {
        let [b, _, h, w] = shape;
        let config = &self.pipeline.config.unet;
        let unet = Unet::new(config);
        let mut builder = Builder::new("unet", self.dtype);
        let latents = builder.accumulator_input(named(LATENTS, shape), &[b, h, w, config.in_channels]);
        let tokens = context_len / (b * config.context_width).max(1);
        let context = builder.input(self::context(context_len, shape), &[b, tokens, config.context_width]);
        let timestep = builder.accumulator_input(named(buffer::TIMESTEPS, shape), &[1]);
        let added = match (&config.added, with_added) {
            (Some(added), true) => {
                let width = added.input_width - 6 * added.time_dim;
                let pooled = builder.input(named(buffer::POOLED, shape), &[b, width]);
                Some(Added { pooled, size_ids: builder.accumulator_input(named(buffer::SIZE_IDS, shape), &[b, 6]) })
            }
            (Some(_), false) | (None, _) => None,
        };
        let index = builder.input_i32(named(buffer::STEP, shape), &[1]);
        let kv = unet.context_kv(&mut builder, context);
        let time = unet.time(&mut builder, timestep, added);
        let time = builder.select(time, index);
        let prediction = unet.forward(&mut builder, latents, kv, time);
        builder.output(named(PREDICTION, shape), prediction);
        builder.finish()
    }

    /// Loads the decoder for latents of this shape; run it with [`Networks::run`].
    pub fn load_decoder(&mut self, shape: [usize; 4]) -> Result<ProgramId> {
        self.load(format!("decode {shape:?}"), |networks| networks.decoder_program(shape))
    }

    /// Loads the same and its gradient to the latents, forward and backward in one.
    pub fn load_decoder_gradient(&mut self, shape: [usize; 4]) -> Result<ProgramId> {
        let gradient = |networks: &Self| vector_jacobian(&networks.decoder_program(shape)?, &[named(LATENTS, shape)]);
        self.load(format!("decode gradient {shape:?}"), gradient)
    }

    /// The program of [`Networks::load_decoder`], not loaded.
    pub fn decoder_program(&self, shape: [usize; 4]) -> Result<Program> {
        let [b, c, h, w] = shape;
        let mut builder = Builder::new("decode", self.pipeline.config.vae.dtype(self.dtype));
        let latents = builder.accumulator_input(named(LATENTS, shape), &[b, h, w, c]);
        let image = vae::decode(&mut builder, &self.pipeline.config.vae, latents);
        builder.output(named(PIXELS, shape), image);
        builder.finish()
    }

    /// Runs a loaded network on whatever its buffers hold.
    pub fn run(&mut self, program: ProgramId) -> Result<()> {
        self.executor.run(program)
    }

    /// Image `[B, 3, f·h, f·w]`, not clamped, for latents at the UNet's scale.
    pub fn decode(&mut self, latents: &Tensor) -> Result<Tensor> {
        let shape = latents.image_shape()?;
        let [b, _, h, w] = shape;
        let config = &self.pipeline.config.vae;
        let (f, channels) = (config.factor(), config.image_channels);
        let decode = self.load_decoder(shape)?;
        self.executor.write(&named(LATENTS, shape), Data::F32(&latents.channels_last()?))?;
        self.executor.run(decode)?;
        let image = [b, f * h, f * w, channels];
        Ok(Tensor::from_channels_last(&self.read(&named(PIXELS, shape), image.iter().product())?, image))
    }

    /// Gradient to the latents of `Σ image ∘ cotangent` of [`Networks::decode`]; `cotangent [B, 3, f·h, f·w]`.
    pub fn decode_gradient(&mut self, latents: &Tensor, cotangent: &Tensor) -> Result<Tensor> {
        let shape = latents.image_shape()?;
        let [b, c, h, w] = shape;
        let gradient = self.load_decoder_gradient(shape)?;
        self.executor.write(&named(LATENTS, shape), Data::F32(&latents.channels_last()?))?;
        self.executor.write(&gradient_of(&named(PIXELS, shape)), Data::F32(&cotangent.channels_last()?))?;
        self.executor.run(gradient)?;
        let found = self.read(&gradient_of(&named(LATENTS, shape)), b * c * h * w)?;
        Ok(Tensor::from_channels_last(&found, [b, h, w, c]))
    }

    /// Means and log-variances `[B, L, H/f, W/f]`, not scaled, of an image in [-1, 1].
    pub fn encode(&mut self, image: &Tensor) -> Result<(Tensor, Tensor)> {
        let shape = image.image_shape()?;
        let [b, _, h, w] = shape;
        let config = &self.pipeline.config.vae;
        let (f, latent) = (config.factor(), config.latent_channels);
        let encode = self.load(format!("encode {shape:?}"), |networks| networks.encoder_program(shape))?;
        self.executor.write(&named("image", shape), Data::F32(&image.channels_last()?))?;
        self.executor.run(encode)?;
        let moments = self.read(&named(MOMENTS, shape), b * (h / f) * (w / f) * 2 * latent)?;
        let half = |first: usize| {
            let data: Vec<f32> = moments.chunks(2 * latent).flat_map(|m| &m[first..first + latent]).copied().collect();
            Tensor::from_channels_last(&data, [b, h / f, w / f, latent])
        };
        Ok((half(0), half(latent)))
    }

    fn encoder_program(&self, shape: [usize; 4]) -> Result<Program> {
        let ([b, c, h, w], config) = (shape, &self.pipeline.config.vae);
        let mut builder = Builder::new("encode", config.dtype(self.dtype));
        let pixels = builder.accumulator_input(named("image", shape), &[b, h, w, c]);
        let moments = vae::encode(&mut builder, config, pixels);
        builder.output(named(MOMENTS, shape), moments);
        builder.finish()
    }
}
