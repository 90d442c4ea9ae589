//! Settings that a model recommends: used where no flag says otherwise, and said to be.

use crate::common::command::{fails, path, succeeds};
use crate::common::layouts::copy_of;
use crate::common::minority::images;
use rarebit::methods::minority::{Recommended, Settings};
use rarebit::optimize::variable::Variable;
use rarebit::optimize::variable::token::Init;
use rarebit::pipeline::Pipeline;
use rarebit::program::DType;
use rarebit::weights::Model;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

const PROMPT: &str = "a red star";

fn recommend(model: &TempDir, json: &str) {
    fs::write(model.path().join("recommended.json"), json).unwrap();
}

#[test]
fn without_flags_the_embedded_model_uses_what_it_recommends() {
    let out = TempDir::new().unwrap();
    let image = |name: &str, flags: &[&str]| {
        let image = path(&out, name);
        succeeds(&[&["minority", PROMPT, "--steps", "12", "--quiet", "--out", &image][..], flags].concat());
        fs::read(image).unwrap()
    };
    let pipeline = Pipeline::open(rarebit::assets::shapes().unwrap(), None).unwrap();
    let found = Recommended::of(&pipeline).unwrap();
    let (tokens, lr) = (found.tokens.unwrap().to_string(), found.lr.unwrap().to_string());
    let (t_lo, t_hi) = (found.t_lo.unwrap().to_string(), found.t_hi.unwrap().to_string());
    let (every, iterations) = (found.every.unwrap().to_string(), found.iterations.unwrap().to_string());
    let Some(Init::Word(word)) = found.init else { panic!("a word") };
    let init = format!("word:{word}");
    let flags = [
        ["--tokens", &tokens],
        ["--lr", &lr],
        ["--t-lo", &t_lo],
        ["--t-hi", &t_hi],
        ["--every", &every],
        ["--iterations", &iterations],
        ["--init", &init],
    ]
    .concat();
    let usual = image("usual.png", &[]);
    assert!(usual == image("flags.png", &flags), "pixels and records");
    assert!(usual != image("fewer.png", &["--iterations", "1"]), "a flag counts more");

    let settings = Settings::recommended(&pipeline, images(&pipeline, 12, 7.5, DType::F32)).unwrap();
    let Variable::Token(token) = &settings.variable else { panic!("a token") };
    assert_eq!((Some(token.rows), Some(settings.schedule.lr)), (found.tokens, found.lr));
    assert_eq!(Some(settings.schedule.iterations), found.iterations);
}

#[test]
fn where_each_value_comes_from() {
    let model = copy_of("tiny-sd1");
    recommend(&model, r#"{"minority": {"tokens": 3, "lr": 0.25, "t_lo": 0.5}}"#);
    let folder = model.path().display().to_string();
    let explained = |flags: &[&str]| {
        succeeds(&[&["minority", PROMPT, "--model", &folder, "--steps", "4", "--explain"][..], flags].concat())
    };
    let said = |explained: &str, name: &str| {
        let words = |line: &str| line.split_whitespace().map(str::to_string).collect::<Vec<_>>();
        let line = explained.lines().map(words).find(|words| words[0] == name);
        line.unwrap_or_else(|| panic!("no {name} in {explained}"))[1..].join(" ")
    };
    let usual = explained(&["--lr", "0.5"]);
    for (name, what) in [
        ("tokens", "3 recommended.json"),
        ("lr", "5.000e-1 flag"),
        ("t-lo", "0.5 recommended.json"),
        ("every", "1 default"),
        ("variable", "token default"),
        ("guided", "false default"),
    ] {
        assert_eq!(said(&usual, name), what);
    }
    // The released code has defaults of its own, and all text states other units.
    let released = explained(&["--mode", "released"]);
    assert_eq!(said(&released, "tokens"), "1 default of the released code");
    assert_eq!(said(&released, "lr"), "1.000e-2 default of the released code");
    assert_eq!(said(&explained(&["--variable", "text"]), "t-lo"), "0.9 default");
}

#[test]
fn mistakes_name_file_and_key() {
    let model = copy_of("tiny-sd1");
    let folder = model.path().display().to_string();
    let out = TempDir::new().unwrap();
    let minority = ["minority", PROMPT, "--model", &folder, "--steps", "2", "--quiet", "--out", &path(&out, "i.png")];
    for (json, words) in [
        (r#"{"minority": {"iteration": 3}}"#, ["minority.iteration", "no such setting"]),
        (r#"{"minority": {"lr": "high"}}"#, ["minority.lr", "must be a number"]),
        (r#"{"minority": 3}"#, ["minority", "an object"]),
        (r#"{"sampling": {}}"#, ["'sampling'", "no method"]),
        (r#"{"minority": "#, ["EOF", "line 1"]),
    ] {
        recommend(&model, json);
        fails(&minority, 1, &[&["recommended.json"][..], &words].concat());
    }
    let pipeline = |folder: &Path| Pipeline::open(Model::open(folder).unwrap(), None).unwrap();
    recommend(&model, r#"{"minority": {"tokens": -1}}"#);
    assert!(Recommended::of(&pipeline(model.path())).is_err());
    fs::remove_file(model.path().join("recommended.json")).unwrap();
    assert_eq!(Recommended::of(&pipeline(model.path())).unwrap(), Recommended::default());
}
