//! Lock-step with the CPU, on the emulated driver: a sound device passes with its own bits, and a kernel that does nothing is found and
//! named.

use crate::common::emulated::cuda;
use crate::common::golden::Golden;
use crate::common::minority::{job, settings};
use crate::common::recording_driver::recording;
use rarebit::exec::cuda::Settings as Emulation;
use rarebit::exec::{Executor, Lockstep};
use rarebit::methods::minority::Minority;
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::generate::{Generator, Image, Settings};
use rarebit::program::DType;
use rarebit::sampler::{self, Method, Rng};
use rarebit::{Error, Result};
use std::rc::Rc;

fn image(pipeline: &Pipeline, executor: &mut dyn Executor, dtype: DType) -> Result<Image> {
    let sampler =
        sampler::Settings { method: Method::Ddim, spacing: None, steps: 2, eta: 0.0, guidance: 4.0, cfg_pp: false };
    let settings = Settings { width: 16, height: 16, sampler, rng: Rng::Philox, dtype };
    let generator = Generator::plan(pipeline, executor, settings, 1)?;
    Ok(generator.load(executor)?.run(&[job("a red star", 1)], &mut |_| Ok(()))?.remove(0))
}

#[test]
fn a_sound_device_agrees_in_every_type() {
    for (name, dtype) in [("tiny-sd1", DType::F16), ("tiny-sd2", DType::BF16), ("tiny-sdxl", DType::F32)] {
        let pipeline = Golden::open(name).pipeline();
        let mut checked = Lockstep::new(cuda(Emulation::default().workers(2)));
        let found = image(&pipeline, &mut checked, dtype).unwrap_or_else(|error| panic!("{name} {dtype}: {error}"));
        let alone = image(&pipeline, &mut cuda(Emulation::default().workers(2)), dtype).unwrap();
        assert!(found.latents == alone.latents && found.rgb == alone.rgb, "{name}: the device's own bits");
    }
}

#[test]
fn gradients_agree_too() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    let mut checked = Lockstep::new(cuda(Emulation::default().workers(2)));
    let mut settings = settings(&pipeline, DType::F32);
    settings.schedule.iterations = 1;
    let minority = Minority::plan(&pipeline, &checked, settings, &["a red star"]).unwrap();
    minority.load(&mut checked).unwrap().run(&[job("a red star", 1)], &[1], &mut |_| Ok(())).unwrap();
}

#[test]
fn a_kernel_that_does_nothing_is_named() {
    let pipeline = Golden::open("tiny-sd1").pipeline();
    for (skipped, op) in [("group_norm", "group_norm"), ("attention", "attention"), ("gemm", "gemm")] {
        let mut checked = Lockstep::new(recording(&Rc::default(), Some(skipped)));
        match image(&pipeline, &mut checked, DType::F16) {
            Err(Error::Numeric(what)) => {
                assert!(what.contains(&format!("({op}")) && what.contains("the CPU's"), "{skipped}: {what}");
            }
            other => panic!("{skipped}: {:?}", other.map(|_| "an image").map_err(|error| error.to_string())),
        }
    }
}
