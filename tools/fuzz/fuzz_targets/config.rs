//! Component configurations: any JSON gives a configuration whose programs can be built, or an error.
#![no_main]

use rarebit::models::parse::{self, Fields};
use rarebit::models::unet::Unet;
use rarebit::models::clip_text::{self, Prompt};
use rarebit::models::vae;
use rarebit::program::{Builder, DType};
use std::path::{Path, PathBuf};

/// The first byte chooses the component, the rest is the file.
fn check(bytes: &[u8]) -> Option<()> {
    let (&kind, bytes) = bytes.split_first()?;
    let json = rarebit::input::parse_json(Path::new("config.json"), bytes).ok()?;
    let fields = Fields::new(PathBuf::from("config.json"), &json).ok()?;
    let mut b = Builder::new("fuzz", DType::F32);
    match kind % 4 {
        0 => {
            let config = parse::unet(&fields).ok()?;
            if config.channels.len() > 6 || config.layers_per_block > 4 || config.mid_transformers > 20 {
                return None; // Large programs only cost time.
            }
            let unet = Unet::new(&config);
            let latents = b.input("latents", &[1, 64, 64, config.in_channels]);
            let kv = b.input("kv", &[1, 7, unet.kv_width()]);
            let time = b.input("time", &[1, unet.time_width()]);
            let out = unet.forward(&mut b, latents, kv, time);
            b.output("out", out);
        }
        1 => {
            let config = parse::vae(&fields, false).ok()?;
            if config.channels.len() > 6 || config.layers_per_block > 4 {
                return None;
            }
            let latents = b.input("latents", &[1, 8, 8, config.latent_channels]);
            let out = vae::decode(&mut b, &config, latents);
            b.output("out", out);
        }
        2 => {
            let config = parse::text(&fields).ok()?;
            if config.layers > 40 {
                return None;
            }
            let ids = b.input_i32("ids", &[1, config.max_positions.min(77)]);
            let (towers, prompt) = ([config], Prompt { ids: &[ids], ..Prompt::default() });
            let states = clip_text::encode(&mut b, &towers, &prompt);
            b.output("out", states.context);
        }
        _ => {
            parse::scheduler(&fields, kind & 4 == 0).ok()?;
            return None;
        }
    }
    b.finish().ok().map(|program| drop(program.to_string()))
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    check(bytes);
});
