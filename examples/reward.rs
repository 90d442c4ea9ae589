//! A reward of one's own, how bright an image is, and the score of image files: `cargo run --release --example reward FILE…`.

use rarebit::data::images;
use rarebit::exec::cpu::Cpu;
use rarebit::program::{Builder, DType, ValueId};
use rarebit::rewards::{Reward, Scorer};

/// The mean of all pixels and colours: -1 for black, 1 for white.
pub struct Brightness;

impl Reward for Brightness {
    fn name(&self) -> &str {
        "brightness"
    }

    fn append(&self, b: &mut Builder, image: ValueId) -> ValueId {
        let shape = b.shape(image);
        let image = b.to_accumulator(image);
        let ones = b.constant(&shape, 1.0);
        let ones = b.to_accumulator(ones);
        let sum = b.dot(image, ones);
        b.affine(sum, 1.0 / shape[1..].iter().product::<usize>() as f64, 0.0)
    }
}

#[allow(dead_code)] // Tests use the reward alone.
fn main() -> rarebit::Result<()> {
    let model = rarebit::assets::shapes()?;
    for path in std::env::args().skip(1) {
        let picture = images::read(path.as_ref())?;
        let mut cpu = Cpu::<f32>::new();
        let scorer = Scorer::plan(&Brightness, &cpu, DType::F32, 1, [picture.height, picture.width])?;
        let score = scorer.load(&mut cpu, &model)?.score(&mut cpu, &[&picture.rgb], &[""])?;
        println!("{path}: {:.3}", score[0]);
    }
    Ok(())
}
