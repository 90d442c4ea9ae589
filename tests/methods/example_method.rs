//! The method of `examples/method.rs`, which stands for those that users write.

#[path = "../../examples/method.rs"]
#[allow(dead_code)]
mod example;

use example::{Interval, make};
use rarebit::methods::baselines::ddim::Ddim;

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn guidance_in_an_interval() {
    let image = |from: f64, to: f64| make(&Interval { from, to }, "a red star", 7, 4.0).unwrap();
    let plain = |guidance: f64| make(&Ddim, "a red star", 7, guidance).unwrap();
    assert!(image(0.0, 1.0).latents == plain(4.0).latents, "guidance at every step");
    // Elsewhere both branches run and one of them has weight 0.
    let off = distance(&image(2.0, 3.0).latents, &plain(1.0).latents);
    assert!(off < 1e-4, "{off}");
    let middle = image(0.2, 0.8).latents;
    assert!(distance(&middle, &plain(4.0).latents) > 0.01 && distance(&middle, &plain(1.0).latents) > 0.01);
}

#[test]
fn it_is_one_short_file() {
    let lines = include_str!("../../examples/method.rs").lines().count();
    assert!(lines <= 120, "{lines} lines");
}
