//! The learnable token of MinorityPrompt: where it stands in a prompt, and what its embeddings begin as (Um & Ye 2025).

use super::names::Names;
use crate::exec::{Data, Executor};
use crate::pipeline::Pipeline;
use crate::sampler::{self, draw};
use crate::text::Position;
use crate::weights::{Component, Pack, Rows, Weight};
use crate::{Error, Result};

/// Rows of a text tower's embedding table that belong to one image and are optimised.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenSettings {
    /// Tokens per image.
    pub rows: usize,
    pub position: Position,
    pub init: Init,
    /// SDXL only.
    pub pool_at: PoolAt,
}

/// What the rows of a token begin as, drawn anew for every image and tower.
#[derive(Clone, Debug, PartialEq)]
pub enum Init {
    /// The row of a word that is one token.
    Word(String),
    /// The row of a token drawn from the whole vocabulary.
    RandomWord,
    /// Normal with the table's mean and `scale²` times its second moments `E[x xᵀ]`, uncentred as in the released code.
    Gaussian { scale: f64 },
    /// Normal with the table's mean and `scale²` times its variances, column by column.
    White { scale: f64 },
    /// Standard normal: what the released code's default leaves, far longer than the rows of a table.
    Unit,
    /// Per tower, `[rows, C]` for every image, or `[B · rows, C]`.
    Given(Vec<Vec<f32>>),
}

/// Which token SDXL's pooled text is read at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PoolAt {
    /// The end-of-text token, as for every other prompt.
    #[default]
    Eos,
    /// The last learnable token: the released code looks for the largest id.
    Placeholder,
}

/// Sums over the tokens behind the prefix are made in groups of so many on a GPU. With prefixes that are whole groups apart a token
/// is always in the same place of its group: a prompt has the same bits alone and beside shorter ones.
pub const GROUP: usize = 16;

/// The prompts of a batch with their tokens in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBatch {
    /// Per tower, `[B, T]`; the rows of image `b` are ids `V + b · rows ..`.
    pub ids: Vec<Vec<i32>>,
    /// Index in the last tower's tokens, per image.
    pub pool_at: Vec<i32>,
    /// Tokens that no learnable one stands before, in any image and tower; as many of them as is one more than a multiple of
    /// [`GROUP`].
    pub prefix: usize,
    /// Text of each prompt that was truncated to make room.
    pub truncated: Vec<Vec<String>>,
}

impl TokenBatch {
    /// Writes the ids that the programs of a [`VariableSpec`](super::VariableSpec) of this prefix read.
    pub fn write(&self, executor: &mut dyn Executor, tokens: usize) -> Result<()> {
        let (names, prefix) = (Names::of(self.prefix), self.prefix);
        for (tower, ids) in self.ids.iter().enumerate() {
            let part = |from: usize, to: usize| -> Vec<i32> {
                ids.chunks(tokens).flat_map(|ids| &ids[from..to]).copied().collect()
            };
            let [first, rest] = names.ids(tower);
            executor.write(&first, Data::I32(&part(0, prefix)))?;
            executor.write(&rest, Data::I32(&part(prefix, tokens)))?;
        }
        if self.ids.len() > 1 {
            let pool_at: Vec<i32> = self.pool_at.iter().map(|at| at - prefix as i32).collect();
            executor.write(&names.pool_at(), Data::I32(&pool_at))?;
        }
        Ok(())
    }
}

impl TokenSettings {
    /// `Error::Usage` where the model has no room for it.
    pub fn check(&self, pipeline: &Pipeline) -> Result<()> {
        if !pipeline.learned.is_empty() {
            let what =
                "--token: beside learned tokens no other can be learned; leave it out, or choose --variable text";
            return Err(Error::Usage(what.into()));
        }
        let most = pipeline.tokens() - 2;
        if self.rows == 0 || self.rows > most {
            return Err(Error::Usage(format!("--tokens {}: this model has room for 1 to {most}", self.rows)));
        }
        Ok(())
    }

    pub fn tokenize(&self, pipeline: &Pipeline, prompts: &[&str]) -> Result<TokenBatch> {
        self.check(pipeline)?;
        let tokens = pipeline.tokens();
        let towers = pipeline.config.text.len();
        let mut token_batch =
            TokenBatch { ids: vec![vec![]; towers], pool_at: vec![], prefix: tokens, truncated: vec![] };
        for (image, prompt) in prompts.iter().enumerate() {
            let encoded_towers = pipeline.add_special_tokens(prompt, self.rows, self.position)?;
            for (tower, (encoded, at)) in encoded_towers.iter().enumerate() {
                token_batch.prefix = token_batch.prefix.min(*at);
                let first = at + self.rows * image;
                let own = |(index, id): (usize, &i32)| match (*at..at + self.rows).contains(&index) {
                    true => id + (first - at) as i32,
                    false => *id,
                };
                token_batch.ids[tower].extend(encoded.ids.iter().enumerate().map(own));
            }
            if let Some((encoded, at)) = encoded_towers.last() {
                token_batch.pool_at.push(match self.pool_at {
                    PoolAt::Eos => encoded.eos,
                    PoolAt::Placeholder => at + self.rows - 1,
                } as i32);
                token_batch.truncated.push(encoded.truncated.clone());
            }
        }
        token_batch.prefix -= token_batch.prefix.saturating_sub(1) % GROUP;
        Ok(token_batch)
    }

    /// The rows that the images of these seeds begin with, per tower `[B · rows, C]`.
    pub fn initial(&self, pipeline: &Pipeline, seeds: &[u64]) -> Result<Vec<Vec<f32>>> {
        (0..pipeline.config.text.len()).map(|tower| self.initial_of(pipeline, tower, seeds)).collect()
    }

    fn initial_of(&self, pipeline: &Pipeline, tower: usize, seeds: &[u64]) -> Result<Vec<f32>> {
        let table = table(pipeline, tower)?;
        let width = table.columns();
        // Row `j` of an image has draws of its own, apart from those of noise.
        let draw = |row: usize| (seeds[row / self.rows], draw::TOKEN + (tower * self.rows + row % self.rows) as u64);
        let normal = |row: usize, out: &mut [f32]| {
            let (seed, draw) = draw(row);
            sampler::normal(seed, draw, out);
        };
        let rows = self.rows * seeds.len();
        let mut values = vec![0.0; rows * width];
        match &self.init {
            Init::Given(given) => {
                let fits = |given: &&Vec<f32>| [self.rows * width, values.len()].contains(&given.len());
                let Some(given) = given.get(tower).filter(fits) else {
                    let what = format!("the token's first embeddings are not [{}, {width}] for this model", self.rows);
                    return Err(Error::Usage(what));
                };
                values.chunks_mut(given.len()).for_each(|values| values.copy_from_slice(given));
            }
            Init::Word(word) => {
                let id = self.word(pipeline, tower, word, &table)?;
                values.chunks_mut(width).try_for_each(|row| table.read_f32(id, row))?;
            }
            Init::RandomWord => values.chunks_mut(width).enumerate().try_for_each(|(row, out)| {
                let (seed, draw) = draw(row);
                table.read_f32(sampler::uniform(seed, draw, table.rows()), out)
            })?,
            Init::Unit => values.chunks_mut(width).enumerate().for_each(|(row, out)| normal(row, out)),
            Init::White { scale } => {
                let Moments { mean, std } = Moments::of(&table)?;
                values.chunks_mut(width).enumerate().for_each(|(row, out)| {
                    normal(row, out);
                    for ((x, mean), std) in out.iter_mut().zip(&mean).zip(&std) {
                        *x = (mean + scale * std * f64::from(*x)) as f32;
                    }
                });
            }
            Init::Gaussian { scale } => {
                // A mixture of all rows with normal weights `w` has covariance `Xᵀ X / V` without that matrix being formed.
                let mut weights = vec![0.0; rows * table.rows()];
                weights.chunks_mut(table.rows()).enumerate().for_each(|(row, w)| normal(row, w));
                let mixed = mix(&table, &weights)?;
                let factor = scale / (table.rows() as f64).sqrt();
                let mean = Moments::of(&table)?.mean;
                for (x, (mixed, mean)) in values.iter_mut().zip(mixed.iter().zip(mean.iter().cycle())) {
                    *x = (mean + factor * mixed) as f32;
                }
            }
        }
        Ok(values)
    }

    /// The id of a word that is one token.
    fn word(&self, pipeline: &Pipeline, tower: usize, word: &str, table: &Rows<'_>) -> Result<usize> {
        let tokens = pipeline.tokenizers[tower].tokens(word)?;
        match tokens.iter().map(|token| usize::try_from(token.id)).collect::<Vec<_>>()[..] {
            [Ok(id)] if id < table.rows() => Ok(id),
            _ => {
                let count = tokens.len();
                Err(Error::Usage(format!("the first word '{word}' is {count} tokens for this model; it must be one")))
            }
        }
    }
}

/// The token embeddings of a tower.
fn table(pipeline: &Pipeline, tower: usize) -> Result<Rows<'_>> {
    let config = &pipeline.config.text[tower];
    pipeline.model.rows(&Weight {
        component: [Component::TextEncoder, Component::TextEncoder2][tower],
        keys: vec!["text_model.embeddings.token_embedding.weight".into()],
        pack: Pack::Table,
        shape: vec![config.vocab_size, config.width],
    })
}

/// The root mean square distance of an embedding's numbers from the mean of their column: the scale for steps of a token's rows.
pub fn spread(pipeline: &Pipeline, tower: usize) -> Result<f64> {
    let std = Moments::of(&table(pipeline, tower)?)?.std;
    Ok((std.iter().map(|d| d * d).sum::<f64>() / std.len() as f64).sqrt())
}

/// Means and standard deviations of a table's columns.
struct Moments {
    mean: Vec<f64>,
    std: Vec<f64>,
}

impl Moments {
    fn of(table: &Rows<'_>) -> Result<Moments> {
        let (rows, width) = (table.rows(), table.columns());
        let (mut sum, mut squares) = (vec![0.0; width], vec![0.0; width]);
        table.each_f64(|_, row| {
            for ((sum, square), x) in sum.iter_mut().zip(&mut squares).zip(row) {
                *sum += x;
                *square += x * x;
            }
        })?;
        let mean: Vec<f64> = sum.iter().map(|sum| sum / rows as f64).collect();
        let variance = squares.iter().zip(&mean).map(|(square, mean)| (square / rows as f64 - mean * mean).max(0.0));
        Ok(Moments { std: variance.map(f64::sqrt).collect(), mean })
    }
}

/// `weights [R, V]` times the table `[V, C]`.
fn mix(table: &Rows<'_>, weights: &[f32]) -> Result<Vec<f64>> {
    let (rows, width) = (table.rows(), table.columns());
    let mut mixed = vec![0.0; weights.len() / rows * width];
    table.each_f64(|n, row| {
        for (r, out) in mixed.chunks_mut(width).enumerate() {
            let w = f64::from(weights[r * rows + n]);
            out.iter_mut().zip(row).for_each(|(out, x)| *out += w * x);
        }
    })?;
    Ok(mixed)
}
