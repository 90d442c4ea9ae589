//! The gradient of a run whose UNet is linear in the latents, against the product of matrices that it then is.
//!
//! A UNet is made linear by its weights alone. Everything but a few of them is 0, so that residual blocks and transformers pass on what they
//! get; what is left leads from the first convolution to the last norm. In every group of that norm half of the channels hold constants
//! ±K, so large that the latents do not count in its variance, and which add to nothing in its mean; its bias is so large that SiLU is
//! the identity. The text adds to K, through the values of one cross-attention, and so each branch of the guidance has a matrix of its own.

use crate::common::golden::copied;
use crate::common::inputs::noise;
use rarebit::exec::cpu::{Cpu, Real};
use rarebit::exec::{Data, HostFloat};
use rarebit::models::config::SchedulerConfig;
use rarebit::optimize::chain::{Chain, NOISE, Options, Term};
use rarebit::optimize::objective::references::{appearance, buffer};
use rarebit::optimize::variable::Entry;
use rarebit::pipeline::Pipeline;
use rarebit::sampler::{self, LATENTS, Method, level_at};
use rarebit::weights::Model;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;
use std::collections::HashMap;
use std::fs;

/// Of the latents, in each direction; of all their numbers.
const SIDE: usize = 8;
const IN: usize = 4;
const LEN: usize = SIDE * SIDE * IN;
/// Of the UNet: channels, groups, and of the text.
const CHANNELS: usize = 32;
const GROUPS: usize = 4;
const PER_GROUP: usize = CHANNELS / GROUPS;
const WIDTH: usize = 64;
/// A power of two: multiples of f32 are f32.
const K: f64 = (1 << 27) as f64;

/// What a channel of the hidden state holds: 0 for a function of the latents, else the sign of a constant.
fn sign(channel: usize) -> f64 {
    [0.0, 0.0, 1.0, -1.0][channel % 4]
}

/// The weights that are not 0, each with its shape in the file.
struct Weights {
    /// `[CHANNELS, IN, 3, 3]`.
    conv_in: Vec<f64>,
    /// `[IN, CHANNELS, 3, 3]`.
    conv_out: Vec<f64>,
    /// `[CHANNELS, WIDTH]`, `[CHANNELS, CHANNELS]`.
    to_v: Vec<f64>,
    to_out: Vec<f64>,
    /// How much the text adds to K of each group, `[GROUPS, CHANNELS]`.
    lean: Vec<f64>,
}

fn scaled(name: &str, len: usize, scale: f64) -> Vec<f64> {
    noise(name, 0, len).into_iter().map(|x| f64::from((x * scale) as f32)).collect()
}

impl Weights {
    fn new() -> Weights {
        // A 3x3 convolution `[.., inner, 3, 3]` between the latents and the channels that hold a function of them.
        let taps = |name: &str, len: usize, scale: f64, channel: &dyn Fn(usize) -> usize| -> Vec<f64> {
            let alive = |(i, x)| if sign(channel(i)) == 0.0 { x } else { 0.0 };
            scaled(name, len, scale).into_iter().enumerate().map(alive).collect()
        };
        let len = CHANNELS * IN * 9;
        let mut conv_out = taps("conv_out", len, 0.02, &|i| i / 9 % CHANNELS);
        // The bias of the norm adds nothing: every second channel of latents has the opposite taps of one of another group, whose mean
        // is another.
        for i in (0..len).filter(|i| i / 9 % 4 == 1) {
            let (channel, rest) = (i / 9 % CHANNELS, i / (9 * CHANNELS) * 9 * CHANNELS + i % 9);
            conv_out[i] = -conv_out[rest + (channel + CHANNELS - PER_GROUP - 1) % CHANNELS * 9];
        }
        Weights {
            conv_in: taps("conv_in", len, 0.2, &|i| i / 9 / IN),
            conv_out,
            to_v: scaled("to_v", CHANNELS * WIDTH, 0.1),
            to_out: scaled("to_out", CHANNELS * CHANNELS, 0.2),
            lean: scaled("lean", GROUPS * CHANNELS, 0.2),
        }
    }

    fn of(&self, name: &str) -> Option<Vec<f64>> {
        let transformer = "down_blocks.0.attentions.1";
        let channels = |f: &dyn Fn(usize) -> f64| Some((0..CHANNELS).map(f).collect());
        match name.strip_prefix(transformer).unwrap_or(name) {
            "conv_in.weight" => Some(self.conv_in.clone()),
            "conv_in.bias" => channels(&|c| K * sign(c)),
            ".transformer_blocks.0.attn2.to_v.weight" => Some(self.to_v.clone()),
            ".transformer_blocks.0.attn2.to_out.0.weight" => Some(self.to_out.clone()),
            ".proj_out.weight" => {
                let row =
                    |c: usize| self.lean[c / PER_GROUP * CHANNELS..][..CHANNELS].iter().map(move |x| K * sign(c) * x);
                Some((0..CHANNELS).flat_map(row).collect())
            }
            // Of what comes from below and what was kept on the way down, the latter, and then the former.
            "up_blocks.1.resnets.0.conv_shortcut.weight" => Some(selection(96, 64)),
            "up_blocks.1.resnets.1.conv_shortcut.weight" | "up_blocks.1.resnets.2.conv_shortcut.weight" => {
                Some(selection(64, 0))
            }
            "conv_norm_out.weight" => channels(&|c| if sign(c) == 0.0 { K } else { 0.0 }),
            "conv_norm_out.bias" => channels(&|c| if sign(c) == 0.0 { 4096.0 } else { 0.0 }),
            "conv_out.weight" => Some(self.conv_out.clone()),
            _ => None,
        }
    }

    /// A model of the tiny kind with these weights.
    fn pipeline(&self) -> Pipeline {
        let folder = copied("tiny-sd1");
        let unet = folder.path().join("unet");
        let mut config: Value = serde_json::from_slice(&fs::read(unet.join("config.json")).unwrap()).unwrap();
        config["norm_num_groups"] = GROUPS.into();
        fs::write(unet.join("config.json"), config.to_string()).unwrap();
        let file = unet.join("diffusion_pytorch_model.safetensors");
        let bytes = fs::read(&file).unwrap();
        let mut used = 0;
        let tensors: HashMap<String, (Vec<usize>, Vec<u8>)> = SafeTensors::deserialize(&bytes)
            .unwrap()
            .iter()
            .map(|(name, tensor)| {
                let len = tensor.shape().iter().product();
                used += usize::from(self.of(name).is_some());
                let values = self.of(name).unwrap_or_else(|| vec![0.0; len]);
                assert_eq!(values.len(), len, "{name}");
                let bytes = values.iter().flat_map(|x| (*x as f32).to_le_bytes()).collect();
                (name.to_string(), (tensor.shape().to_vec(), bytes))
            })
            .collect();
        assert_eq!(used, 11, "weights of the UNet have other names");
        let views = tensors
            .iter()
            .map(|(name, (shape, bytes))| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
        fs::write(&file, safetensors::serialize(views, None).unwrap()).unwrap();
        Pipeline::open(Model::open(folder.path()).unwrap(), None).unwrap()
    }

    /// What the constants of each group are for text states `[tokens, WIDTH]`.
    fn constants(&self, context: &[f64]) -> Vec<f64> {
        let tokens = context.len() / WIDTH;
        // Keys are 0: every token counts the same.
        let mean: Vec<f64> =
            (0..WIDTH).map(|i| context[i..].iter().step_by(WIDTH).sum::<f64>() / tokens as f64).collect();
        let text = product(&self.to_out, &product(&self.to_v, &mean));
        product(&self.lean, &text).into_iter().map(|lean| K + K * lean).collect()
    }

    /// The matrix of the UNet, by columns: what a unit vector of latents adds to the prediction.
    fn matrix(&self, constants: &[f64]) -> Vec<Vec<f64>> {
        let column = |at: usize| {
            let unit: Vec<f64> = (0..LEN).map(|i| f64::from(i == at)).collect();
            let hidden = convolution(&unit, &self.conv_in, IN, CHANNELS);
            let of_group = |group: usize| {
                let own = move |c: usize| c / PER_GROUP == group;
                let sum: f64 = (0..hidden.len()).filter(|i| own(i % CHANNELS)).map(|i| hidden[i]).sum();
                let (mean, variance) = (sum / (SIDE * SIDE * PER_GROUP) as f64, constants[group].powi(2) / 2.0);
                (mean, K / variance.sqrt())
            };
            let groups: Vec<(f64, f64)> = (0..GROUPS).map(of_group).collect();
            let normed = |(i, x): (usize, &f64)| {
                let (mean, scale) = groups[i % CHANNELS / PER_GROUP];
                if sign(i % CHANNELS) == 0.0 { (x - mean) * scale } else { 0.0 }
            };
            let normed: Vec<f64> = hidden.iter().enumerate().map(normed).collect();
            convolution(&normed, &self.conv_out, CHANNELS, IN)
        };
        (0..LEN).map(column).collect()
    }
}

/// A model of these weights, text states of both branches of the guidance, the unconditional first, `[tokens, WIDTH]`, and their matrices.
struct Linear {
    pipeline: Pipeline,
    contexts: [Vec<f64>; 2],
    matrices: [Vec<Vec<f64>>; 2],
}

impl Linear {
    fn new() -> Linear {
        let weights = Weights::new();
        let pipeline = weights.pipeline();
        let contexts = [0, 1].map(|i| noise("context", i, pipeline.tokens() * WIDTH));
        let constants = [0, 1].map(|i| weights.constants(&contexts[i]));
        for (without, with) in constants[0].iter().zip(&constants[1]) {
            assert!(without.min(*with) > K / 4.0, "constants that are small: {without} {with}");
            assert!((without / with - 1.0).abs() > 1e-3, "branches that are the same: {without} {with}");
        }
        let matrices = constants.map(|constants| weights.matrix(&constants));
        Linear { pipeline, contexts, matrices }
    }
}

/// Weights `[CHANNELS, inner, 1, 1]` of a convolution that takes the channels from `first` on.
fn selection(inner: usize, first: usize) -> Vec<f64> {
    (0..CHANNELS * inner).map(|i| f64::from(i % inner == first + i / inner)).collect()
}

/// A matrix `[rows, x]` times a vector.
fn product(matrix: &[f64], x: &[f64]) -> Vec<f64> {
    matrix.chunks(x.len()).map(|row| dot(row, x)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// 3x3 with zeros around: `[SIDE, SIDE, inner]` and `[out, inner, 3, 3]` to `[SIDE, SIDE, out]`.
fn convolution(x: &[f64], weight: &[f64], inner: usize, out: usize) -> Vec<f64> {
    let mut y = vec![0.0; SIDE * SIDE * out];
    for (i, y) in y.iter_mut().enumerate() {
        let (o, column, row) = (i % out, i / out % SIDE, i / out / SIDE);
        for tap in 0..9 {
            let (r, c) = ((row + tap / 3).wrapping_sub(1), (column + tap % 3).wrapping_sub(1));
            if r < SIDE && c < SIDE {
                let at = |i: usize| x[(r * SIDE + c) * inner + i] * weight[(o * inner + i) * 9 + tap];
                *y += (0..inner).map(at).sum::<f64>();
            }
        }
    }
    y
}

/// Factors of DDIM's steps on latents and prediction, first to last (Song et al. 2021, eq. 12 with η = 0), where timesteps are `leading` with
/// an offset of 1, and the last step leads to the level of timestep 0.
fn factors(config: &SchedulerConfig, steps: usize) -> Vec<(f64, f64)> {
    let stride = 1000 / steps;
    let step = |i: usize| {
        let t = i * stride + 1;
        let [now, next] = [t, t.saturating_sub(stride)].map(|t| level_at(config, t as i64).unwrap());
        let a = next.alpha / now.alpha;
        (a, next.sigma - a * now.sigma)
    };
    (0..steps).rev().map(step).collect()
}

/// How far the gradient of a run is from the product's, and that from what it were without the UNet, relative to its length.
fn apart<T: Real + HostFloat + Into<f64>>(unet: &Linear, steps: usize, guidance: f64) -> [f64; 2] {
    let Linear { pipeline, contexts, matrices } = unet;
    let side = SIDE * pipeline.config.vae.factor();
    let sampler = sampler::Settings { method: Method::Ddim, spacing: None, steps, eta: 0.0, guidance, cfg_pp: false };
    let options =
        Options { width: side, height: side, batch: 1, dtype: T::DTYPE, sampler, image_steps: None, budget: None };
    let mut cpu = Cpu::<T>::new();
    let terms = vec![Term::at_end(appearance(1.0))];
    let chain = Chain::plan(pipeline, &cpu, &options, &[Entry::Latents], terms).unwrap();
    let mut chain = chain.load::<T>(&mut cpu).unwrap();
    // Without guidance there is but the prompt's branch.
    let (given, weights) = match guidance {
        1.0 => (&contexts[1..], vec![0.0, 1.0]),
        _ => (&contexts[..], vec![1.0 - guidance, guidance]),
    };
    chain.condition(Data::F64(&given.concat()), Data::F64(&[])).unwrap();
    let target = noise("target", 0, LEN);
    chain.write(buffer::LATENTS, Data::F64(&target)).unwrap();
    chain.write(NOISE, Data::F64(&noise("z", 0, LEN))).unwrap();

    chain.loss().unwrap();
    let mut last = vec![T::default(); LEN];
    chain.executor().read(LATENTS, T::data_mut(&mut last)).unwrap();
    chain.gradient().unwrap();
    let found: Vec<f64> = chain.read_gradient(Entry::Latents).unwrap().into_iter().map(Into::into).collect();

    let mut expected: Vec<f64> =
        last.into_iter().zip(&target).map(|(s, u)| 2.0 * (s.into() - u) / LEN as f64).collect();
    let mut straight = expected.clone();
    for (a, b) in factors(&pipeline.config.scheduler, steps).into_iter().rev() {
        let through = |i: usize| -> f64 { matrices.iter().zip(&weights).map(|(m, w)| w * dot(&m[i], &expected)).sum() };
        expected = (0..LEN).map(|i| a * expected[i] + b * through(i)).collect();
        straight.iter_mut().for_each(|g| *g *= a);
    }
    [found, straight].map(|other| {
        let difference: Vec<f64> = other.iter().zip(&expected).map(|(a, b)| a - b).collect();
        (dot(&difference, &difference) / dot(&expected, &expected)).sqrt()
    })
}

#[test]
fn the_gradient_is_the_product_of_the_steps() {
    let unet = Linear::new();
    for (steps, guidance) in [(4, 7.5), (4, 1.0), (20, 2.0)] {
        let ([double, without], [single, _]) =
            (apart::<f64>(&unet, steps, guidance), apart::<f32>(&unet, steps, guidance));
        let found = format!(
            "{steps} steps, guidance {guidance}: f64 {double:.1e}, f32 {single:.1e}, without the UNet {without:.2}"
        );
        println!("{found}");
        assert!(double < 1e-12 && single < 1e-5 && without > 0.1, "{found}");
    }
}
