//! Layers by checkpoint path: a builder that knows which network it is in and names weights as diffusers does.

use crate::program::{Activation, Attention, Builder, Cols, Conv2d, Gemm, GemmBackward, Op, ValueId};
use crate::weights::{Component, Pack, Weight};

/// What a linear layer does besides the product.
#[derive(Clone, Copy)]
pub struct Linear {
    pub bias: bool,
    pub residual: Option<ValueId>,
    pub activation: Activation,
}

impl Default for Linear {
    fn default() -> Linear {
        Linear { bias: true, residual: None, activation: Activation::None }
    }
}

/// Where a network's weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// The checkpoint; packed once, when the program is loaded.
    Frozen,
    /// Named buffers ([`Weight::name`]) in the weights' shapes, which a gradient can be taken of and an update written to.
    Trainable,
}

/// Layers of one network; every method takes the layer's path in the checkpoint.
pub struct Layers<'b> {
    pub b: &'b mut Builder,
    component: Component,
    weights: Weights,
}

impl<'b> Layers<'b> {
    pub fn new(b: &'b mut Builder, component: Component) -> Layers<'b> {
        Layers::with(b, component, Weights::Frozen)
    }

    pub fn with(b: &'b mut Builder, component: Component, weights: Weights) -> Layers<'b> {
        Layers { b, component, weights }
    }

    fn weight(&mut self, keys: Vec<String>, pack: Pack, shape: Vec<usize>) -> ValueId {
        let weight = Weight { component: self.component, keys, pack, shape };
        match self.weights {
            Weights::Frozen => self.b.weight(weight),
            Weights::Trainable => self.b.parameter(&weight),
        }
    }

    pub fn table(&mut self, path: &str, rows: usize, width: usize) -> ValueId {
        self.weight(vec![format!("{path}.weight")], Pack::Table, vec![rows, width])
    }

    /// A bare parameter.
    pub fn vector(&mut self, key: &str, width: usize) -> ValueId {
        self.weight(vec![key.to_string()], Pack::Vector, vec![width])
    }

    /// `x [.., C]` times the transposed table of an embedding, `[rows, C]` → `[.., rows]`.
    #[track_caller]
    pub fn tied(&mut self, path: &str, x: ValueId, rows: usize) -> ValueId {
        let width = self.b.channels(x);
        match self.weights {
            // A second value: products want it packed, lookups whole.
            Weights::Frozen => {
                let w = self.weight(vec![format!("{path}.weight")], Pack::Linear, vec![width, rows]);
                self.b.gemm(Gemm { x, w, bias: None, residual: None, activation: Activation::None })
            }
            // One value, so that both gradients meet in it.
            Weights::Trainable => {
                let w = self.table(path, rows, width);
                self.b.push(Op::GemmBackward(GemmBackward::Input { d_y: x, w, residual: None }))[0]
            }
        }
    }

    /// `x [.., K]` → `[.., out]` (`out / 2` columns under GEGLU).
    #[track_caller]
    pub fn linear(&mut self, path: &str, x: ValueId, out: usize, options: Linear) -> ValueId {
        self.fused_linear(&[path.to_string()], x, out, options)
    }

    /// Several linear layers of one input as one product; their outputs side by side, `out` columns in all.
    #[track_caller]
    pub fn fused_linear(&mut self, paths: &[String], x: ValueId, out: usize, options: Linear) -> ValueId {
        let pack = if options.activation == Activation::Geglu { Pack::Geglu } else { Pack::Linear };
        self.product(paths, pack, x, out, options)
    }

    /// A linear layer stored `[in, out]` (GPT-2's `Conv1D`).
    #[track_caller]
    pub fn conv1d(&mut self, path: &str, x: ValueId, out: usize, options: Linear) -> ValueId {
        self.product(&[path.to_string()], Pack::LinearTransposed, x, out, options)
    }

    #[track_caller]
    fn product(&mut self, paths: &[String], pack: Pack, x: ValueId, out: usize, options: Linear) -> ValueId {
        let Linear { bias, residual, activation } = options;
        let keys = |field: &str| paths.iter().map(|path| format!("{path}.{field}")).collect::<Vec<_>>();
        let x = self.b.to_storage(x);
        let k = self.b.channels(x);
        let w = self.weight(keys("weight"), pack, vec![k, out]);
        let bias = bias.then(|| self.weight(keys("bias"), Pack::Vector, vec![out]));
        self.b.gemm(Gemm { x, w, bias, residual, activation })
    }

    /// Square convolution with bias; `like` fills in stride, padding, shift and residual.
    #[track_caller]
    pub fn conv(
        &mut self,
        path: &str,
        x: ValueId,
        out: usize,
        kernel: usize,
        like: impl FnOnce(&mut Conv2d),
    ) -> ValueId {
        let x = self.b.to_storage(x);
        let channels = self.b.channels(x);
        let w = self.weight(vec![format!("{path}.weight")], Pack::Conv, vec![kernel, kernel, channels, out]);
        let bias = Some(self.weight(vec![format!("{path}.bias")], Pack::Vector, vec![out]));
        let mut conv = Conv2d { x, w, bias, shift: None, residual: None, stride: 1, padding: [kernel / 2; 4] };
        like(&mut conv);
        self.b.conv2d(conv)
    }

    /// `x [B, H, W, I]` cut into squares of `side` pixels, each one linear layer without bias: `[B, H / side, W / side, out]`.
    #[track_caller]
    pub fn patches(&mut self, path: &str, x: ValueId, out: usize, side: usize) -> ValueId {
        let x = self.b.to_storage(x);
        let shape = vec![side, side, self.b.channels(x), out];
        let w = self.weight(vec![format!("{path}.weight")], Pack::Conv, shape);
        self.b.conv2d(Conv2d { x, w, bias: None, shift: None, residual: None, stride: side, padding: [0; 4] })
    }

    #[track_caller]
    pub fn group_norm(&mut self, path: &str, x: ValueId, groups: usize, eps: f64, silu: bool) -> ValueId {
        let (gamma, beta) = self.affine(path, x);
        self.b.group_norm(x, gamma, beta, groups, eps, silu)
    }

    #[track_caller]
    pub fn layer_norm(&mut self, path: &str, x: ValueId, eps: f64) -> ValueId {
        let (gamma, beta) = self.affine(path, x);
        self.b.layer_norm(x, gamma, beta, eps)
    }

    fn affine(&mut self, path: &str, x: ValueId) -> (ValueId, ValueId) {
        let c = self.b.channels(x);
        let gamma = self.weight(vec![format!("{path}.weight")], Pack::Vector, vec![c]);
        let beta = self.weight(vec![format!("{path}.bias")], Pack::Vector, vec![c]);
        (gamma, beta)
    }
}

/// Sizes of a residual block.
pub struct ResnetNorm {
    pub groups: usize,
    pub eps: f64,
}

impl Layers<'_> {
    /// GN-SiLU-conv (+ time shift), GN-SiLU-conv, plus the input (`ResnetBlock2D`).
    #[track_caller]
    pub fn resnet(
        &mut self,
        path: &str,
        x: ValueId,
        out: usize,
        norm: &ResnetNorm,
        time: Option<crate::program::Cols>,
    ) -> ValueId {
        let ResnetNorm { groups, eps } = *norm;
        // The shortcut comes first so that the input dies at the first norm, which then runs in place.
        let input =
            if self.b.channels(x) == out { x } else { self.conv(&format!("{path}.conv_shortcut"), x, out, 1, |_| {}) };
        let h = self.group_norm(&format!("{path}.norm1"), x, groups, eps, true);
        let h = self.conv(&format!("{path}.conv1"), h, out, 3, |c| c.shift = time);
        let h = self.group_norm(&format!("{path}.norm2"), h, groups, eps, true);
        self.conv(&format!("{path}.conv2"), h, out, 3, |c| c.residual = Some(input))
    }
}

/// A layer of a CLIP tower.
pub struct ClipLayer {
    pub heads: usize,
    pub mlp_width: usize,
    pub activation: Activation,
    pub norm_eps: f64,
    pub causal: bool,
}

impl Layers<'_> {
    /// Attention and MLP, each normalised before and added to the residual stream (`CLIPEncoderLayer`). Its tokens also attend to
    /// `past [B, P, 2C]`, the keys and values of tokens before them. Also gives their own keys and values, `2C` columns.
    #[track_caller]
    pub fn clip_layer(&mut self, path: &str, x: ValueId, layer: &ClipLayer, past: Option<ValueId>) -> (ValueId, Cols) {
        let &ClipLayer { heads, mlp_width, activation, norm_eps: eps, causal } = layer;
        let width = self.b.channels(x);
        let add_to = |x| Linear { residual: Some(x), ..Linear::default() };
        let h = self.layer_norm(&format!("{path}.layer_norm1"), x, eps);
        let paths = ["q_proj", "k_proj", "v_proj"].map(|p| format!("{path}.self_attn.{p}"));
        let qkv = self.fused_linear(&paths, h, 3 * width, Linear::default());
        let own = Cols { value: qkv, at: width };
        let kv = past.map_or(own, |past| {
            let own = self.b.columns(own, 2 * width);
            self.b.concat_tokens(past, own).into()
        });
        let [k, v] = [0, width].map(|at| Cols { at: kv.at + at, ..kv });
        let h = self.b.attention(Attention { q: qkv.into(), k, v, heads, head_dim: width / heads, causal });
        let x = self.linear(&format!("{path}.self_attn.out_proj"), h, width, add_to(x));

        let h = self.layer_norm(&format!("{path}.layer_norm2"), x, eps);
        let h = self.linear(&format!("{path}.mlp.fc1"), h, mlp_width, Linear { activation, ..Linear::default() });
        (self.linear(&format!("{path}.mlp.fc2"), h, width, add_to(x)), own)
    }
}
