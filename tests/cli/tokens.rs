//! Learned tokens as other programs write and name them, from `--token` to the image.

use crate::common::command::{fails, path, rarebit, succeeds, text};
use crate::common::golden::data_folder;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;
use std::fs;
use tempfile::TempDir;

/// Two rows for the embedded model.
const WIDTH: usize = 128;

fn rows(rows: usize, width: usize) -> Vec<u8> {
    (0..rows * width).flat_map(|i| (0.3 * (i as f32 * 0.7).sin()).to_le_bytes()).collect()
}

fn save(file: &str, tensors: &[(&str, usize, usize)], metadata: &[(&str, &str)]) {
    let data: Vec<Vec<u8>> = tensors.iter().map(|(_, count, width)| rows(*count, *width)).collect();
    let views = tensors.iter().zip(&data).map(|((name, count, width), data)| {
        (name.to_string(), TensorView::new(Dtype::F32, vec![*count, *width], data).unwrap())
    });
    let metadata: HashMap<_, _> = metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    fs::write(file, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

struct Made {
    latents: Vec<u8>,
    stderr: String,
}

/// Two steps of a prompt with these tokens.
fn make(folder: &TempDir, prompt: &str, flags: &[&str]) -> Made {
    let (latents, image) = (path(folder, "latents"), path(folder, "i.png"));
    let args = ["generate", prompt, "--steps", "2", "--quiet", "--latents-out", &latents, "--out", &image];
    let output = rarebit(&[&args[..], flags].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    Made { latents: fs::read(latents).unwrap(), stderr: text(&output.stderr) }
}

#[test]
fn every_layout_answers_to_its_names() {
    let folder = TempDir::new().unwrap();
    let file = path(&folder, "EasyOdd.v2.safetensors");
    let plain = make(&folder, "a red star, easyodd.v2", &[]).latents;
    save(&file, &[("<it>", 2, WIDTH)], &[]);
    let expected = make(&folder, "a red star, <it>", &["--token", &file]);
    assert_eq!(expected.stderr, "");
    assert_ne!(expected.latents, plain);
    type Layout<'a> = (&'a [(&'a str, usize, usize)], &'a [(&'a str, &'a str)], &'a [&'a str]);
    let layouts: [Layout<'_>; 5] = [
        (&[("emb_params", 2, WIDTH)], &[], &["easyodd.v2", "EASYODD.V2", "<EasyOdd.v2>"]),
        (&[("string_to_param.*", 2, WIDTH)], &[("name", "oddly named")], &["easyodd.v2", "oddly  named"]),
        (&[("clip_l", 2, WIDTH)], &[], &["easyodd.v2"]),
        (&[("text_encoders_0", 2, WIDTH)], &[], &["easyodd.v2", "<s0><s1>"]),
        (&[("oddone", 2, WIDTH)], &[("name", "other")], &["oddone"]),
    ];
    for (tensors, metadata, words) in layouts {
        save(&file, tensors, metadata);
        for word in words {
            let found = make(&folder, &format!("a red star, {word}"), &["--token", &file]);
            assert_eq!(found.stderr, "", "{word}");
            assert!(found.latents == expected.latents, "{tensors:?}: {word}");
        }
    }
    // Several words in one file, each with rows of its own.
    save(&file, &[("<b>", 2, WIDTH), ("<a>", 1, WIDTH)], &[]);
    let several = make(&folder, "a red star, <b>", &["--token", &file]);
    assert_eq!(several.stderr, "");
    assert!(several.latents == expected.latents);
}

#[test]
fn a_token_that_no_prompt_names_is_told() {
    let folder = TempDir::new().unwrap();
    let file = path(&folder, "easyodd.safetensors");
    save(&file, &[("emb_params", 2, WIDTH), ("emb_params_out", 2, WIDTH)], &[]);
    let unused = "rarebit: --token easyodd: not used of the file: emb_params_out\n";
    let unnamed = "rarebit: --token easyodd: no prompt names it; write '<easyodd>' or 'easyodd'\n";
    for prompt in ["a red star", "a red easyoddity"] {
        let found = make(&folder, prompt, &["--token", &file]);
        assert_eq!(found.stderr, format!("{unused}{unnamed}"));
        assert!(found.latents == make(&folder, prompt, &[]).latents, "a part of a word is no word");
    }
    assert_eq!(make(&folder, "a red star", &["--token", &file, "--negative", "easyodd"]).stderr, unused);
    // A prompt file: one that names it is enough.
    let (prompts, images) = (path(&folder, "prompts.txt"), path(&folder, "images"));
    fs::write(&prompts, "a red star\neasyodd\n").unwrap();
    let args = ["--prompts", &prompts, "--steps", "1", "--quiet", "--token", &file, "--out", &images];
    for _ in 0..2 {
        assert_eq!(text(&rarebit(&[&["generate"], &args[..]].concat()).stderr), unused, "made or already there");
    }
    let sheet = path(&folder, "sheet.png");
    let output = rarebit(&[
        "compare",
        "a star",
        "--methods",
        "ddim",
        "--steps",
        "1",
        "--count",
        "1",
        "--quiet",
        "--token",
        &file,
        "--out",
        &sheet,
    ]);
    assert!(text(&output.stderr).contains(unnamed), "{}", text(&output.stderr));
}

#[test]
fn ordinary_words_stay_what_they_are() {
    let folder = TempDir::new().unwrap();
    let file = path(&folder, "star.safetensors");
    save(&file, &[("emb_params", 1, WIDTH)], &[]);
    let found = make(&folder, "a red star", &["--token", &file]);
    assert_eq!(found.stderr, "rarebit: --token star: no prompt names it; write '<star>'\n");
    assert!(found.latents == make(&folder, "a red star", &[]).latents);
    assert_eq!(make(&folder, "a red <star>", &["--token", &file]).stderr, "");
}

#[test]
fn what_does_not_fit_is_refused_in_one_line() {
    let folder = TempDir::new().unwrap();
    let refused = |token: &[&str], code: i32, words: &[&str]| {
        let out = path(&folder, "i.png");
        let flags: Vec<&str> = token.iter().flat_map(|file| ["--token", file]).collect();
        fails(&[&["generate", "x", "--steps", "1", "--quiet", "--out", &out], &flags[..]].concat(), code, words);
    };
    let (a, b) = (path(&folder, "a1x.safetensors"), path(&folder, "b1x.safetensors"));
    save(&a, &[("<odd>", 1, WIDTH)], &[]);
    save(&b, &[("<ODD>", 1, WIDTH)], &[]);
    refused(&[&a, &b], 2, &["token 'b1x'", "another token has the word '<ODD>'"]);
    save(&b, &[("emb_params", 1, 768)], &[]);
    refused(&[&b], 2, &["token 'b1x'", "rows of 768 numbers", "take 128"]);
    save(&b, &[("clip_l", 1, 768), ("clip_g", 1, 1280)], &[]);
    refused(&[&b], 2, &["rows of 768 and 1280 numbers", "take 128"]);
    let pickle = path(&folder, "style.pt");
    fs::write(&pickle, b"PK\x03\x04\0\0\0\0\0\0\0\0style/data.pkl").unwrap();
    refused(&[&pickle], 1, &["style.pt", "a PyTorch pickle"]);
    refused(&[&folder.path().display().to_string()], 1, &["is not a regular file"]);
    // SDXL has two towers, and its own widths are told.
    let sdxl = data_folder("tiny-sdxl").display().to_string();
    let out = path(&folder, "i.png");
    fails(&["generate", "x", "--model", &sdxl, "--token", &a, "--out", &out], 2, &["rows of 128", " and "]);
    // What an optimised token begins as is one word's.
    save(&b, &[("<a>", 1, WIDTH), ("<b>", 1, WIDTH)], &[]);
    fails(&["minority", "x", "--init-token", &b, "--out", &out], 2, &["--init-token", "holds 2 words"]);
    succeeds(&["generate", "<a> <b>", "--steps", "1", "--quiet", "--token", &b, "--out", &out]);
}
