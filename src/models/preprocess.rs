//! What a CLIP image tower is shown of an image: resized, cropped and normalised inside the program, so that gradients reach the pixels.

use crate::program::{Builder, Filter, Interpolation, ValueId};

/// How an image of any shape becomes a square.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Both sides to the square's, whatever the aspect.
    Squash,
    /// The short side to this many pixels, the aspect kept, then the middle of the image.
    Crop { short_side: usize },
}

/// Image to tower input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preprocess {
    /// Side of the tower's input.
    pub side: usize,
    pub fit: Fit,
    pub how: Interpolation,
    /// Per channel, of images in [0, 1].
    pub mean: [f64; 3],
    pub std: [f64; 3],
}

/// Statistics of the images OpenAI trained CLIP on; OpenCLIP kept them.
const MEAN: [f64; 3] = [0.48145466, 0.4578275, 0.40821073];
const STD: [f64; 3] = [0.26862954, 0.26130258, 0.27577711];

impl Preprocess {
    /// CLIP's own: bicubic with antialias to the short side, then the middle.
    pub fn clip(side: usize) -> Preprocess {
        let how = Interpolation { filter: Filter::Bicubic, antialias: true };
        Preprocess { side, fit: Fit::Crop { short_side: side }, how, mean: MEAN, std: STD }
    }

    /// As SeedSelect shows generated images to the same tower: bicubic without antialias, squashed.
    pub fn seed_select(self) -> Preprocess {
        let how = Interpolation { filter: Filter::Bicubic, antialias: false };
        Preprocess { fit: Fit::Squash, how, ..self }
    }

    /// As DPO-Diff shows generated images to the same tower: bilinear without antialias, squashed.
    pub fn dpo_diff(self) -> Preprocess {
        let how = Interpolation { filter: Filter::Bilinear, antialias: false };
        Preprocess { fit: Fit::Squash, how, ..self }
    }

    /// `image [B, H, W, 3]`, nominally in [-1, 1] and clamped to it → `[B, side, side, 3]`, normalised.
    pub fn append(&self, b: &mut Builder, image: ValueId) -> ValueId {
        let [_, height, width, 3] = b.shape(image)[..] else {
            b.fail(format!("{:?} is no RGB image [B, H, W, 3]", b.shape(image)));
            return image;
        };
        let mut x = b.clamp(image, -1.0, 1.0);
        let [tall, wide] = self.resized(height, width);
        if [tall, wide] != [height, width] {
            x = b.resize(x, tall, wide, self.how);
        }
        let side = self.side;
        if [tall, wide] != [side, side] {
            let middle = |length: usize| length.saturating_sub(side) / 2;
            x = b.crop(x, middle(tall), middle(wide), side, side);
        }
        // From [-1, 1] to [0, 1] only here: resizing keeps constants, so the two maps are one.
        let scale = self.std.map(|std| 0.5 / std);
        let shift = [0, 1, 2].map(|c| (0.5 - self.mean[c]) / self.std[c]);
        b.channel_affine(x, &scale, &shift)
    }

    /// Height and width after the resize, rounded down as torchvision does.
    fn resized(&self, height: usize, width: usize) -> [usize; 2] {
        let long = |short_side: usize, long: usize, short: usize| short_side * long / short.max(1);
        match self.fit {
            Fit::Squash => [self.side; 2],
            Fit::Crop { short_side } if height <= width => [short_side, long(short_side, width, height)],
            Fit::Crop { short_side } => [long(short_side, height, width), short_side],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::DType;

    /// The ops of one preprocessing, printed.
    fn ops(how: &Preprocess, size: [usize; 2]) -> Vec<String> {
        let mut b = Builder::new("p", DType::F32);
        let image = b.input("image", &[2, size[0], size[1], 3]);
        let x = how.append(&mut b, image);
        assert_eq!(b.shape(x), [2, how.side, how.side, 3]);
        b.output("x", x);
        let program = b.finish().unwrap();
        program.nodes.iter().map(|node| program.show_op(&node.op)).collect()
    }

    #[test]
    fn sides_are_rounded_down_and_the_middle_is_kept() {
        let clip = Preprocess::clip(224);
        assert_eq!(clip.resized(512, 768), [224, 336]);
        assert_eq!(clip.resized(500, 333), [336, 224]);
        let ops = ops(&clip, [500, 333]);
        assert!(ops[1].contains("to 336x224 bicubic antialias") && ops[2].contains("224x224 from 56, 0"), "{ops:?}");
    }

    #[test]
    fn nothing_is_resized_that_fits() {
        assert_eq!(ops(&Preprocess::clip(64), [64, 64]).len(), 2);
        assert_eq!(ops(&Preprocess::clip(64).seed_select(), [64, 128]).len(), 3);
        assert_eq!(ops(&Preprocess::clip(64), [64, 128]).len(), 3);
        assert_eq!(ops(&Preprocess::clip(64).dpo_diff(), [512, 512]).len(), 3);
    }

    #[test]
    fn only_rgb_images_are_taken() {
        let mut b = Builder::new("p", DType::F32);
        let x = b.input("x", &[1, 8, 8, 4]);
        Preprocess::clip(8).append(&mut b, x);
        assert!(b.finish().unwrap_err().to_string().contains("no RGB image"));
    }
}
