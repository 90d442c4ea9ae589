//! Final latents to images: decoded one by one, looked at, and rounded to bytes.

use super::job::{Image, Job};
use super::{Observer, Progress};
use crate::exec::{DataMut, Executor, ProgramId};
use crate::pipeline::Pipeline;
use crate::pipeline::layout::to_channels_first;
use crate::pipeline::programs::buffer;
use crate::plan::Planned;
use crate::sampler::LATENTS;
use crate::{Error, Result};
use rayon::prelude::*;

/// The decoder on an executor. It borrows the executor for a call only, so that others use it in between.
pub struct Decoder {
    program: ProgramId,
    /// Of one image's latents: numbers, and numbers a pixel.
    len: usize,
    channels: usize,
    /// Pixels.
    width: usize,
    height: usize,
    image_channels: usize,
}

impl Decoder {
    /// `planned` is that of [`programs::decode`].
    pub fn load(pipeline: &Pipeline, executor: &mut dyn Executor, planned: Planned) -> Result<Decoder> {
        let input = planned.program.input(buffer::DECODE_LATENTS).map(|id| planned.program.shape(id).to_vec());
        let Some(&[1, height, width, channels]) = input.as_deref() else {
            let what = format!("has no latents of one image, {input:?}");
            return Err(Error::Program { program: planned.program.name, what, at: "decode".into() });
        };
        let config = &pipeline.config.vae;
        Ok(Decoder {
            program: executor.load(planned, &pipeline.model)?,
            len: height * width * channels,
            channels,
            width: config.factor() * width,
            height: config.factor() * height,
            image_channels: config.image_channels,
        })
    }

    /// The images of the jobs, of the rows of [`LATENTS`] one by one: the decoder needs more memory than the UNet. Where some are not
    /// finite it is an error, but `observe` has seen the others.
    pub fn finish(&self, executor: &mut dyn Executor, jobs: &[Job], observe: &mut Observer<'_>) -> Result<Vec<Image>> {
        let batch = jobs.len();
        self.decode(executor, jobs, 0)?;
        let mut latents = vec![0.0; batch * self.len];
        executor.read(LATENTS, DataMut::F32(&mut latents))?;
        let mut pixels = vec![0.0; self.height * self.width * self.image_channels];
        let mut images = Vec::with_capacity(batch);
        let mut failed = None;
        for (index, latents) in latents.chunks(self.len).enumerate() {
            executor.read(buffer::IMAGE, DataMut::F32(&mut pixels))?;
            if index + 1 < batch {
                self.decode(executor, jobs, index + 1)?;
            }
            // One image of a batch does not spoil the others.
            let (sampled, decoded) = (are_finite(latents), are_finite(&pixels));
            if !sampled || !decoded {
                failed.get_or_insert((index, sampled));
                continue;
            }
            let rgb = pixels.par_iter().with_min_len(1 << 14).map(|&x| to_byte(x)).collect();
            let latents = to_channels_first(latents, self.channels);
            let image = Image { width: self.width, height: self.height, rgb, latents };
            observe(Progress::Image { index, image: &image })?;
            images.push(image);
        }
        match failed {
            Some((index, true)) => Err(self.where_pixels_go_wrong(executor, jobs, index)),
            Some((index, false)) => Err(Error::NotFinite(format!("what is sampled for {}", image(jobs, index)))),
            None => Ok(images),
        }
    }

    /// Decodes an image again, op by op.
    fn where_pixels_go_wrong(&self, executor: &mut dyn Executor, jobs: &[Job], index: usize) -> Error {
        executor.set_check_finite(true);
        let decoded = self.decode(executor, jobs, index);
        executor.set_check_finite(false);
        decoded.err().unwrap_or_else(|| Error::NotFinite(image(jobs, index)))
    }

    /// Starts decoding one image.
    fn decode(&self, executor: &mut dyn Executor, jobs: &[Job], index: usize) -> Result<()> {
        executor.copy((LATENTS, index * self.len), (buffer::DECODE_LATENTS, 0), self.len)?;
        executor.run(self.program).map_err(|error| error.during(format!("decoding {}", image(jobs, index))))
    }
}

/// An image of the batch, in messages.
fn image(jobs: &[Job], index: usize) -> String {
    format!("the image of seed {}", jobs[index].seed)
}

fn are_finite(values: &[f32]) -> bool {
    values.par_iter().with_min_len(1 << 14).all(|x| x.is_finite())
}

/// `[-1, 1]` → `0..=255`, rounding halves to even (`VaeImageProcessor.postprocess`, `numpy_to_pil`).
fn to_byte(x: f32) -> u8 {
    ((x / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8
}
