//! Changes of an image's size, and what undoes them in a gradient.

use super::OpKind;
use crate::program::infer::{Infer, Types, ensure};
use crate::program::{Program, ValueId};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    Bilinear,
    /// Cubic convolution (Keys 1981): a = -0.75 as torch has it, -0.5 with antialias.
    Bicubic,
}

/// How [`Resample::Resize`] weighs pixels: `torch.nn.functional.interpolate` with `align_corners=False`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interpolation {
    pub filter: Filter,
    /// The filter widens with the factor when it shrinks the image.
    pub antialias: bool,
}

/// Images are `[B, H, W, C]`.
#[derive(Clone, Debug, PartialEq)]
pub enum Resample {
    /// Nearest-neighbour doubling, cut to `height` × `width` (`2n` or `2n - 1` each, where a skip has an odd size).
    Nearest2x { x: ValueId, height: usize, width: usize },
    /// Sums of the pixels each input pixel became; `height`, `width` of the input.
    Nearest2xBackward { d_y: ValueId, height: usize, width: usize },
    /// To `height` × `width`, separable, half-pixel centres.
    Resize { x: ValueId, height: usize, width: usize, how: Interpolation },
    /// The transposed map; `height`, `width` of the input.
    ResizeBackward { d_y: ValueId, height: usize, width: usize, how: Interpolation },
    /// `height` × `width` pixels from `top`, `left`.
    Crop { x: ValueId, top: usize, left: usize, height: usize, width: usize },
    /// Zeros around; `height`, `width` of the input.
    CropBackward { d_y: ValueId, top: usize, left: usize, height: usize, width: usize },
}

fn doubles(to: usize, from: usize) -> bool {
    from > 0 && (to == 2 * from || to == 2 * from - 1)
}

impl OpKind for Resample {
    fn operands(&mut self) -> Vec<&mut ValueId> {
        match self {
            Resample::Nearest2x { x, .. } | Resample::Resize { x, .. } | Resample::Crop { x, .. } => vec![x],
            Resample::Nearest2xBackward { d_y, .. } => vec![d_y],
            Resample::ResizeBackward { d_y, .. } | Resample::CropBackward { d_y, .. } => vec![d_y],
        }
    }

    fn infer(&self, cx: &Infer) -> Result<Types, String> {
        let (s, height, width) = match *self {
            Resample::Nearest2x { x, height, width } => {
                let s = cx.image(x)?;
                ensure!(doubles(height, s[1]) && doubles(width, s[2]), "{s:?} does not double to {height}x{width}");
                (s, height, width)
            }
            Resample::Nearest2xBackward { d_y, height, width } => {
                let s = cx.image(d_y)?;
                ensure!(doubles(s[1], height) && doubles(s[2], width), "{height}x{width} does not double to {s:?}");
                (s, height, width)
            }
            Resample::Resize { x, height, width, .. } | Resample::ResizeBackward { d_y: x, height, width, .. } => {
                ensure!(height > 0 && width > 0, "resize to {height}x{width}");
                (cx.image(x)?, height, width)
            }
            Resample::Crop { x, top, left, height, width } => {
                let s = cx.image(x)?;
                let inside = top + height <= s[1] && left + width <= s[2] && height > 0 && width > 0;
                ensure!(inside, "{height}x{width} from {top}, {left} is not in {s:?}");
                (s, height, width)
            }
            Resample::CropBackward { d_y, top, left, height, width } => {
                let s = cx.image(d_y)?;
                ensure!(
                    top + s[1] <= height && left + s[2] <= width,
                    "{s:?} from {top}, {left} is not in {height}x{width}"
                );
                (s, height, width)
            }
        };
        Ok(cx.one(vec![s[0], height, width, s[3]]))
    }

    fn show(&self, p: &Program) -> String {
        let v = |id: &ValueId| p.show(*id);
        match self {
            Resample::Nearest2x { x, height, width } => format!("nearest_2x {} to {height}x{width}", v(x)),
            Resample::Nearest2xBackward { d_y, height, width } => {
                format!("nearest_2x_backward {} to {height}x{width}", v(d_y))
            }
            Resample::Resize { x, height, width, how } => format!("resize {} to {height}x{width} {}", v(x), how.show()),
            Resample::ResizeBackward { d_y, height, width, how } => {
                format!("resize_backward {} to {height}x{width} {}", v(d_y), how.show())
            }
            Resample::Crop { x, top, left, height, width } => {
                format!("crop {} {height}x{width} from {top}, {left}", v(x))
            }
            Resample::CropBackward { d_y, top, left, height, width } => {
                format!("crop_backward {} from {top}, {left} of {height}x{width}", v(d_y))
            }
        }
    }
}

impl Interpolation {
    fn show(self) -> String {
        format!("{:?}{}", self.filter, if self.antialias { " antialias" } else { "" }).to_lowercase()
    }
}
