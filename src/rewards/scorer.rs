//! A reward on its own: scores of images that are there already.

use super::Reward;
use crate::exec::{Data, DataMut, Executor, ProgramId};
use crate::plan::{Planned, plan};
use crate::program::{Builder, DType, Program};
use crate::weights::Model;
use crate::{Error, Result};

/// The programs of a reward for images of one size, planned but not loaded.
pub struct Scorer<'r> {
    reward: &'r dyn Reward,
    buffers: Buffers,
    prepare: Option<Planned>,
    score: Planned,
}

/// What is read and written by name, and how much of it.
struct Buffers {
    image: String,
    score: String,
    batch: usize,
    /// Bytes of an image.
    image_len: usize,
}

impl<'r> Scorer<'r> {
    /// `batch` images of `[height, width]` pixels at a time.
    pub fn plan(
        reward: &'r dyn Reward,
        executor: &dyn Executor,
        dtype: DType,
        batch: usize,
        [height, width]: [usize; 2],
    ) -> Result<Scorer<'r>> {
        let name = reward.name();
        let buffers = Buffers {
            image: format!("{name}.image {batch}x{height}x{width}"),
            score: format!("{name}.score {batch}"),
            batch,
            image_len: height * width * 3,
        };
        let mut b = Builder::new(format!("{name} score"), dtype);
        let image = b.accumulator_input(&buffers.image, &[batch, height, width, 3]);
        let score = reward.append(&mut b, image);
        if b.shape(score) != [batch] {
            b.fail(format!("the reward '{name}' gives {:?}, a number per image is [{batch}]", b.shape(score)));
        }
        b.output(&buffers.score, score);
        let plan = |program: Program| plan(program, |program, node| executor.workspace(program, node));
        Ok(Scorer { reward, buffers, prepare: reward.prepare(dtype, batch)?.map(plan), score: plan(b.finish()?) })
    }

    /// Every planned program.
    pub fn programs(&self) -> Vec<&Planned> {
        self.prepare.iter().chain([&self.score]).collect()
    }

    /// Loads programs and weights; `model` is the one that the reward was made from.
    pub fn load(self, executor: &mut dyn Executor, model: &Model) -> Result<LoadedScorer<'r>> {
        let Scorer { reward, buffers, prepare, score } = self;
        let prepare = prepare.map(|planned| executor.load(planned, model)).transpose()?;
        Ok(LoadedScorer { reward, buffers, prepare, score: executor.load(score, model)? })
    }
}

/// A loaded reward. It borrows the executor for a call only, so that others use it in between.
pub struct LoadedScorer<'r> {
    reward: &'r dyn Reward,
    buffers: Buffers,
    prepare: Option<ProgramId>,
    score: ProgramId,
}

impl LoadedScorer<'_> {
    /// A score per image, for any number of images `[H, W, 3]` of 8 bits and a prompt each, on the executor it was loaded on.
    ///
    /// `Error::Usage` where an image has another size than planned; `Error::NotFinite` where a score is none.
    pub fn score(&self, executor: &mut dyn Executor, images: &[&[u8]], prompts: &[&str]) -> Result<Vec<f64>> {
        let Buffers { image, score, batch, image_len } = &self.buffers;
        let name = self.reward.name();
        if images.len() != prompts.len() {
            return Err(Error::Usage(format!("{} images and {} prompts to score", images.len(), prompts.len())));
        }
        if let Some(other) = images.iter().find(|image| image.len() != *image_len) {
            let found = other.len();
            return Err(Error::Usage(format!("an image of {found} bytes, '{name}' was planned for {image_len}")));
        }
        let mut scores = Vec::with_capacity(images.len());
        for (images, prompts) in images.chunks(*batch).zip(prompts.chunks(*batch)) {
            // The last one stands in for those that a batch lacks; no image knows of its neighbours.
            let all = |i: usize| i.min(images.len() - 1);
            let prompts: Vec<&str> = (0..*batch).map(|i| prompts[all(i)]).collect();
            let pixels = (0..*batch).flat_map(|i| images[all(i)]).map(|&x| f32::from(x) / 127.5 - 1.0);
            self.reward.write(executor, &prompts)?;
            if let Some(prepare) = self.prepare {
                executor.run(prepare)?;
            }
            executor.write(image, Data::F32(&pixels.collect::<Vec<f32>>()))?;
            executor.run(self.score)?;
            let mut found = vec![0.0; *batch];
            executor.read(score, DataMut::F64(&mut found))?;
            scores.extend_from_slice(&found[..images.len()]);
        }
        match scores.iter().all(|score| score.is_finite()) {
            true => Ok(scores),
            false => Err(Error::NotFinite(format!("the score of '{name}'"))),
        }
    }
}
