//! The command line as a user meets it: images, resuming, and one clear line for every kind of bad input.

use crate::common::command::{check_failure, fails, files, path, rarebit, succeeds, text};
use crate::common::golden::data_folder;
use crate::common::layouts::{copy_of, scale_tensors, weights_of};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const PROMPT: &str = "a red star on a dark blue background";

fn unet_file(model: &TempDir) -> PathBuf {
    weights_of(model, "unet")
}

/// Rewrites the JSON header of a safetensors file, leaving the data.
fn edit_header(file: &Path, edit: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) {
    let bytes = fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    edit(header.as_object_mut().unwrap());
    let header = serde_json::to_vec(&header).unwrap();
    let mut edited = (header.len() as u64).to_le_bytes().to_vec();
    edited.extend(&header);
    edited.extend(&bytes[8 + length..]);
    fs::write(file, edited).unwrap();
}

/// `generate` on a broken model fails and leaves the output folder empty.
#[track_caller]
fn refuses_model(model: &Path, code: i32, words: &[&str], flags: &[&str]) {
    let out = TempDir::new().unwrap();
    let (image, model) = (path(&out, "image.png"), model.display().to_string());
    let args = ["generate", PROMPT, "--steps", "2", "--quiet", "--model", &model, "--out", &image];
    fails(&[&args[..], flags].concat(), code, words);
    assert!(files(out.path()).is_empty(), "left behind: {:?}", files(out.path()));
}

#[test]
fn makes_an_image_that_says_how() {
    let out = TempDir::new().unwrap();
    let image = path(&out, "image.png");
    let stdout = succeeds(&["generate", PROMPT, "--steps", "4", "--seed", "3", "--out", &image, "--negative", "é"]);
    assert_eq!(stdout.trim(), image);
    assert_eq!(files(out.path()), ["image.png"]);
    let shown = succeeds(&["inspect", &image]);
    assert!(shown.contains("parameters: a red star") && shown.contains("Seed: 3"), "{shown}");
    let shown: serde_json::Value = serde_json::from_str(&succeeds(&["inspect", &image, "--json"])).unwrap();
    assert_eq!(shown["rarebit"]["prompt"], PROMPT);
    assert_eq!(shown["rarebit"]["negative"], "é");
    let plain = path(&out, "plain.png");
    succeeds(&["generate", PROMPT, "--steps", "4", "--seed", "3", "--out", &plain, "--negative", "é", "--no-metadata"]);
    assert_eq!(succeeds(&["inspect", &plain]).trim(), "no text chunks");
    let pixels = |path: &str| {
        let mut reader = png::Decoder::new(std::io::BufReader::new(fs::File::open(path).unwrap())).read_info().unwrap();
        let mut buffer = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut buffer).unwrap();
        buffer
    };
    assert_eq!(pixels(&image), pixels(&plain), "same seed, two runs");
    assert!(pixels(&image).iter().any(|&x| x > 50), "a black image");
}

#[test]
fn json_events() {
    let out = TempDir::new().unwrap();
    let image = path(&out, "image.png");
    let stdout = succeeds(&["generate", PROMPT, "--steps", "2", "--json", "--quiet", "--out", &image]);
    let events: Vec<serde_json::Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<&str> = events.iter().map(|e| e["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["load", "image", "done"]);
    assert!(events[0]["seconds"].as_f64().unwrap() > 0.0);
    assert!(["cold", "warm"].contains(&events[0]["state"].as_str().unwrap()));
    assert_eq!(events[1]["record"]["steps"], 2);
}

#[test]
fn noise_in_and_latents_out() {
    let out = TempDir::new().unwrap();
    let (noise, latents) = (path(&out, "noise.safetensors"), path(&out, "latents.safetensors"));
    let values: Vec<u8> = (0..2 * 4 * 256).flat_map(|i| ((i as f32 * 0.7).sin() * 1.4).to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2, 4, 16, 16], &values).unwrap();
    fs::write(&noise, safetensors::serialize([("noise", view)], None).unwrap()).unwrap();
    let image = path(&out, "i.png");
    let args =
        ["generate", PROMPT, "--steps", "3", "--quiet", "--noise", &noise, "--latents-out", &latents, "--out", &image];
    succeeds(&[&args[..], &["--count", "2"]].concat());
    assert_eq!(files(out.path()), ["i-0.png", "i-1.png", "latents.safetensors", "noise.safetensors"]);
    let bytes = fs::read(&latents).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("latents").unwrap().shape(), [2, 4, 16, 16]);
    fails(&args, 1, &["noise", "[2, 4, 16, 16]", "[1, 4, 16, 16]"]);
}

#[test]
fn prompt_files_resume() {
    let out = TempDir::new().unwrap();
    let (prompts, images) = (path(&out, "prompts.txt"), path(&out, "images"));
    fs::write(&prompts, "a red star\n\na blue circle\n").unwrap();
    let args = [
        "generate",
        "--prompts",
        &prompts,
        "--out",
        &images,
        "--steps",
        "2",
        "--count",
        "2",
        "--batch",
        "3",
        "--quiet",
    ];
    let stdout = succeeds(&args);
    assert_eq!(stdout.lines().count(), 4);
    let names = ["00001-0.png", "00001-1.png", "00003-0.png", "00003-1.png"];
    assert_eq!(files(Path::new(&images)), names);

    // Only what is missing is made again, and with the same bytes.
    let lost = Path::new(&images).join(names[2]);
    let before = fs::read(&lost).unwrap();
    fs::remove_file(&lost).unwrap();
    assert_eq!(succeeds(&args).lines().count(), 1);
    assert_eq!(fs::read(&lost).unwrap(), before);
    assert_eq!(succeeds(&args), "");

    // Images of other settings are somebody's results.
    let other = [&args[..], &["--seed", "0", "--guidance", "3"]].concat();
    fails(&other, 2, &["00001-0.png", "--overwrite"]);
    assert_eq!(succeeds(&[&other[..], &["--overwrite"]].concat()).lines().count(), 4);
}

/// Ctrl-C leaves whole images only, and the next run continues.
#[cfg(unix)]
#[test]
fn interrupt_and_continue() {
    let out = TempDir::new().unwrap();
    let (prompts, images) = (path(&out, "prompts.txt"), path(&out, "images"));
    fs::write(&prompts, "a red star\n".repeat(40)).unwrap();
    let args = ["generate", "--prompts", &prompts, "--out", &images, "--steps", "20", "--quiet"];
    let child =
        Command::new(env!("CARGO_BIN_EXE_rarebit")).args(args).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let started = std::time::Instant::now();
    while !Path::new(&images).exists() || files(Path::new(&images)).iter().filter(|f| f.ends_with(".png")).count() < 2 {
        assert!(started.elapsed().as_secs() < 120, "no image appeared");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("interrupted"), "{}", text(&output.stderr));
    let finished = files(Path::new(&images));
    assert!((2..40).contains(&finished.len()), "{}", finished.len());
    for name in &finished {
        assert!(name.ends_with(".png"), "left behind: {name}");
        succeeds(&["inspect", &Path::new(&images).join(name).display().to_string()]);
    }
    let made = succeeds(&args).lines().count();
    assert_eq!(made + finished.len(), 40);
    assert_eq!(files(Path::new(&images)).len(), 40);
}

#[test]
fn bad_flags() {
    fails(&["generate", PROMPT, "--steps", "-3"], 2, &["--steps"]);
    fails(&["generate", PROMPT, "--steps", "0"], 2, &["--steps 0"]);
    fails(&["generate", PROMPT, "--size", "100x64"], 2, &["100x64", "multiples of 8"]);
    fails(&["generate", PROMPT, "--size", "0x64"], 2, &["0x64"]);
    fails(&["generate", PROMPT, "--frobnicate"], 2, &["--frobnicate"]);
    fails(&["generate"], 2, &["PROMPT"]);
    fails(&["generate", PROMPT, "--sampler", "magic"], 2, &["magic", "euler-a"]);
    fails(&["generate", PROMPT, "--spacing", "even"], 2, &["--spacing", "even", "linspace"]);
    fails(&["generate", PROMPT, "--device", "gpu"], 2, &["--device", "cuda:N"]);
    fails(&["generate", PROMPT, "--check"], 2, &["--check", "--device cuda"]);
    fails(&["generate", PROMPT, "--hopper", "off"], 2, &["--hopper", "--device cuda"]);
    fails(&["generate", PROMPT, "--hopper", "no"], 2, &["--hopper", "off, always"]);
    fails(&["generate", PROMPT, "--device", "cuda", "--dtype", "f64"], 2, &["--dtype", "f64"]);
    fails(&["inspect", "--explain", "voodoo"], 2, &["--explain", "h200"]);
    fails(&["generate", PROMPT, "--dtype", "f16"], 2, &["--dtype"]);
    fails(&["generate", PROMPT, "--guidance", "nan"], 2, &["--guidance"]);
    fails(&["generate", PROMPT, "--count", "0"], 2, &["--count"]);
    fails(&["generate", PROMPT, "--memory-limit", "3M"], 1, &["--memory-limit is 3.0 MiB", "weights alone"]);
    fails(&["generate", PROMPT, "--memory-limit", "21M", "--size", "512x512"], 1, &["21.0 MiB", "a smaller --size"]);
    fails(&["generate", PROMPT, "--memory-limit", "21M", "--batch", "9", "--count", "9"], 1, &["--batch or --size"]);
    fails(&["generate", PROMPT, "--count", "1000000000000"], 2, &["--count", "1000000"]);
    fails(&["generate", PROMPT, "--threads", "0"], 2, &["--threads"]);
    fails(&["generate", PROMPT, "--out", "star.jpg"], 2, &["--out", ".png"]);
    fails(&["generate", PROMPT, "--out", "/dev/null"], 2, &["/dev/null", "not a folder", ".png"]);
    fails(&["inspect", "--plan", "--batch", "0"], 2, &["--batch"]);
    fails(&["generate", PROMPT, "--unet", "x.safetensors"], 1, &["x.safetensors"]);
}

/// The driver, the device or the kernels are missing: one line that says which.
#[test]
fn a_gpu_that_is_not_there() {
    let args = ["generate", PROMPT, "--device", "cuda:9999"];
    let output = Command::new(env!("CARGO_BIN_EXE_rarebit")).args(args).output().unwrap();
    assert!(matches!(output.status.code(), Some(1 | 2)), "{:?}", output.status);
    let message = text(&output.stderr);
    assert!(message.contains("cuda:9999") && message.trim_end().lines().count() == 1, "{message}");
}

/// Kernels of every op, on a GPU that need not be there.
#[test]
fn programs_are_explained() {
    let output = succeeds(&["inspect", "--explain", "h200", "--dtype", "bf16", "--steps", "4"]);
    for what in ["step: ", "on h200", "gemm_rr_", "conv2d_r_", "attention_", "group_norm", "grid", "GFLOP", "us memory"]
    {
        assert!(output.contains(what), "no '{what}' in:\n{output}");
    }
    // Hopper's own kernels: on Hopper, unless they are asked to stay off.
    let without = succeeds(&["inspect", "--explain", "h200", "--dtype", "bf16", "--steps", "4", "--hopper", "off"]);
    let elsewhere = succeeds(&["inspect", "--explain", "l4", "--dtype", "bf16", "--steps", "4", "--hopper", "always"]);
    assert!(output.contains("sm90_") && !without.contains("sm90_") && !elsewhere.contains("sm90_"));
    let report: serde_json::Value =
        serde_json::from_str(&succeeds(&["inspect", "--explain", "a100", "--json"])).unwrap();
    let programs = report["explain"].as_array().unwrap();
    let ops: usize = programs.iter().map(|program| program["ops"].as_array().unwrap().len()).sum();
    assert!(programs.len() == 4 && ops > 200, "{} programs, {ops} ops", programs.len());
    assert!(programs[2]["seconds"].as_f64().unwrap() > 0.0 && programs[2]["ops"][0]["launches"].is_array());
}

/// Another UNet over the embedded model: the second one of the `shapes` world, by its folder or the pipeline's around it.
#[test]
fn the_unet_can_be_replaced() {
    let folder = data_folder("shapes-b");
    let unets = [None, Some(folder.join("unet")), Some(folder)];
    let out = TempDir::new().unwrap();
    let [own, other, same] = unets.map(|unet| {
        let latents = path(&out, "latents.safetensors");
        let unet = unet.map(|unet| ["--unet".to_string(), unet.display().to_string()]);
        let mut args = vec!["generate", PROMPT, "--steps", "2", "--quiet", "--latents-out", &latents];
        let image = path(&out, "image.png");
        args.extend(["--out", &image]);
        args.extend(unet.iter().flatten().map(String::as_str));
        succeeds(&args);
        fs::read(&latents).unwrap()
    });
    assert_ne!(own, other);
    assert_eq!(other, same);
    assert!(succeeds(&["inspect", &path(&out, "image.png")]).contains("shapes+shapes-b"));
}

/// What an image is made of decides whether it is finished: the model's weights and the noise, not only their names.
#[test]
fn resuming_tells_models_and_noise_apart() {
    let out = TempDir::new().unwrap();
    let (prompts, images) = (path(&out, "prompts.txt"), path(&out, "images"));
    fs::write(&prompts, "a red star\n").unwrap();
    let (one, other) = (copy_of("tiny-sd1"), copy_of("tiny-sd1"));
    let mut bytes = fs::read(unet_file(&other)).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(unet_file(&other), bytes).unwrap();
    let link = |model: &TempDir| {
        let link = out.path().join("model");
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(model.path(), &link).unwrap();
        link.display().to_string()
    };
    let noise = path(&out, "noise.safetensors");
    let write_noise = |scale: f32| {
        let values: Vec<u8> = (0..256).flat_map(|i| ((i as f32).sin() * scale).to_le_bytes()).collect();
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1, 4, 8, 8], &values).unwrap();
        fs::write(&noise, safetensors::serialize([("noise", view)], None).unwrap()).unwrap();
    };
    write_noise(1.0);
    let model = link(&one);
    let args = ["generate", "--prompts", &prompts, "--out", &images, "--steps", "1", "--quiet", "--model", &model];
    let args = [&args[..], &["--noise", &noise]].concat();
    assert_eq!(succeeds(&args).lines().count(), 1);
    assert_eq!(succeeds(&args), "");
    link(&other);
    fails(&args, 2, &["00001-0.png", "other settings"]);
    link(&one);
    assert_eq!(succeeds(&args), "");
    write_noise(1.5);
    fails(&args, 2, &["00001-0.png", "other settings"]);
}

#[cfg(unix)]
#[test]
fn odd_outputs() {
    use std::os::unix::ffi::OsStrExt;
    let out = TempDir::new().unwrap();
    let odd = out.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9.png"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_rarebit"));
    let output = command.args(["generate", PROMPT, "--steps", "1", "--json", "--out"]).arg(&odd).output().unwrap();
    assert!(output.status.success() && odd.exists(), "{}", text(&output.stderr));

    let image = path(&out, "i.png");
    fails(
        &["generate", PROMPT, "--steps", "1", "--out", &image, "--latents-out", &image],
        2,
        &["i.png", "--latents-out"],
    );
    fails(&["generate", PROMPT, "--steps", "1", "--out", &image, "--latents-out", "/dev/null"], 2, &["/dev/null"]);
    fails(
        &["generate", PROMPT, "--steps", "1", "--quiet", "--guidance", "1e308", "--out", &image],
        1,
        &["step 1 of 1", "combine"],
    );
    assert!(!Path::new(&image).exists());
    fs::create_dir(path(&out, "k-1.png")).unwrap();
    fails(&["generate", PROMPT, "--count", "2", "--out", &path(&out, "k.png")], 2, &["k-1.png", "folder"]);

    // A link stays a link; what it points to is written.
    std::os::unix::fs::symlink(path(&out, "real.png"), path(&out, "link.png")).unwrap();
    fs::write(path(&out, "real.png"), "old").unwrap();
    succeeds(&["generate", PROMPT, "--steps", "1", "--quiet", "--out", &path(&out, "link.png")]);
    assert!(fs::symlink_metadata(path(&out, "link.png")).unwrap().is_symlink());
    assert!(fs::read(path(&out, "real.png")).unwrap().starts_with(b"\x89PNG"));
}

#[test]
fn bad_prompt_files() {
    let out = TempDir::new().unwrap();
    let (prompts, images) = (path(&out, "prompts.txt"), path(&out, "images"));
    fails(&["generate", "--prompts", &prompts, "--out", &images], 1, &["prompts.txt", "No such file"]);
    fs::write(&prompts, "\n \n").unwrap();
    fails(&["generate", "--prompts", &prompts, "--out", &images], 2, &["prompts.txt", "no prompt"]);
    assert_eq!(files(out.path()), ["prompts.txt"]);
}

#[test]
fn cut_tokens_are_named() {
    let out = TempDir::new().unwrap();
    let prompt = format!("{} zebra", "a red star ".repeat(10));
    let output = rarebit(&["generate", &prompt, "--steps", "1", "--quiet", "--out", &path(&out, "i.png")]);
    assert!(output.status.success());
    assert!(text(&output.stderr).contains("only 30 tokens fit"), "{}", text(&output.stderr));
}

#[test]
fn broken_models() {
    refuses_model(Path::new("/nonexistent/model"), 1, &["/nonexistent/model"], &[]);

    let model = copy_of("tiny-sd1");
    let bytes = fs::read(unet_file(&model)).unwrap();
    fs::write(unet_file(&model), &bytes[..bytes.len() / 2]).unwrap();
    refuses_model(model.path(), 1, &["unet/diffusion_pytorch_model.safetensors", "truncated"], &[]);

    let mut beyond = bytes.clone();
    beyond[..8].copy_from_slice(&50_000_000u64.to_le_bytes());
    fs::write(unet_file(&model), &beyond).unwrap();
    refuses_model(model.path(), 1, &["header", "truncated"], &[]);

    fs::write(unet_file(&model), &bytes).unwrap();
    edit_header(&unet_file(&model), |h| h["conv_in.weight"]["dtype"] = "I16".into());
    refuses_model(model.path(), 1, &["conv_in.weight", "I16"], &[]);

    fs::write(unet_file(&model), &bytes).unwrap();
    edit_header(&unet_file(&model), |h| {
        let shape = h["mid_block.resnets.0.conv1.weight"]["shape"].as_array_mut().unwrap();
        let first = shape.remove(0);
        shape.push(first);
    });
    refuses_model(model.path(), 1, &["mid_block.resnets.0.conv1.weight", "shape"], &[]);

    fs::write(unet_file(&model), &bytes).unwrap();
    edit_header(&unet_file(&model), |h| {
        let tensor = h.remove("mid_block.resnets.1.norm2.bias").unwrap();
        h.insert("renamed".into(), tensor);
    });
    refuses_model(model.path(), 1, &["mid_block.resnets.1.norm2.bias", "missing"], &[]);
}

/// Both ways to find them: the last check of latents and pixels, which has the run repeated, or a check of every op.
#[test]
fn nan_weights_are_found() {
    for flags in [&[][..], &["--check-finite"]] {
        let (unet, vae) = (copy_of("tiny-sd1"), copy_of("tiny-sd1"));
        scale_tensors(&weights_of(&unet, "unet"), &[("mid_block.resnets.0.conv1.weight", f32::NAN)]);
        let words = ["sampling step 1 of 3", "'step'", "NaN", "conv2d", "its weight mid_block.resnets.0.conv1.weight"];
        refuses_model(unet.path(), 1, &words, flags);
        scale_tensors(&weights_of(&vae, "vae"), &[("decoder.conv_out.weight", f32::INFINITY)]);
        refuses_model(vae.path(), 1, &["'decode'", "conv2d", "its weight decoder.conv_out.weight"], flags);
    }
    let vae = copy_of("tiny-sd1");
    scale_tensors(&weights_of(&vae, "vae"), &[("decoder.conv_out.weight", f32::NAN)]);
    let (out, model) = (TempDir::new().unwrap(), vae.path().display().to_string());
    let args = ["minority", PROMPT, "--steps", "4", "--iterations", "1", "--t-lo", "0.5", "--quiet", "--model", &model];
    let args = [&args[..], &["--out"]].concat();
    fails(&[&args[..], &[&path(&out, "i.png")]].concat(), 1, &["decoding the image of seed 0", "'decode'", "conv_out"]);
    assert!(files(out.path()).is_empty());
}

/// What is finite in the checkpoint and overflows on the way.
#[test]
fn overflow_is_named_with_its_step() {
    let model = copy_of("tiny-sd1");
    let conv = "mid_block.resnets.0.conv1.weight";
    scale_tensors(&weights_of(&model, "unet"), &[(conv, 1e38), ("mid_block.resnets.0.norm1.weight", 1e3)]);
    refuses_model(model.path(), 1, &["sampling step 1 of 3: program 'step'", "conv2d", conv], &[]);
    refuses_model(
        model.path(),
        1,
        &["SGMS before sampling step 1: program 'minority", "conv2d", conv],
        &["--sgms", "1"],
    );
    refuses_model(model.path(), 1, &["sampling step 1 of 3", "conv2d", conv], &["--best-of", "2"]);
}

/// The image before stays, and nothing of the one that failed.
#[test]
fn images_that_were_finished_stay() {
    let (out, model) = (TempDir::new().unwrap(), data_folder("tiny-sd1").display().to_string());
    let noise: Vec<u8> = (0..2 * 4 * 8 * 8).flat_map(|i| if i < 256 { 0.5f32 } else { 3e38 }.to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2, 4, 8, 8], &noise).unwrap();
    let inputs = TempDir::new().unwrap();
    let file = path(&inputs, "noise.safetensors");
    fs::write(&file, safetensors::serialize([("noise", view)], None).unwrap()).unwrap();
    let latents = path(&out, "latents.safetensors");
    let images = ["generate", PROMPT, "--model", &model, "--steps", "2", "--quiet", "--count", "2", "--noise", &file];
    let to = ["--out", &path(&out, "i.png"), "--latents-out", &latents];
    fails(&[&images[..], &to, &["--strict"]].concat(), 1, &["sampling step 1 of 3: program 'step'"]);
    assert_eq!(files(out.path()), ["i-0.png"]);
}

/// The VAE's type is its own: SDXL's leaves the range of f16.
#[test]
fn a_vae_is_planned_in_its_own_type() {
    let folder = data_folder("tiny-sdxl").display().to_string();
    for (flags, step, decode) in [
        (&["--device", "cuda"][..], "f16", "bf16"),
        (&["--device", "cuda", "--dtype", "bf16"], "bf16", "bf16"),
        (&["--device", "cuda", "--dtype", "f32"], "f32", "f32"),
        (&[], "f32", "f32"),
    ] {
        let output = succeeds(&[&["inspect", &folder, "--ops", "--steps", "2"], flags].concat());
        for line in [format!("program step ({step})"), format!("program decode ({decode})")] {
            assert!(output.lines().any(|output| output == line), "{flags:?}: no '{line}'");
        }
    }
    let model = copy_of("tiny-sdxl");
    let file = model.path().join("vae/config.json");
    let fixed = fs::read_to_string(&file).unwrap().replace("\"force_upcast\": true", "\"force_upcast\": false");
    fs::write(&file, fixed).unwrap();
    let output = succeeds(&["inspect", &model.path().display().to_string(), "--ops", "--device", "cuda"]);
    assert!(output.contains("program decode (f16)"), "obeys the config");
}

#[test]
fn broken_configs_and_other_files() {
    let model = copy_of("tiny-sd1");
    fs::write(model.path().join("unet/config.json"), "{\"channels\": [").unwrap();
    refuses_model(model.path(), 1, &["unet/config.json", "JSON"], &[]);
    fs::copy(data_folder("tiny-sd1").join("unet/config.json"), model.path().join("unet/config.json")).unwrap();
    fs::remove_file(model.path().join("vae/diffusion_pytorch_model.safetensors")).unwrap();
    refuses_model(model.path(), 1, &["vae"], &[]);
    let folder = TempDir::new().unwrap();
    refuses_model(folder.path(), 1, &[&folder.path().display().to_string()], &[]);

    let file = folder.path().join("lora.safetensors");
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &[0; 4]).unwrap();
    fs::write(&file, safetensors::serialize([("lora_unet_down.alpha", view)], None).unwrap()).unwrap();
    refuses_model(&file, 1, &["lora.safetensors", "LoRA"], &[]);
    fs::write(&file, "not a model at all, not even close").unwrap();
    refuses_model(&file, 1, &["lora.safetensors", "safetensors"], &[]);
}

#[test]
fn unwritable_output() {
    let out = TempDir::new().unwrap();
    fails(
        &["generate", PROMPT, "--steps", "1", "--out", &path(&out, "no/such/folder/i.png")],
        1,
        &["no/such/folder/i.png"],
    );
    fs::write(out.path().join("file"), "").unwrap();
    fails(&["generate", PROMPT, "--steps", "1", "--out", &path(&out, "file/i.png")], 1, &["file/i.png"]);
    assert_eq!(files(out.path()), ["file"]);
}

/// A file-size limit stands in for a full disk: the write fails half-way, and nothing is left behind.
#[cfg(target_os = "linux")]
#[test]
fn full_disk() {
    let out = TempDir::new().unwrap();
    let command = format!(
        "trap '' XFSZ; ulimit -f 2; exec '{}' generate '{PROMPT}' --steps 1 --size 128x128 --quiet --out '{}'",
        env!("CARGO_BIN_EXE_rarebit"),
        path(&out, "image.png")
    );
    let output = Command::new("bash").args(["-c", &command]).output().unwrap();
    check_failure(&output, 1, &["cannot write", "image.png", "File too large"]);
    assert!(files(out.path()).is_empty(), "{:?}", files(out.path()));

    // Of many, the first that fails stops the run.
    let command = command.replace("--steps 1", "--steps 1 --count 100000");
    let output = Command::new("bash").args(["-c", &command]).output().unwrap();
    check_failure(&output, 1, &["cannot write", "File too large"]);
    assert!(files(out.path()).is_empty(), "{:?}", files(out.path()));
}

#[test]
fn inspects_models() {
    let shown = succeeds(&["inspect", "--plan"]);
    for word in ["unet", "vae", "text_encoder", "parameters", "decode", "arena"] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
    let shown: serde_json::Value = serde_json::from_str(&succeeds(&["inspect", "--plan", "--json"])).unwrap();
    assert_eq!(shown["components"]["unet"]["parameters"], 4_115_876);
    assert!(shown["plan"]["total_bytes"].as_u64().unwrap() > 10_000_000);
    assert!(succeeds(&["inspect", "--ops"]).contains("attention"));
    fails(&["inspect", "/nonexistent.png"], 1, &["/nonexistent.png"]);
}
