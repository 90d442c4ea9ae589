//! Reference images and what the loss compares with: their features by a CLIP and their latents, and the means of those.

use super::cache::{Encoder, ReferenceCache};
use super::options::Convention;
use crate::data::images::{self, Picture};
use crate::data::resample;
use crate::exec::{Data, DataMut, Executor, ProgramId};
use crate::models::preprocess::{Fit, Preprocess};
use crate::models::{clip_image, detect, vae};
use crate::optimize::objective::references::{Tower, buffer};
use crate::pipeline::Pipeline;
use crate::plan::{Planned, plan};
use crate::program::{Builder, DType, Program};
use crate::sampler::{self, draw};
use crate::weights::{Component, fingerprint};
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// Pictures of what images should show, in the order of their names.
#[derive(Default)]
pub struct References {
    pub names: Vec<String>,
    pub pictures: Vec<Picture>,
    /// Of files that cannot be read.
    pub unreadable: Vec<Error>,
}

impl References {
    /// Files and folders; what cannot be read is left out and kept as an error. `Error::File` where nothing is left.
    pub fn read(paths: &[PathBuf]) -> Result<References> {
        let mut references = References::default();
        for (path, picture) in images::read_all(paths)? {
            match picture {
                Ok(picture) => references.add(&path, picture),
                Err(error) => references.unreadable.push(error),
            }
        }
        match (references.pictures.is_empty(), references.unreadable.pop()) {
            (true, Some(error)) => Err(error),
            (true, None) => Err(Error::Usage("no reference images; name a folder of PNG, JPEG or WebP".into())),
            (false, last) => {
                references.unreadable.extend(last);
                Ok(references)
            }
        }
    }

    /// The same where every file could be read; else the error of one that could not.
    pub fn whole(mut self) -> Result<References> {
        match self.unreadable.pop() {
            Some(error) => Err(error),
            None => Ok(self),
        }
    }

    fn add(&mut self, path: &Path, picture: Picture) {
        let name = path.file_name().unwrap_or(path.as_os_str());
        self.names.push(name.to_string_lossy().into_owned());
        self.pictures.push(picture);
    }

    /// 16 hex digits of all pictures in their order, whatever files they came in.
    pub fn fingerprint(&self) -> String {
        let all: String = self.pictures.iter().map(Picture::fingerprint).collect();
        format!("{:016x}", fingerprint(all.into_bytes()))
    }
}

/// What the loss compares with, a row per reference.
#[derive(Clone, Debug, Default)]
pub struct Targets {
    /// `[projection]`, of any length.
    features: Vec<Vec<f32>>,
    /// `[h, w, C]`, clean, at the UNet's scale.
    latents: Vec<Vec<f32>>,
}

impl Targets {
    /// The mean of the features, of length 1 (the released code's main.py, line 123).
    pub fn centroid(&self) -> Vec<f32> {
        let mean = mean(&self.features);
        let length = mean.iter().map(|x| x * x).sum::<f64>().sqrt();
        mean.iter().map(|x| (x / length) as f32).collect()
    }

    /// Writes them where the loss reads them, a row for each of so many images; of a term that counts nothing there is none.
    pub(super) fn write(&self, executor: &mut dyn Executor, images: usize) -> Result<()> {
        if !self.features.is_empty() {
            executor.write(buffer::CENTROID, Data::F32(&self.centroid().repeat(images)))?;
        }
        if !self.latents.is_empty() {
            executor.write(buffer::LATENTS, Data::F32(&self.mean_latents().repeat(images)))?;
        }
        Ok(())
    }

    /// The mean of the latents.
    pub fn mean_latents(&self) -> Vec<f32> {
        mean(&self.latents).iter().map(|x| *x as f32).collect()
    }
}

fn mean(rows: &[Vec<f32>]) -> Vec<f64> {
    let mut sum = vec![0.0; rows.first().map_or(0, Vec::len)];
    for row in rows {
        sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
    }
    sum.iter().map(|sum| sum / rows.len() as f64).collect()
}

const SEEN: &str = "image";
const FEATURES: &str = "features";
const IMAGE: &str = "references.image";
const MOMENTS: &str = "references.moments";

/// A model's CLIP, as references see it.
pub(super) fn tower(pipeline: &Pipeline, component: Component) -> Result<Tower> {
    if !pipeline.model.has(component) {
        let what = match component {
            Component::HeldOutClip => "this model has no CLIP besides that of the loss; name one with --judge",
            _ => "this model has no CLIP to see references by; name one with --clip, or leave the semantic term out",
        };
        return Err(Error::Usage(what.into()));
    }
    let config = detect::clip_config(&pipeline.model, component)?;
    Ok(Tower { config: config.image, component, preprocess: config.preprocess })
}

/// The buffer of an input or output `what` of a tower.
fn of_tower(tower: &Tower, what: &str) -> String {
    format!("references.{}.{what}", tower.component.name())
}

/// The programs that make targets of pictures, one at a time; those of terms that count nothing are left out.
pub(super) struct Encoders {
    tower: Option<(Tower, Planned)>,
    vae: Option<Planned>,
    frame: Frame,
}

/// The size of what is generated, and how references are brought to it.
#[derive(Clone, Copy, Debug)]
struct Frame {
    convention: Convention,
    width: usize,
    height: usize,
}

impl Frame {
    /// Numbers of its latents.
    fn latents(self, pipeline: &Pipeline) -> usize {
        let config = &pipeline.config.vae;
        config.latent_channels * (self.height / config.factor()) * (self.width / config.factor())
    }
}

impl Encoders {
    /// `tower` for features, with the preprocessing of references; `latents` for images of `[width, height]`.
    pub fn plan(
        pipeline: &Pipeline,
        executor: &dyn Executor,
        dtype: DType,
        tower: Option<&Tower>,
        latents: bool,
        (convention, [width, height]): (Convention, [usize; 2]),
    ) -> Result<Encoders> {
        let plan = |program: Program| plan(program, |program, node| executor.workspace(program, node));
        let planned_tower = |tower: &Tower| -> Result<(Tower, Planned)> {
            let side = tower.preprocess.side;
            let mut b = Builder::new("reference features", dtype);
            let image = b.accumulator_input(of_tower(tower, SEEN), &[1, side, side, 3]);
            // Resized and cropped before, on the host: pictures come in all sizes.
            let image = Preprocess { fit: Fit::Squash, ..tower.preprocess }.append(&mut b, image);
            let features = clip_image::features(&mut b, &tower.config, tower.component, image);
            b.output(of_tower(tower, FEATURES), features);
            Ok((tower.clone(), plan(b.finish()?)))
        };
        let planned_vae = || -> Result<Planned> {
            let config = &pipeline.config.vae;
            let mut b = Builder::new("reference latents", config.dtype(dtype));
            let image = b.accumulator_input(IMAGE, &[1, height, width, config.image_channels]);
            let moments = vae::encode(&mut b, config, image);
            b.output(MOMENTS, moments);
            Ok(plan(b.finish()?))
        };
        Ok(Encoders {
            tower: tower.map(planned_tower).transpose()?,
            vae: latents.then(planned_vae).transpose()?,
            frame: Frame { convention, width, height },
        })
    }

    pub fn programs(&self) -> Vec<&Planned> {
        self.tower.iter().map(|(_, planned)| planned).chain(&self.vae).collect()
    }

    /// Loads the programs and encodes the references.
    pub fn encode(
        self,
        pipeline: &Pipeline,
        executor: &mut dyn Executor,
        references: &References,
        seed: u64,
        cache: Option<&dyn ReferenceCache>,
    ) -> Result<Targets> {
        let (model, pictures, frame) = (&pipeline.model, &references.pictures, self.frame);
        let mut targets = Targets::default();
        if let Some((tower, planned)) = self.tower {
            let how = format!("{:?}", tower.preprocess);
            let encoder = Encoder::new(cache, model, (tower.component, planned), &how)?;
            let make = |executor: &mut dyn Executor, program, index: usize| {
                features(executor, program, &tower, &pictures[index])
            };
            targets.features = encoder.rows(executor, pictures, tower.config.projection, |_| None, make)?;
        }
        if let Some(planned) = self.vae {
            let encoder = Encoder::new(cache, model, (Component::Vae, planned), &format!("{frame:?}"))?;
            let draw = |index: usize| (frame.convention == Convention::Released).then_some((seed, index as u64));
            let make = |executor: &mut dyn Executor, program, index: usize| {
                latents(pipeline, executor, program, frame, &pictures[index], draw(index))
            };
            targets.latents = encoder.rows(executor, pictures, frame.latents(pipeline), draw, make)?;
        }
        Ok(targets)
    }
}

fn features(executor: &mut dyn Executor, program: ProgramId, tower: &Tower, picture: &Picture) -> Result<Vec<f32>> {
    let side = tower.preprocess.side;
    let image = match tower.preprocess.fit {
        Fit::Squash => resample::squash(picture, side, side),
        Fit::Crop { short_side } => middle(&resample::cover(picture, short_side, short_side), short_side, side),
    };
    executor.write(&of_tower(tower, SEEN), Data::F32(&image))?;
    executor.run(program)?;
    let mut features = vec![0.0; tower.config.projection];
    executor.read(&of_tower(tower, FEATURES), DataMut::F32(&mut features))?;
    Ok(features)
}

/// The middle `side × side` pixels of a square.
fn middle(image: &[f32], from: usize, side: usize) -> Vec<f32> {
    let first = from.saturating_sub(side) / 2;
    let row = |y: usize| &image[3 * ((first + y) * from + first)..][..3 * side];
    (0..side).flat_map(row).copied().collect()
}

/// `[h, w, C]` at the UNet's scale: the posterior's mean, or with `(seed, index)` a sample.
fn latents(
    pipeline: &Pipeline,
    executor: &mut dyn Executor,
    program: ProgramId,
    Frame { convention, width, height }: Frame,
    picture: &Picture,
    sample: Option<(u64, u64)>,
) -> Result<Vec<f32>> {
    let config = &pipeline.config.vae;
    let image = match convention {
        Convention::Default => resample::cover(picture, width, height),
        Convention::Released => resample::squash_in_bytes(picture, width, height),
    };
    executor.write(IMAGE, Data::F32(&image))?;
    executor.run(program)?;
    let (channels, factor) = (config.latent_channels, config.factor());
    let mut moments = vec![0.0; 2 * channels * (height / factor) * (width / factor)];
    executor.read(MOMENTS, DataMut::F32(&mut moments))?;
    let mut unit = vec![0.0; moments.len() / 2];
    if let Some((seed, index)) = sample {
        sampler::normal(seed, draw::REFERENCE + index, &mut unit);
    }
    let pixels = moments.chunks(2 * channels).zip(unit.chunks(channels));
    let value = |((mean, log_variance), unit): ((&f32, &f32), &f32)| {
        // diffusers bounds the logarithm likewise.
        let std = (0.5 * log_variance.clamp(-30.0, 20.0)).exp();
        ((f64::from(mean + std * unit) - config.shift_factor) * config.scaling_factor) as f32
    };
    let values = |(moments, unit): (&[f32], &[f32])| -> Vec<f32> {
        let (means, variances) = moments.split_at(channels);
        means.iter().zip(variances).zip(unit).map(value).collect()
    };
    Ok(pixels.flat_map(values).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_of_rows() {
        let targets = Targets { features: vec![vec![3.0, 0.0], vec![0.0, 4.0]], latents: vec![vec![1.0], vec![4.0]] };
        // The longer one counts more.
        assert_eq!(targets.centroid(), [0.6, 0.8]);
        assert_eq!(targets.mean_latents(), [2.5]);
    }

    #[test]
    fn the_middle_of_a_square() {
        let image: Vec<f32> = (0..16).flat_map(|i| [i as f32; 3]).collect();
        let found: Vec<f32> = middle(&image, 4, 2).chunks(3).map(|pixel| pixel[0]).collect();
        assert_eq!(found, [5.0, 6.0, 9.0, 10.0]);
    }
}
