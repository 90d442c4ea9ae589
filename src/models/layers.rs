//! Layers by checkpoint path: a builder that knows which network it is in and names weights as diffusers does.

use crate::program::{Activation, Builder, Conv2d, Gemm, ValueId};
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

/// Layers of one network; every method takes the layer's path in the checkpoint.
pub struct Layers<'b> {
    pub b: &'b mut Builder,
    component: Component,
}

impl<'b> Layers<'b> {
    pub fn new(b: &'b mut Builder, component: Component) -> Layers<'b> {
        Layers { b, component }
    }

    fn weight(&mut self, keys: Vec<String>, pack: Pack, shape: Vec<usize>) -> ValueId {
        self.b.weight(Weight { component: self.component, keys, pack, shape })
    }

    pub fn table(&mut self, path: &str, rows: usize, width: usize) -> ValueId {
        self.weight(vec![format!("{path}.weight")], Pack::Table, vec![rows, width])
    }

    /// `x [.., K]` → `[.., out]` (`out / 2` columns under GEGLU).
    #[track_caller]
    pub fn linear(&mut self, path: &str, x: ValueId, out: usize, options: Linear) -> ValueId {
        self.fused_linear(&[path.to_string()], x, out, options)
    }

    /// Several linear layers of one input as one product; their outputs side by side, `out` columns in all.
    #[track_caller]
    pub fn fused_linear(&mut self, paths: &[String], x: ValueId, out: usize, options: Linear) -> ValueId {
        let Linear { bias, residual, activation } = options;
        let keys = |field: &str| paths.iter().map(|path| format!("{path}.{field}")).collect::<Vec<_>>();
        let k = self.b.channels(x);
        let w = self.weight(keys("weight"), Pack::Linear, vec![k, out]);
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
        let channels = self.b.channels(x);
        let w = self.weight(vec![format!("{path}.weight")], Pack::Conv, vec![kernel, kernel, channels, out]);
        let bias = Some(self.weight(vec![format!("{path}.bias")], Pack::Vector, vec![out]));
        let mut conv = Conv2d { x, w, bias, shift: None, residual: None, stride: 1, padding: [kernel / 2; 4] };
        like(&mut conv);
        self.b.conv2d(conv)
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
