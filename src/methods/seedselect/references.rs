//! Reference images and what the loss compares with: their features by a CLIP and their latents, and the means of those.

use super::cache::{Encoder, ReferenceCache};
use super::options::Convention;
use crate::data::images::{self, Picture};
use crate::data::resample;
use crate::exec::{Data, DataMut, Executor, ProgramId};
use crate::models::preprocess::{Fit, Preprocess};
use crate::models::{clip_image, detect, vae};
use crate::optimize::objective::references::{Tower, View, buffer};
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
    /// `[views, projection]`, of any length.
    features: Vec<Vec<f32>>,
    /// What the features are of.
    views: &'static [View],
    /// `[h, w, C]`, clean, at the UNet's scale.
    latents: Vec<Vec<f32>>,
}

impl Targets {
    /// The mean of the features of the whole images, of length 1 (the released code's main.py, line 123).
    pub fn centroid(&self) -> Vec<f32> {
        self.centroid_of(0)
    }

    /// The same of view `index`.
    fn centroid_of(&self, index: usize) -> Vec<f32> {
        let mean = mean(&self.features);
        let view = mean.chunks((mean.len() / self.views.len().max(1)).max(1)).nth(index).unwrap_or_default();
        let length = view.iter().map(|x| x * x).sum::<f64>().sqrt();
        view.iter().map(|x| (x / length) as f32).collect()
    }

    /// Those of some references alone, by their indices.
    pub fn of(&self, subset: &[usize]) -> Targets {
        let chosen = |rows: &[Vec<f32>]| subset.iter().filter_map(|index| rows.get(*index).cloned()).collect();
        Targets { features: chosen(&self.features), latents: chosen(&self.latents), views: self.views }
    }

    /// Writes those of each image where the loss reads them; of a term that counts nothing there is none.
    pub(super) fn write(images: &[&Targets], executor: &mut dyn Executor) -> Result<()> {
        if images.iter().all(|targets| !targets.features.is_empty()) {
            let views = images.first().map_or(View::WHOLE, |targets| targets.views);
            for (index, view) in views.iter().enumerate() {
                let all: Vec<f32> = images.iter().flat_map(|targets| targets.centroid_of(index)).collect();
                executor.write(&buffer::centroid(*view), Data::F32(&all))?;
            }
        }
        if images.iter().all(|targets| !targets.latents.is_empty()) {
            let all: Vec<f32> = images.iter().flat_map(|targets| targets.mean_latents()).collect();
            executor.write(buffer::LATENTS, Data::F32(&all))?;
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
pub(super) fn tower(pipeline: &Pipeline, component: Component, views: &'static [View]) -> Result<Tower> {
    if !pipeline.model.has(component) {
        let what = match component {
            Component::HeldOutClip => "this model has no CLIP besides that of the loss; name one with --judge",
            _ => "this model has no CLIP to see references by; name one with --clip, or leave the semantic term out",
        };
        return Err(Error::Usage(what.into()));
    }
    let config = detect::clip_config(&pipeline.model, component)?;
    Ok(Tower { config: config.image, component, preprocess: config.preprocess, views })
}

/// The buffer of an input or output `what` of a tower.
fn of_tower(tower: &Tower, what: &str) -> String {
    format!("references.{}.{what}", tower.component.name())
}

/// What is made of pictures.
#[derive(Clone, Copy, Default)]
pub(super) struct Wanted<'a> {
    /// Features of this CLIP, with the preprocessing of references.
    pub tower: Option<&'a Tower>,
    /// Latents to compare with.
    pub latents: bool,
    /// Latents to invert.
    pub means: bool,
}

/// The programs that make it, one picture at a time; those that nobody wants are left out.
pub(super) struct Encoders {
    tower: Option<(Tower, Planned)>,
    vae: Option<Planned>,
    latents: bool,
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
    /// For images of `[width, height]`.
    pub fn plan(
        pipeline: &Pipeline,
        executor: &dyn Executor,
        dtype: DType,
        wanted: Wanted<'_>,
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
            tower: wanted.tower.map(planned_tower).transpose()?,
            vae: (wanted.latents || wanted.means).then(planned_vae).transpose()?,
            latents: wanted.latents,
            frame: Frame { convention, width, height },
        })
    }

    pub fn programs(&self) -> Vec<&Planned> {
        self.tower.iter().map(|(_, planned)| planned).chain(&self.vae).collect()
    }

    /// Each network is loaded with the first picture that the cache does not have.
    pub fn load<'a>(self, pipeline: &'a Pipeline, cache: Option<&'a dyn ReferenceCache>) -> Result<LoadedEncoders<'a>> {
        let Encoders { tower, vae, latents, frame } = self;
        let encoder = |network, how: String| Encoder::new(cache, &pipeline.model, network, &how);
        let of_tower = |(tower, planned): (Tower, Planned)| {
            let encoder = encoder((tower.component, planned), format!("{:?} {:?}", tower.preprocess, tower.views))?;
            Ok((tower, encoder))
        };
        let of_vae = |planned| encoder((Component::Vae, planned), format!("{frame:?}"));
        let (tower, vae) = (tower.map(of_tower).transpose()?, vae.map(of_vae).transpose()?);
        Ok(LoadedEncoders { pipeline, tower, vae, latents, frame })
    }
}

/// Encoders for an executor.
pub(super) struct LoadedEncoders<'a> {
    pipeline: &'a Pipeline,
    tower: Option<(Tower, Encoder<'a>)>,
    vae: Option<Encoder<'a>>,
    latents: bool,
    frame: Frame,
}

impl LoadedEncoders<'_> {
    /// What the loss compares with; `seed` is of what is drawn for it.
    pub fn targets(&mut self, executor: &mut dyn Executor, references: &References, seed: u64) -> Result<Targets> {
        let mut targets = self.seen(executor, references)?;
        if self.latents {
            let is_drawn = self.frame.convention == Convention::Released;
            targets.latents = self.encode(executor, references, |index| is_drawn.then_some((seed, index)))?;
        }
        Ok(targets)
    }

    /// The direction of the features of a class.
    pub fn centroid(&mut self, executor: &mut dyn Executor, class: &References) -> Result<Vec<f32>> {
        Ok(self.seen(executor, class)?.centroid())
    }

    /// The means of the posteriors, `[h, w, C]` at the UNet's scale.
    pub fn means(&mut self, executor: &mut dyn Executor, references: &References) -> Result<Vec<Vec<f32>>> {
        self.encode(executor, references, |_| None)
    }

    /// Features alone.
    fn seen(&mut self, executor: &mut dyn Executor, references: &References) -> Result<Targets> {
        let Some((tower, encoder)) = &mut self.tower else { return Ok(Targets::default()) };
        let len = tower.views.len() * tower.config.projection;
        let row = |picture: &Picture| {
            encoder.row(executor, (picture, None), len, |executor, program| {
                let mut all = Vec::with_capacity(len);
                for view in tower.views {
                    let [top, left, height, width] = view.frame([picture.height, picture.width]);
                    all.extend(features(executor, program, tower, &picture.part([top, left], [height, width]))?);
                }
                Ok(all)
            })
        };
        let features = references.pictures.iter().map(row).collect::<Result<_>>()?;
        Ok(Targets { features, latents: vec![], views: tower.views })
    }

    fn encode(
        &mut self,
        executor: &mut dyn Executor,
        references: &References,
        draw: impl Fn(u64) -> Option<(u64, u64)>,
    ) -> Result<Vec<Vec<f32>>> {
        let Some(encoder) = &mut self.vae else { return Ok(vec![]) };
        let (pipeline, frame) = (self.pipeline, self.frame);
        let row = |(index, picture): (u64, &Picture)| {
            let draw = draw(index);
            encoder.row(executor, (picture, draw), frame.latents(pipeline), |executor, program| {
                latents(pipeline, executor, program, frame, picture, draw)
            })
        };
        (0..).zip(&references.pictures).map(row).collect()
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
        let features = vec![vec![3.0, 0.0], vec![0.0, 4.0]];
        let targets = Targets { features, latents: vec![vec![1.0], vec![4.0]], views: View::WHOLE };
        // The longer one counts more.
        assert_eq!(targets.centroid(), [0.6, 0.8]);
        assert_eq!(targets.mean_latents(), [2.5]);
        let second = targets.of(&[1]);
        assert_eq!((second.centroid(), second.mean_latents()), (vec![0.0, 1.0], vec![4.0]));
        assert_eq!(targets.of(&[0, 1]).centroid(), targets.centroid());
    }

    #[test]
    fn the_middle_of_a_square() {
        let image: Vec<f32> = (0..16).flat_map(|i| [i as f32; 3]).collect();
        let found: Vec<f32> = middle(&image, 4, 2).chunks(3).map(|pixel| pixel[0]).collect();
        assert_eq!(found, [5.0, 6.0, 9.0, 10.0]);
    }
}
