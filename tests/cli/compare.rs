//! `rarebit compare`: methods side by side, what they cost and what their images are worth.

use crate::common::command::{fails, files, path, rarebit, succeeds, text};
use crate::common::golden::data_folder;
use crate::common::sheet::{find, lines, named, pixels};
use rarebit::exec::cpu::Cpu;
use rarebit::program::DType;
use rarebit::rewards::{Aesthetic, Clip, Reward, Scorer};
use rarebit::weights::Component;
use serde_json::Value;
use tempfile::TempDir;

const PROMPT: &str = "a red star on a dark blue background";

/// Two optimised steps of four, two iterations each; two candidates.
const FAST: [&str; 13] =
    ["--steps", "4", "--t-lo", "0.5", "--t-hi", "1", "--every", "1", "--iterations", "2", "--best-of", "2", "--quiet"];

fn compare(out: &TempDir, methods: &str, flags: &[&str]) -> String {
    let sheet = path(out, "sheet.png");
    succeeds(&[&["compare", PROMPT, "--methods", methods, "--out", &sheet][..], flags].concat())
}

#[test]
fn a_ledger_per_method() {
    let out = TempDir::new().unwrap();
    let flags = ["--count", "3", "--batch", "2", "--seed", "7", "--by", "rarity", "--json"];
    let events = lines(&compare(&out, "ddim,best-of,minority,cads", &[&FAST[..], &flags].concat()));
    let methods = named(&events, "method");
    let names: Vec<&str> = methods.iter().map(|event| event["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["DDIM", "best of 2", "MinorityPrompt", "CADS"]);
    // Four steps of two branches; two images; four iterations of two forwards and two backwards.
    let counts = [(8.0, 0.0), (16.0, 0.0), (16.0, 8.0), (8.0, 0.0)];
    for (event, (forwards, backwards)) in methods.iter().zip(counts) {
        let of = &event["per_image"];
        assert_eq!((&of["forwards"], &of["backwards"]), (&forwards.into(), &backwards.into()), "{event}");
        assert_eq!(of["forward_equivalents"], forwards + 2.0 * backwards);
        assert!(of["seconds"].as_f64().unwrap() > 0.0 && event["peak_bytes"].as_u64().unwrap() > 1 << 20, "{event}");
        assert!(event["agreement"].is_number() && event["images"] == 3, "{event}");
    }
    assert!(methods[2]["peak_bytes"].as_u64() > methods[0]["peak_bytes"].as_u64(), "gradients take memory");
    let recorded = |event: &Value| event["method"].as_str().unwrap().to_string();
    assert_eq!(methods.iter().map(|e| recorded(e)).collect::<Vec<_>>(), ["generate", "best-of", "minority", "cads"]);
    assert_eq!(methods[1]["options"], serde_json::json!({"n": 2, "by": "rarity"}));
    let compared = named(&events, "compared");
    assert_eq!(compared.len(), 4 * 3);
    let chosen: Vec<u64> = compared[3..6].iter().map(|event| event["chosen_seed"].as_u64().unwrap()).collect();
    assert!(chosen.iter().zip([14, 16, 18]).all(|(seed, first)| (first..first + 2).contains(seed)), "{chosen:?}");
    assert_eq!(files(out.path()), ["sheet.png"]);

    // The images are those of the commands alone.
    let (drawn, image) = (pixels(&path(&out, "sheet.png")), path(&out, "image.png"));
    let generate = ["generate", PROMPT, "--steps", "4", "--quiet", "--out", &image, "--seed"];
    let at = |flags: &[&str]| {
        succeeds(&[&generate[..], flags].concat());
        find(&drawn, &image).expect("the image is on the sheet")
    };
    let (plain, best, cads) = (at(&["8"]), at(&[&chosen[2].to_string()]), at(&["7", "--cads"]));
    assert!(plain.0 < best.0 && best.0 < cads.0 && cads.1 < plain.1 && plain.1 < best.1, "{plain:?} {best:?} {cads:?}");
}

#[test]
fn a_table_for_people() {
    let out = TempDir::new().unwrap();
    let output = compare(&out, "null-prompt,minority", &[&FAST[..10], &["--count", "1", "--quiet"]].concat());
    let words: Vec<Vec<&str>> = output.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0], [path(&out, "sheet.png")]);
    let head = "method forwards backwards equivalents s/image memory log-density impossible agreement";
    assert_eq!(words[1], head.split(' ').collect::<Vec<_>>());
    assert_eq!((words.len(), words[2][0], words[2][1]), (4, "null-prompted", "8"), "{output}");

    // Any model: without a reader only what each method costs.
    let model = data_folder("tiny-sd1").display().to_string();
    let output = compare(&out, "ddim", &["--model", &model, "--steps", "2", "--count", "1", "--quiet"]);
    assert!(output.lines().nth(1).unwrap().ends_with("memory") && output.lines().count() == 3, "{output}");
}

/// The score is that by which `generate --best-of` chooses.
#[test]
fn scores_on_request() {
    let out = TempDir::new().unwrap();
    let flags = ["--steps", "3", "--seed", "5", "--quiet", "--json"];
    let score = ["--count", "2", "--score", "denoising-loss"];
    let events = lines(&compare(&out, "ddim,cads", &[&flags[..], &score].concat()));
    let loss = |event: &Value| event["denoising_loss"].as_f64().unwrap();
    let scored: Vec<f64> = named(&events, "scored").into_iter().map(loss).collect();
    assert!(scored.len() == 4 && scored[0] != scored[1] && scored[0] != scored[2], "{scored:?}");
    for (event, own) in named(&events, "method").into_iter().zip(scored.chunks(2)) {
        assert_eq!(loss(event), (own[0] + own[1]) / 2.0);
    }
    let image = path(&out, "image.png");
    for (seed, scored) in ["5", "6"].into_iter().zip(&scored) {
        let args = ["generate", PROMPT, "--steps", "3", "--seed", seed, "--best-of", "1", "--json", "--out", &image];
        let events = lines(&succeeds(&[&args[..], &["--quiet", "--by", "denoising-loss"]].concat()));
        assert_eq!(named(&events, "chosen")[0]["score"].as_f64(), Some(*scored));
    }
}

/// Searches at equal cost, each as `generate` makes it alone and never worse than the plain image.
#[test]
fn searches_at_equal_cost() {
    let out = TempDir::new().unwrap();
    let methods = "ddim,best-of,zero-order,epsilon-greedy,evolution";
    let shared = ["--steps", "4", "--quiet", "--json", "--by", "agreement", "--search-step", "0.5"];
    let flags =
        ["--candidates", "6", "--search-population", "3", "--search-elites", "1", "--count", "2", "--batch", "2"];
    let events = lines(&compare(&out, methods, &[&shared[..], &flags].concat()));
    let methods = named(&events, "method");
    let names: Vec<&str> = methods.iter().map(|event| event["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["DDIM", "best of 6", "zero-order, 6", "epsilon-greedy, 6", "evolution, 6"]);
    for event in &methods[1..] {
        assert_eq!((&event["per_image"]["forwards"], &event["per_image"]["backwards"]), (&48.0.into(), &0.0.into()));
    }
    let agreement: Vec<f64> = methods.iter().map(|event| event["agreement"].as_f64().unwrap()).collect();
    assert!(agreement[2..].iter().all(|found| *found >= agreement[0]), "{agreement:?}");
    let options = serde_json::json!({
        "n": 6, "by": "agreement", "population": 3, "elites": 1, "crossover": 0.5, "step": 0.5
    });
    assert_eq!((&methods[4]["method"], &methods[4]["options"]), (&"evolution".into(), &options));
    assert!(named(&events, "compared")[2 * 2..].iter().all(|event| event["chosen_seed"].is_null()));

    let (drawn, image) = (pixels(&path(&out, "sheet.png")), path(&out, "image.png"));
    let generate = [&["generate", PROMPT, "--seed", "1", "--out", &image][..], &shared].concat();
    let evolution = ["--evolution", "6", "--search-population", "3", "--search-elites", "1"];
    for flags in [&["--zero-order", "6"][..], &["--epsilon-greedy", "6"], &evolution] {
        let events = lines(&succeeds(&[&generate[..], flags].concat()));
        let chosen = named(&events, "chosen");
        assert!(chosen.len() == 1 && chosen[0]["seed"].is_null() && chosen[0]["score"].is_number(), "{chosen:?}");
        assert!(chosen[0]["candidate"].as_u64().unwrap() < 6);
        find(&drawn, &image).expect("the image is on the sheet");
    }
    let record: Value = serde_json::from_str(&succeeds(&["inspect", &image, "--json"])).unwrap();
    let record = &record["rarebit"];
    assert_eq!((&record["method"], &record["options"], &record["seed"]), (&"evolution".into(), &options, &1.into()));
}

/// Rewards: the numbers that a library's scorer gives the same images.
#[test]
fn rewards_on_request() {
    let out = TempDir::new().unwrap();
    let flags = ["--steps", "10", "--count", "1", "--score", "clip,aesthetic", "--quiet", "--json"];
    let events = lines(&compare(&out, "ddim", &flags));
    let image = path(&out, "image.png");
    succeeds(&["generate", PROMPT, "--steps", "10", "--quiet", "--out", &image]);
    let model = rarebit::assets::shapes().unwrap();
    let (clip, aesthetic) =
        (Clip::new(&model, Component::Clip).unwrap(), Aesthetic::new(&model, Component::Clip).unwrap());
    for (name, reward) in [("clip", &clip as &dyn Reward), ("aesthetic", &aesthetic)] {
        let mut cpu = Cpu::<f32>::new();
        let scorer = Scorer::plan(reward, &cpu, DType::F32, 1, [64, 64]).unwrap().load(&mut cpu, &model).unwrap();
        let expected = scorer.score(&mut cpu, &[&pixels(&image).1], &[PROMPT]).unwrap()[0];
        assert_eq!(named(&events, "method")[0][name].as_f64(), Some(expected), "{name}");
    }
}

#[test]
fn what_cannot_be_compared() {
    let out = TempDir::new().unwrap();
    let refuses = |flags: &[&str], code: i32, words: &[&str]| {
        let sheet = path(&out, "sheet.png");
        fails(&[&["compare", PROMPT, "--quiet", "--out", &sheet], flags].concat(), code, words);
        assert!(files(out.path()).is_empty(), "left behind: {:?}", files(out.path()));
    };
    refuses(
        &["--methods", "ddim,magic"],
        2,
        &["'magic'", "ddim, null-prompt, cads, sgms, best-of, zero-order, epsilon-greedy, evolution, minority"],
    );
    refuses(&["--methods", "ddim", "--cads-scale", "0.1"], 2, &["--cads-scale", "'cads' is not among --methods"]);
    refuses(&["--methods", "ddim,cads", "--tokens", "2"], 2, &["--tokens", "'minority' is not among --methods"]);
    refuses(
        &["--methods", "ddim,best-of", "--search-step", "0.2"],
        2,
        &["--search-step", "'zero-order'", "'evolution'"],
    );
    refuses(&["--methods", "ddim", "--by", "rarity"], 2, &["--by", "'best-of'", "'evolution' is not among --methods"]);
    refuses(&["--methods", "best-of", "--best-of", "2", "--candidates", "3"], 2, &["--best-of", "--candidates"]);
    refuses(&["--methods", "evolution", "--search-elites", "8"], 2, &["8 elites in a population of 8"]);
    refuses(&["--methods", "minority", "--objective", "repulsion"], 2, &["--objective repulsion", "--batch 2"]);
    let model = data_folder("tiny-sd1").display().to_string();
    refuses(&["--model", &model, "--score", "clip"], 2, &["--score clip", "tiny-sd1 has no CLIP"]);
    refuses(&["--memory-limit", "22M"], 1, &["--memory-limit is 22.0 MiB"]);
    refuses(&["--count", "300"], 2, &["--out", "1200 images", "1024"]);
    fails(&["compare", PROMPT, "--out", &path(&out, "sheet.jpg")], 2, &["--out", ".png"]);
    let help = text(&rarebit(&["compare", "--help"]).stdout);
    for what in
        ["--methods", "ddim,best-of,minority,cads", "--sgms-every", "--null-prompt", "--iterations", "two forwards"]
    {
        assert!(help.contains(what), "no {what} in {help}");
    }
    assert!(!help.contains("--cads "), "--methods says it: {help}");
}
