//! Programs of published sizes, which are planned and looked at, not run.

use rarebit::autodiff::{Cotangent, Request, differentiate};
use rarebit::models::config::VaeConfig;
use rarebit::models::vae;
use rarebit::program::{Builder, DType, Program};

/// Stable Diffusion's decoder, of latents `[batch, side, side, 4]`.
pub fn decode(dtype: DType, batch: usize, side: usize) -> Program {
    let config = VaeConfig {
        image_channels: 3,
        latent_channels: 4,
        channels: vec![128, 256, 512, 512],
        layers_per_block: 2,
        norm_groups: 32,
        scaling_factor: 0.18215,
        shift_factor: 0.0,
        mid_attention: true,
        quant_conv: true,
        post_quant_conv: true,
        force_upcast: false,
    };
    let mut b = Builder::new("decode", dtype);
    let latents = b.input("latents", &[batch, side, side, 4]);
    let image = vae::decode(&mut b, &config, latents);
    b.output("image", image);
    b.finish().unwrap()
}

/// Forward and backward to the latents.
pub fn gradient(program: &Program) -> Program {
    let latents = program.input("latents").unwrap();
    let objectives = program.outputs.iter().map(|(_, id)| (*id, Cotangent::Input("cotangent".into()))).collect();
    differentiate(program, &Request { objectives, leaves: vec![(latents, "gradient".into())] }, None).unwrap()
}
