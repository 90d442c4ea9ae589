//! Ops at the shapes of Stable Diffusion, each as a program of its own: what `benches/ops.rs` times on the CPU and `tools/gpu` on a GPU, in
//! turn with PyTorch.

use rarebit::exec::{Data, Executor, ProgramId};
use rarebit::plan::plan;
use rarebit::program::*;
use rarebit::weights::{Component, Model, Pack, Weight};
use serde::{Serialize, Serializer};

/// One op and its sizes. Images are `[batch, size, size, channels]`, convolutions padded by half their kernel.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Shape {
    /// `[rows, k] × [k, n] + bias`, then the activation; GEGLU halves `n`.
    Gemm {
        rows: usize,
        k: usize,
        n: usize,
        #[serde(serialize_with = "name_of")]
        activation: Activation,
    },
    /// Gradient of a product to its input.
    GemmToInput { rows: usize, k: usize, n: usize },
    /// Gradient of a product to its weight.
    GemmToWeight { rows: usize, k: usize, n: usize },
    /// With bias.
    Conv { batch: usize, size: usize, inputs: usize, outputs: usize, kernel: usize, stride: usize },
    /// Gradient of a convolution to its input, whose side is `size`.
    ConvToInput { batch: usize, size: usize, inputs: usize, outputs: usize, kernel: usize, stride: usize },
    /// Heads side by side in the channels.
    Attention { batch: usize, queries: usize, keys: usize, heads: usize, head_dim: usize },
    /// 32 groups, scale and shift, then SiLU.
    GroupNorm { batch: usize, pixels: usize, channels: usize },
}

fn name_of<S: Serializer>(activation: &Activation, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&format!("{activation:?}"))
}

impl Shape {
    pub fn family(&self) -> &'static str {
        match self {
            Shape::Gemm { .. } => "gemm",
            Shape::GemmToInput { .. } => "gemm_to_input",
            Shape::GemmToWeight { .. } => "gemm_to_weight",
            Shape::Conv { .. } => "conv2d",
            Shape::ConvToInput { .. } => "conv2d_to_input",
            Shape::Attention { .. } => "attention",
            Shape::GroupNorm { .. } => "norm",
        }
    }

    /// Its sizes.
    pub fn name(&self) -> String {
        match self {
            Shape::Gemm { rows, k, n, activation } => format!("{rows}x{k}x{n} {activation:?}"),
            Shape::GemmToInput { rows, k, n } | Shape::GemmToWeight { rows, k, n } => format!("{rows}x{k}x{n}"),
            Shape::Conv { batch, size, inputs, outputs, kernel, stride }
            | Shape::ConvToInput { batch, size, inputs, outputs, kernel, stride } => {
                format!("{batch}x{size}x{size} {inputs} to {outputs} {kernel}x{kernel}/{stride}")
            }
            Shape::Attention { batch, queries, keys, heads, head_dim } => {
                format!("{batch}x{queries}x{keys} heads {heads}x{head_dim}")
            }
            Shape::GroupNorm { batch, pixels, channels } => format!("group {batch}x{pixels}x{channels}"),
        }
    }

    /// The op on inputs of its own, `times` times over: a GPU is asked for many at once, so that what starting them takes is not measured.
    pub fn program(&self, dtype: DType, times: usize) -> Program {
        let mut b = Builder::new(self.name(), dtype);
        self.build(&mut b);
        let once = b.finish().expect("a valid program");
        once.single_op(&once.nodes[0], times)
    }

    fn build(&self, b: &mut Builder) {
        match *self {
            Shape::Gemm { rows, k, n, activation } => {
                let x = b.input("x", &[1, rows, k]);
                let pack = if activation == Activation::Geglu { Pack::Geglu } else { Pack::Linear };
                let w = weight(b, "w", pack, &[k, n]);
                let bias = Some(weight(b, "bias", Pack::Vector, &[n]));
                b.gemm(Gemm { x, w, bias, residual: None, activation });
            }
            Shape::GemmToInput { rows, k, n } => {
                let d_y = b.input("d_y", &[1, rows, n]);
                let w = weight(b, "w", Pack::Linear, &[k, n]);
                b.push(Op::GemmBackward(GemmBackward::Input { d_y, w, residual: None }));
            }
            Shape::GemmToWeight { rows, k, n } => {
                let (x, d_y) = (b.input("x", &[1, rows, k]), b.input("d_y", &[1, rows, n]));
                b.push(Op::GemmBackward(GemmBackward::Weight { x, d_y }));
            }
            Shape::Conv { batch, size, inputs, outputs, kernel, stride } => {
                let x = b.input("x", &[batch, size, size, inputs]);
                let w = weight(b, "w", Pack::Conv, &[kernel, kernel, inputs, outputs]);
                let bias = Some(weight(b, "bias", Pack::Vector, &[outputs]));
                b.conv2d(Conv2d { x, w, bias, shift: None, residual: None, stride, padding: [kernel / 2; 4] });
            }
            Shape::ConvToInput { batch, size, inputs, outputs, kernel, stride } => {
                let out = (size + kernel / 2 * 2 - kernel) / stride + 1;
                let d_y = b.input("d_y", &[batch, out, out, outputs]);
                let w = weight(b, "w", Pack::Conv, &[kernel, kernel, inputs, outputs]);
                let (size, padding) = ([size; 2], [kernel / 2; 4]);
                b.push(Op::Conv2dBackward(Conv2dBackward { d_y, w, residual: None, size, stride, padding }));
            }
            Shape::Attention { batch, queries, keys, heads, head_dim } => {
                let q = b.input("q", &[batch, queries, heads * head_dim]).into();
                let kv = b.input("kv", &[batch, keys, 2 * heads * head_dim]);
                let (k, v) = (Cols { value: kv, at: 0 }, Cols { value: kv, at: heads * head_dim });
                b.attention(Attention { q, k, v, heads, head_dim, causal: false });
            }
            Shape::GroupNorm { batch, pixels, channels } => {
                let x = b.input("x", &[batch, pixels, channels]);
                let gamma = weight(b, "gamma", Pack::Vector, &[channels]);
                b.group_norm(x, gamma, gamma, 32, 1e-5, true);
            }
        }
    }
}

fn weight(b: &mut Builder, name: &str, pack: Pack, shape: &[usize]) -> ValueId {
    let keys = vec![format!("down_blocks.{name}")];
    b.weight(Weight { component: Component::Unet, keys, pack, shape: shape.to_vec() })
}

/// Loads a program, with weights and inputs of small noise.
pub fn load(program: Program, executor: &mut dyn Executor) -> rarebit::Result<ProgramId> {
    let model = checkpoint(&program);
    let inputs: Vec<(String, usize)> = program
        .inputs
        .iter()
        .filter_map(|&id| match &program.value(id).origin {
            Origin::Input(name) => Some((name.clone(), program.value(id).len())),
            Origin::Weight(_) | Origin::Op(_) => None,
        })
        .collect();
    let planned = plan(program, |program, node| executor.workspace(program, node));
    let id = executor.load(planned, &model)?;
    inputs.iter().try_for_each(|(name, len)| executor.write(name, Data::F32(&noise(*len))))?;
    Ok(id)
}

pub fn noise(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 2_654_435_761) % 1009) as f32 / 1009.0 - 0.5).collect()
}

/// A file with the weights of a program.
pub fn checkpoint(program: &Program) -> Model {
    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("weights.safetensors");
    let mut tensors = vec![("down_blocks.none".to_string(), vec![1], noise(1))];
    for (_, weight) in program.weights() {
        let mut shape = weight.shape.clone();
        match weight.pack {
            Pack::Linear | Pack::Geglu => shape.reverse(),
            Pack::Conv => shape = vec![shape[3], shape[2], shape[0], shape[1]],
            Pack::LinearTransposed | Pack::Table | Pack::Vector => {}
        }
        let len = shape.iter().product();
        tensors.push((weight.keys[0].clone(), shape, noise(len)));
    }
    let views = tensors.iter().map(|(name, shape, values)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(values));
        (format!("model.diffusion_model.{name}"), view.expect("a tensor"))
    });
    serialize_to_file(views, None, &path).expect("a file");
    Model::open(&path).expect("a checkpoint")
}

/// Stable Diffusion 1.5 at 512², both halves of guidance, and its VAE; attention also of SD 2.1 and SDXL.
pub fn shapes() -> Vec<Shape> {
    use Activation::*;
    let gemm = |rows, k, n, activation| Shape::Gemm { rows, k, n, activation };
    let conv =
        |batch, size, inputs, outputs, kernel, stride| Shape::Conv { batch, size, inputs, outputs, kernel, stride };
    let conv_to_input =
        |batch, size, inputs, outputs, stride| Shape::ConvToInput { batch, size, inputs, outputs, kernel: 3, stride };
    let attention = |batch, queries, keys, heads, head_dim| Shape::Attention { batch, queries, keys, heads, head_dim };
    let norm = |batch, pixels, channels| Shape::GroupNorm { batch, pixels, channels };
    vec![
        attention(2, 4096, 4096, 8, 40),
        attention(2, 4096, 4096, 5, 64),
        attention(2, 4096, 4096, 10, 64),
        attention(2, 1024, 1024, 8, 80),
        attention(2, 1024, 1024, 20, 64),
        attention(2, 256, 256, 8, 160),
        attention(2, 64, 64, 8, 160),
        attention(2, 4096, 77, 8, 40),
        attention(2, 4096, 77, 10, 64),
        attention(2, 1024, 77, 8, 80),
        attention(2, 256, 77, 8, 160),
        attention(1, 4096, 4096, 1, 512),
        norm(2, 4096, 320),
        norm(2, 4096, 640),
        norm(2, 4096, 960),
        norm(2, 1024, 640),
        norm(2, 1024, 1280),
        norm(2, 1024, 1920),
        norm(2, 256, 1280),
        norm(2, 256, 2560),
        norm(2, 64, 1280),
        norm(2, 64, 2560),
        norm(1, 512 * 512, 128),
        norm(16, 4096, 320),
        conv(2, 64, 4, 320, 3, 1),
        conv(2, 64, 320, 320, 3, 1),
        conv(2, 64, 960, 320, 3, 1),
        conv(2, 64, 320, 320, 3, 2),
        conv(2, 32, 640, 640, 3, 1),
        conv(2, 16, 1280, 1280, 3, 1),
        conv(2, 16, 2560, 1280, 3, 1),
        conv(2, 8, 1280, 1280, 3, 1),
        conv(2, 32, 1920, 640, 1, 1),
        conv(2, 64, 320, 4, 3, 1),
        conv(1, 512, 128, 128, 3, 1),
        conv(1, 512, 256, 128, 3, 1),
        conv(1, 256, 512, 256, 3, 1),
        conv(1, 512, 128, 3, 3, 1),
        gemm(8192, 320, 320, None),
        gemm(8192, 320, 960, None),
        gemm(8192, 320, 2560, Geglu),
        gemm(8192, 1280, 320, None),
        gemm(2048, 640, 640, None),
        gemm(2048, 640, 5120, Geglu),
        gemm(512, 1280, 1280, None),
        gemm(512, 1280, 10240, Geglu),
        gemm(512, 5120, 1280, None),
        gemm(128, 1280, 1280, None),
        gemm(154, 768, 3072, QuickGelu),
        conv_to_input(1, 64, 320, 320, 1),
        conv_to_input(1, 64, 320, 320, 2),
        conv_to_input(1, 8, 1280, 1280, 1),
        conv_to_input(1, 512, 128, 3, 1),
        Shape::GemmToInput { rows: 4096, k: 320, n: 2560 },
        Shape::GemmToInput { rows: 4096, k: 320, n: 320 },
        Shape::GemmToWeight { rows: 1024, k: 768, n: 3072 },
    ]
}
