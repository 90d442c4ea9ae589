//! Single networks as host calls: text towers, one UNet prediction, VAE decode and encode, and gradients,
//! on tensors in PyTorch's layouts.
//!
//! For comparisons, tools and library users who bring their own loop; the methods run longer programs.

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

/// The networks of one pipeline on one executor.
pub struct Networks<'p> {
    pipeline: &'p Pipeline,
    executor: Box<dyn Executor>,
    dtype: DType,
    loaded: Option<(ProgramId, Footprint)>,
}

const PREDICTION: &str = "prediction";
const PIXELS: &str = "pixels";
const MOMENTS: &str = "moments";

/// A program and the gradient of its one output, times a cotangent of that name, to named inputs.
fn vector_jacobian(program: &Program, to: &[&str]) -> Result<Program> {
    let objectives = program.outputs.iter().map(|(name, id)| (*id, Cotangent::Input(gradient_of(name)))).collect();
    let leaves = to.iter().filter_map(|name| Some((program.input(name)?, gradient_of(name)))).collect();
    differentiate(program, &Request { objectives, leaves }, None)
}

impl<'p> Networks<'p> {
    /// `dtype` must be one the executor runs.
    pub fn new(pipeline: &'p Pipeline, executor: Box<dyn Executor>, dtype: DType) -> Networks<'p> {
        Networks { pipeline, executor, dtype, loaded: None }
    }

    fn load(&mut self, program: Program) -> Result<ProgramId> {
        // Every call brings its own shapes, and buffers of one name have one shape.
        self.executor.clear();
        let planned = plan(program, |program, node| self.executor.workspace(program, node));
        let footprint = Footprint::of(&[&planned]);
        let id = self.executor.load(planned, &self.pipeline.model)?;
        self.loaded = Some((id, footprint));
        Ok(id)
    }

    /// The program that was loaded last, whose buffers still hold what it read, and the memory it was planned to take.
    pub fn loaded(&self) -> Option<&(ProgramId, Footprint)> {
        self.loaded.as_ref()
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
        let text = self.load(programs::text(self.pipeline, self.dtype)?)?;
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
        let [b, _, h, w] = latents.image_shape()?;
        let shape = [b, h, w, self.pipeline.config.unet.out_channels];
        Ok(Tensor::from_channels_last(&self.read(PREDICTION, shape.iter().product())?, shape))
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
        let d_latents = self.read(&gradient_of(LATENTS), b * c * h * w)?;
        Ok(UnetGradient {
            latents: Tensor::from_channels_last(&d_latents, [b, h, w, c]),
            context: self.read(&gradient_of(buffer::CONTEXT), context.len())?,
            pooled: added.map(|added| self.read(&gradient_of(buffer::POOLED), added.pooled.len())).transpose()?,
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
        self.executor.write(LATENTS, Data::F32(&latents.channels_last()?))?;
        self.executor.write(buffer::TIMESTEPS, Data::F64(&[timestep]))?;
        self.executor.write(buffer::CONTEXT, Data::F32(context))?;
        if let Some(added) = added {
            self.executor.write(buffer::POOLED, Data::F32(&added.pooled))?;
            self.executor.write(buffer::SIZE_IDS, Data::F32(&added.size_ids))?;
        }
        if let Some(cotangent) = cotangent {
            self.executor.write(&gradient_of(PREDICTION), Data::F32(&cotangent.channels_last()?))?;
        }
        Ok(())
    }

    /// Loads the UNet as one program with everything it is conditioned on inside; run it with [`Networks::run`].
    pub fn load_unet(&mut self, shape: [usize; 4], context_len: usize, with_added: bool) -> Result<ProgramId> {
        let program = self.unet_program(shape, context_len, with_added)?;
        self.load(program)
    }

    /// Loads the same and its gradient to the named buffers (`latents`, `context`, `pooled`), forward and backward in one.
    pub fn load_unet_gradient(
        &mut self,
        shape: [usize; 4],
        context_len: usize,
        with_added: bool,
        to: &[&str],
    ) -> Result<ProgramId> {
        let program = self.unet_gradient_program(shape, context_len, with_added, to)?;
        self.load(program)
    }

    /// The same, not loaded.
    pub fn unet_gradient_program(
        &self,
        shape: [usize; 4],
        context_len: usize,
        with_added: bool,
        to: &[&str],
    ) -> Result<Program> {
        vector_jacobian(&self.unet_program(shape, context_len, with_added)?, to)
    }

    /// The program of [`Networks::load_unet`], not loaded.
    pub fn unet_program(&self, [b, _, h, w]: [usize; 4], context_len: usize, with_added: bool) -> Result<Program> {
        let config = &self.pipeline.config.unet;
        let unet = Unet::new(config);
        let mut builder = Builder::new("unet", self.dtype);
        let latents = builder.wide_input(LATENTS, &[b, h, w, config.in_channels]);
        let tokens = context_len / (b * config.context_width).max(1);
        let context = builder.input(buffer::CONTEXT, &[b, tokens, config.context_width]);
        let timestep = builder.wide_input(buffer::TIMESTEPS, &[1]);
        let added = match (&config.added, with_added) {
            (Some(added), true) => {
                let pooled = builder.input(buffer::POOLED, &[b, added.input_width - 6 * added.time_dim]);
                Some(Added { pooled, size_ids: builder.wide_input(buffer::SIZE_IDS, &[b, 6]) })
            }
            (Some(_), false) | (None, _) => None,
        };
        let index = builder.input_i32(buffer::STEP, &[1]);
        let kv = unet.context_kv(&mut builder, context);
        let time = unet.time(&mut builder, timestep, added);
        let time = builder.select(time, index);
        let prediction = unet.forward(&mut builder, latents, kv, time);
        builder.output(PREDICTION, prediction);
        builder.finish()
    }

    /// Loads the decoder for latents of this shape; run it with [`Networks::run`].
    pub fn load_decoder(&mut self, shape: [usize; 4]) -> Result<ProgramId> {
        let program = self.decoder_program(shape)?;
        self.load(program)
    }

    /// Loads the same and its gradient to the latents, forward and backward in one.
    pub fn load_decoder_gradient(&mut self, shape: [usize; 4]) -> Result<ProgramId> {
        let program = self.decoder_program(shape)?;
        self.load(vector_jacobian(&program, &[LATENTS])?)
    }

    /// The program of [`Networks::load_decoder`], not loaded.
    pub fn decoder_program(&self, [b, c, h, w]: [usize; 4]) -> Result<Program> {
        let mut builder = Builder::new("decode", self.pipeline.config.vae.dtype(self.dtype));
        let latents = builder.wide_input(LATENTS, &[b, h, w, c]);
        let image = vae::decode(&mut builder, &self.pipeline.config.vae, latents);
        builder.output(PIXELS, image);
        builder.finish()
    }

    /// Runs a loaded network on whatever its buffers hold.
    pub fn run(&mut self, program: ProgramId) -> Result<()> {
        self.executor.run(program)
    }

    /// Image `[B, 3, f·h, f·w]`, not clamped, for latents at the UNet's scale.
    pub fn decode(&mut self, latents: &Tensor) -> Result<Tensor> {
        let [b, c, h, w] = latents.image_shape()?;
        let config = &self.pipeline.config.vae;
        let (f, channels) = (config.factor(), config.image_channels);
        let decode = self.load_decoder([b, c, h, w])?;
        self.executor.write(LATENTS, Data::F32(&latents.channels_last()?))?;
        self.executor.run(decode)?;
        let shape = [b, f * h, f * w, channels];
        Ok(Tensor::from_channels_last(&self.read(PIXELS, shape.iter().product())?, shape))
    }

    /// Gradient to the latents of `Σ image ∘ cotangent` of [`Networks::decode`]; `cotangent [B, 3, f·h, f·w]`.
    pub fn decode_gradient(&mut self, latents: &Tensor, cotangent: &Tensor) -> Result<Tensor> {
        let [b, c, h, w] = latents.image_shape()?;
        let gradient = self.load_decoder_gradient([b, c, h, w])?;
        self.executor.write(LATENTS, Data::F32(&latents.channels_last()?))?;
        self.executor.write(&gradient_of(PIXELS), Data::F32(&cotangent.channels_last()?))?;
        self.executor.run(gradient)?;
        Ok(Tensor::from_channels_last(&self.read(&gradient_of(LATENTS), b * c * h * w)?, [b, h, w, c]))
    }

    /// Means and log-variances `[B, L, H/f, W/f]`, not scaled, of an image in [-1, 1].
    pub fn encode(&mut self, image: &Tensor) -> Result<(Tensor, Tensor)> {
        let [b, c, h, w] = image.image_shape()?;
        let config = &self.pipeline.config.vae;
        let (f, latent) = (config.factor(), config.latent_channels);
        let mut builder = Builder::new("encode", config.dtype(self.dtype));
        let pixels = builder.wide_input(PIXELS, &[b, h, w, c]);
        let moments = vae::encode(&mut builder, config, pixels);
        builder.output(MOMENTS, moments);
        let program = builder.finish()?;
        let encode = self.load(program)?;
        self.executor.write(PIXELS, Data::F32(&image.channels_last()?))?;
        self.executor.run(encode)?;
        let moments = self.read(MOMENTS, b * (h / f) * (w / f) * 2 * latent)?;
        let half = |first: usize| {
            let data: Vec<f32> = moments.chunks(2 * latent).flat_map(|m| &m[first..first + latent]).copied().collect();
            Tensor::from_channels_last(&data, [b, h / f, w / f, latent])
        };
        Ok((half(0), half(latent)))
    }
}
