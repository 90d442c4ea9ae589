//! The methods as a user meets them: `minority` and the rivals of `generate`, on the embedded model.

use crate::common::command::{fails, files, path, rarebit, succeeds, text};
use crate::common::sheet::{find, lines, named, pixels};
use serde_json::Value;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

const PROMPT: &str = "a red star on a dark blue background";

/// Two optimised steps of four, two iterations each: fast, and everything of the method happens.
const FAST: [&str; 11] =
    ["--steps", "4", "--t-lo", "0.5", "--t-hi", "1", "--every", "1", "--iterations", "2", "--quiet"];

/// The image that `command` with these flags makes.
#[track_caller]
fn image_of(out: &TempDir, command: &str, flags: &[&str]) -> Vec<u8> {
    let image = path(out, "image.png");
    succeeds(&[&[command, PROMPT, "--steps", "4", "--quiet", "--out", &image], flags].concat());
    pixels(&image).1
}

/// What an image says of how it was made.
pub fn record(image: &str) -> Value {
    serde_json::from_str::<Value>(&succeeds(&["inspect", image, "--json"])).unwrap()["rarebit"].clone()
}

#[test]
fn rivals_of_generate() {
    let out = TempDir::new().unwrap();
    let plain = image_of(&out, "generate", &[]);
    assert_eq!(record(&path(&out, "image.png"))["options"], Value::Null);
    assert_eq!(image_of(&out, "generate", &["--sgms", "0"]), plain, "SGMS that takes no step");
    assert_eq!(image_of(&out, "minority", &["--t-lo", "1"]), plain, "no step is optimised");
    let sgms = image_of(&out, "generate", &["--sgms", "30", "--sgms-every", "1"]);
    assert_ne!(sgms, plain);
    let cads = image_of(&out, "generate", &["--cads", "--cads-times", "0.2,0.8"]);
    assert_ne!(cads, plain);
    let of = record(&path(&out, "image.png"));
    assert_eq!((&of["method"], &of["options"]["tau1"]), (&"cads".into(), &0.2.into()));
    assert_eq!(image_of(&out, "generate", &["--cads", "--cads-times", "0.2,0.8"]), cads, "two runs");
}

#[test]
fn the_best_of_several_is_an_image_of_its_own() {
    let out = TempDir::new().unwrap();
    for by in ["rarity", "elbo"] {
        let image = path(&out, "best.png");
        let args = ["generate", PROMPT, "--steps", "4", "--quiet", "--seed", "5", "--best-of", "3", "--by", by];
        let events = lines(&succeeds(&[&args[..], &["--json", "--out", &image]].concat()));
        let chosen = named(&events, "chosen");
        let seed = chosen[0]["seed"].as_u64().unwrap();
        assert!(chosen.len() == 1 && (15..18).contains(&seed) && chosen[0]["score"].is_number(), "{chosen:?}");
        assert_eq!(image_of(&out, "generate", &["--seed", &seed.to_string()]), pixels(&image).1, "{by}");
        assert_eq!(record(&image)["options"], serde_json::json!({"n": 3, "by": by}));
    }
    let args = ["generate", PROMPT, "--best-of", "2", "--by", "rarity", "--size", "128x32"];
    fails(&args, 2, &["64x64", "128x32", "--size"]);
}

/// Images are written beside the sampling; what is said of them comes in the order in which they are made.
#[test]
fn events_keep_their_order() {
    let out = TempDir::new().unwrap();
    let folder = path(&out, "images");
    let args = [
        "generate",
        PROMPT,
        "--steps",
        "1",
        "--count",
        "5",
        "--batch",
        "2",
        "--best-of",
        "2",
        "--by",
        "denoising-loss",
    ];
    let events = lines(&succeeds(&[&args[..], &["--json", "--quiet", "--out", &folder]].concat()));
    let names: Vec<&str> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    let batch = ["image", "image", "chosen", "chosen"];
    assert_eq!(names, [&["load"][..], &batch, &batch, &["image", "chosen", "done"]].concat());
    let paths = |name: &str| -> Vec<String> {
        named(&events, name).iter().map(|event| event["path"].as_str().unwrap().to_string()).collect()
    };
    assert!(paths("image") == paths("chosen") && paths("image").is_sorted(), "{:?}", paths("image"));
}

#[test]
fn mistakes() {
    let generate = |flags: &[&str], words: &[&str]| fails(&[&["generate", PROMPT][..], flags].concat(), 2, words);
    generate(&["--cads", "--sgms", "1"], &["--cads", "--sgms"]);
    generate(&["--best-of", "2", "--cads"], &["--best-of", "--cads"]);
    generate(&["--best-of", "0"], &["--best-of"]);
    generate(
        &["--by", "denoising-loss"],
        &["--by", "without --best-of, --zero-order, --epsilon-greedy or --evolution"],
    );
    generate(&["--candidates", "4"], &["--candidates", "--evolution"]);
    generate(&["--best-of", "2", "--evolution", "2"], &["--best-of", "--evolution"]);
    generate(&["--best-of", "2", "--search-step", "0.3"], &["--search-step", "without --zero-order"]);
    generate(&["--zero-order", "2", "--search-epsilon", "0.3"], &["--search-epsilon", "without --epsilon-greedy"]);
    generate(&["--zero-order", "2", "--search-step", "0"], &["step of 0"]);
    generate(&["--evolution", "0"], &["--evolution"]);
    generate(&["--cads", "--cads-times", "0.5"], &["--cads-times", "two numbers"]);
    generate(&["--cads", "--cads-times", "0.9,0.6"], &["0.9 to 0.6"]);
    generate(&["--cads", "--cads-scale", "nan"], &["--cads-scale"]);
    generate(&["--sgms", "1", "--sgms-every", "0"], &["--sgms-every"]);
    generate(&["--sgms", "inf"], &["--sgms", "inf"]);
    generate(&["--sgms", "1", "--sgms-ratio", "2"], &["--sgms-ratio", "0 to 1"]);

    let minority = |flags: &[&str], words: &[&str]| {
        // Shown where one of them fails.
        println!("{flags:?}");
        let out = TempDir::new().unwrap();
        let image = path(&out, "image.png");
        fails(&[&["minority", PROMPT, "--quiet", "--out", &image][..], flags].concat(), 2, words);
        assert!(files(out.path()).is_empty(), "left behind: {:?}", files(out.path()));
    };
    minority(&["--objective", "repulsion"], &["--objective repulsion", "--batch 2"]);
    minority(&["--objective", "repulsion", "--batch", "2", "--count", "3"], &["--objective repulsion", "--count"]);
    minority(&["--init", "word:extraordinarily"], &["'extraordinarily'", "must be one"]);
    minority(&["--init", "cool"], &["--init", "word:WORD"]);
    minority(&["--variable", "text", "--save-token", "t.safetensors"], &["--save-token", "--variable token"]);
    minority(&["--lr-decay", "0.5", "--t-lo", "0", "--t-hi", "1", "--every", "1"], &["--lr-decay 0.5", "step 3"]);
    minority(&["--lr", "-1"], &["--lr", "0 or more"]);
    minority(&["--every", "0"], &["--every"]);
    minority(&["--tokens", "0"], &["--tokens"]);
    minority(&["--tokens", "31"], &["--tokens 31", "30"]);
    minority(&["--renoise", "1.5"], &["--renoise", "annealed"]);
    minority(&["--mode", "released", "--sampler", "euler"], &["released", "ddim"]);
    let late = ["--mode", "released", "--t-lo", "0", "--steps", "50", "--renoise", "annealed"];
    minority(&late, &["no noise level", "1018", "released mode"]);
    minority(&["--lambda", "nan"], &["--lambda"]);
    minority(&["--sgms", "3"], &["--compare"]);
    minority(&["--cads-scale", "0.1"], &["--compare"]);
    minority(&["--null-prompt", "dull"], &["--compare"]);
    minority(&["--compare", "sheet.png"], &["--compare", "--out"]);
    fails(&["minority", PROMPT, "--compare", "sheet.png", "--explain"], 2, &["--compare", "--explain"]);
    fails(&["minority", "--prompts", "prompts.txt", "--compare", "sheet.png"], 2, &["--compare", "--prompts"]);
}

#[test]
fn learned_tokens_are_saved_and_used() {
    let out = TempDir::new().unwrap();
    let (token, image) = (path(&out, "odd.safetensors"), path(&out, "image.png"));
    let minority = [&["minority", PROMPT, "--out", &image, "--save-token", &token][..], &FAST].concat();
    succeeds(&minority);
    let bytes = fs::read(&token).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.names(), ["<odd>"]);

    // A prompt that names it shows it; others do not care.
    let prompt = |prompt: &str, flags: &[&str]| {
        succeeds(&[&["generate", prompt, "--steps", "4", "--quiet", "--out", &image], flags].concat());
        pixels(&image).1
    };
    let plain = prompt(PROMPT, &[]);
    assert_eq!(prompt(PROMPT, &["--token", &token]), plain);
    let named = format!("{PROMPT} <odd>");
    assert_ne!(prompt(&named, &["--token", &token]), plain);
    assert_ne!(prompt(&named, &["--token", &token]), prompt(&named, &[]));

    // What a token begins as, without iterations, is what is saved again; also where the last batch is smaller.
    let again = path(&out, "again.safetensors");
    let from = ["--init-token", &token, "--iterations", "0", "--save-token", &again, "--count", "3", "--batch", "2"];
    succeeds(&[&["minority", PROMPT, "--steps", "4", "--quiet", "--out", &image][..], &from].concat());
    let data = |path: &str, name: &str| {
        let bytes = fs::read(path).unwrap();
        safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor(name).unwrap().data().to_vec()
    };
    for seed in 0..3 {
        let word = format!("again-image-{seed}");
        assert_eq!(data(&path(&out, &format!("{word}.safetensors")), &format!("<{word}>")), data(&token, "<odd>"));
    }

    fails(&["minority", &named, "--token", &token], 2, &["--token", "--variable text"]);
    fs::write(&token, &bytes[..bytes.len() / 2]).unwrap();
    fails(&["generate", PROMPT, "--token", &token], 1, &["odd.safetensors", "truncated"]);
    fails(&["minority", PROMPT, "--init-token", &token], 1, &["odd.safetensors", "truncated"]);
    fails(&["generate", PROMPT, "--token", &path(&out, "none.safetensors")], 1, &["none.safetensors"]);
}

#[test]
fn prompt_files_resume() {
    let out = TempDir::new().unwrap();
    let (prompts, images) = (path(&out, "prompts.txt"), path(&out, "images"));
    fs::write(&prompts, "a red star\na blue circle\n").unwrap();
    let args = [&["minority", "--prompts", &prompts, "--out", &images][..], &FAST].concat();
    assert_eq!(succeeds(&args).lines().count(), 2);
    assert_eq!(succeeds(&args), "");
    let lost = Path::new(&images).join("00002-0.png");
    let before = fs::read(&lost).unwrap();
    fs::remove_file(&lost).unwrap();
    assert_eq!(succeeds(&args).lines().count(), 1);
    assert_eq!(fs::read(&lost).unwrap(), before);
    assert_eq!(files(Path::new(&images)), ["00001-0.png", "00002-0.png"]);

    let other = [&args[..], &["--lambda", "0.5"]].concat();
    fails(&other, 2, &["00001-0.png", "other settings", "--overwrite"]);
    assert_eq!(succeeds(&[&other[..], &["--overwrite"]].concat()).lines().count(), 2);
    assert_eq!(succeeds(&other), "");
    assert_ne!(fs::read(&lost).unwrap(), before);
    let plain = ["generate", "--prompts", &prompts, "--out", &images, "--steps", "4", "--quiet"];
    fails(&plain, 2, &["00001-0.png", "other settings"]);
}

#[test]
fn traces() {
    let out = TempDir::new().unwrap();
    let (trace, image) = (path(&out, "trace.jsonl"), path(&out, "image.png"));
    let args = ["minority", PROMPT, "--out", &image, "--trace", &trace, "--count", "3", "--batch", "2", "--seed", "8"];
    succeeds(&[&args[..], &FAST].concat());
    let lines = lines(&fs::read_to_string(&trace).unwrap());
    assert_eq!(lines.len(), 2 * 2 * 2, "two batches, two steps, two iterations");
    for (index, line) in lines.iter().enumerate() {
        let batch = if index < 4 { 2 } else { 1 };
        let numbers = |key: &str| line[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect::<Vec<_>>();
        for key in ["score", "gradient", "moved"] {
            assert_eq!(numbers(key).len(), batch, "{key}: {line}");
        }
        assert!(numbers("score").iter().chain(&numbers("gradient")).all(|x| *x > 0.0), "{line}");
        let first = index % 4 == 0;
        assert!(numbers("moved").iter().all(|x| (*x == 0.0) == first), "{line}");
        assert_eq!(numbers("seeds"), if batch == 2 { vec![8.0, 9.0] } else { vec![10.0] });
        assert_eq!(
            (line["objective"].as_str(), line["iteration"].as_u64()),
            (Some("minority"), Some(index as u64 % 2))
        );
    }
}

#[test]
fn explains_without_running() {
    let flags =
        ["--steps", "50", "--t-lo", "0.9", "--t-hi", "1", "--iterations", "10", "--every", "1", "--guidance", "7.5"];
    let output = succeeds(&[&["minority", PROMPT, "--explain"][..], &flags].concat());
    let line = |name: &str| output.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{output}"));
    assert!(line("optimised steps").contains(" 5: 0 (t 981"), "{output}");
    assert!(line("UNet forwards").contains(" 200, of them 100 "), "{output}");
    assert!(line("UNet backwards").ends_with(" 100"), "{output}");
    // A model whose own sampler is another: the released code has DDIM alone.
    let pndm = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-sd1");
    let output = succeeds(&["minority", PROMPT, "--model", pndm, "--mode", "released", "--explain"]);
    assert!(output.contains(" 5: 0 (t 981 s 750)"), "{output}");
    assert!(line("memory").contains("MiB"), "{output}");
}

#[test]
fn images_say_how_they_were_optimised() {
    let out = TempDir::new().unwrap();
    let image = path(&out, "image.png");
    succeeds(&[&["minority", PROMPT, "--out", &image, "--lambda", "0.5", "--opt-seed", "3"][..], &FAST].concat());
    let shown = succeeds(&["inspect", &image]);
    for what in ["\"method\":\"minority\"", "\"options\":{", "\"lambda\":0.5", "\"renoise\":\"annealed\""] {
        assert!(shown.contains(what), "no {what} in {shown}");
    }
    let options = &record(&image)["options"];
    assert_eq!(options["schedule"]["iterations"], 2);
    assert_eq!(options["opt_seed"], 3);
    assert_eq!(options["variable"]["place"], "end");
}

#[test]
fn compares_methods_on_one_sheet() {
    let out = TempDir::new().unwrap();
    let (sheet, image) = (path(&out, "sheet.png"), path(&out, "image.png"));
    let flags = ["--seed", "7", "--lambda", "2"];
    let compare =
        [&["minority", PROMPT, "--compare", &sheet, "--count", "3", "--batch", "2"][..], &flags, &FAST].concat();
    let events = lines(&succeeds(&[&compare[..], &["--json", "--sgms", "3", "--sgms-every", "1"]].concat()));
    let names = ["DDIM", "null-prompted", "CADS", "SGMS", "MinorityPrompt"];
    let methods = named(&events, "method");
    assert_eq!(methods.iter().map(|event| event["name"].as_str().unwrap()).collect::<Vec<_>>(), names);
    for method in methods {
        let fraction = method["agreement"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&fraction) && method["images"] == 3, "{method}");
    }
    let cells: Vec<(&str, u64)> = named(&events, "compared")
        .iter()
        .map(|event| (event["name"].as_str().unwrap(), event["seed"].as_u64().unwrap()))
        .collect();
    assert_eq!(cells, names.iter().flat_map(|name| [7, 8, 9].map(|seed| (*name, seed))).collect::<Vec<_>>());
    assert_eq!(named(&events, "sheet")[0]["path"], sheet);
    assert_eq!(files(out.path()), ["sheet.png"]);

    // The images are those of the commands alone.
    let drawn = pixels(&sheet);
    succeeds(&["generate", PROMPT, "--steps", "4", "--quiet", "--seed", "8", "--out", &image]);
    let plain = find(&drawn, &image).expect("the plain image is on the sheet");
    succeeds(&[&["minority", PROMPT, "--out", &image, "--seed", "9", "--lambda", "2"][..], &FAST].concat());
    let rare = find(&drawn, &image).expect("the minority image is on the sheet");
    assert!(plain.0 < rare.0 && plain.1 < rare.1, "{plain:?} {rare:?}");
    let steps = ["--sgms", "3", "--sgms-every", "1"];
    succeeds(&[&["generate", PROMPT, "--steps", "4", "--quiet", "--seed", "9", "--out", &image][..], &steps].concat());
    let sgms = find(&drawn, &image).expect("the SGMS image is on the sheet");
    assert!(sgms.0 < rare.0 && sgms.1 == rare.1, "{sgms:?} {rare:?}");
}

#[test]
fn comparisons_for_a_reader_and_without_one() {
    let out = TempDir::new().unwrap();
    let sheet = path(&out, "sheet.png");
    let args = [&["minority", PROMPT, "--compare", &sheet, "--count", "1"][..], &FAST].concat();
    let output = succeeds(&args);
    let words: Vec<Vec<&str>> = output.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[..2], [vec![sheet.as_str()], vec!["method", "log-density", "impossible", "agreement"]]);
    assert!(words.len() == 7 && words[2..].iter().all(|line| line.len() == 4), "{output}");
    let with_reader = pixels(&sheet).1.len();
    let output = succeeds(&[&args[..], &["--size", "64x72"]].concat());
    assert_eq!(output.trim(), sheet, "no reader for images of other sizes");
    assert!(pixels(&sheet).1.len() < with_reader, "labels only");
    fails(&["minority", PROMPT, "--compare", &sheet, "--count", "300"], 2, &["--compare", "1500 images", "1024"]);
    fails(&["minority", PROMPT, "--compare", &path(&out, "sheet.jpg")], 2, &["--compare", ".png", ".jpg"]);
    let nowhere = path(&out, "none/sheet.png");
    fails(&["minority", PROMPT, "--compare", &nowhere], 1, &["none/sheet.png"]);
}

/// Ctrl-C between the steps leaves no half sheet.
#[cfg(unix)]
#[test]
fn comparisons_can_be_interrupted() {
    use std::io::BufRead;
    use std::process::{Command, Stdio};
    let out = TempDir::new().unwrap();
    let sheet = path(&out, "sheet.png");
    let args = ["minority", PROMPT, "--compare", &sheet, "--count", "40", "--steps", "10", "--quiet", "--json"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_rarebit"));
    let mut child = command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = String::new();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut first).unwrap();
    assert!(first.contains("compared"), "{first}");
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    // The pipe must not fill up while the program stops.
    std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("interrupted"), "{}", text(&output.stderr));
    assert!(files(out.path()).is_empty(), "{:?}", files(out.path()));
}

#[test]
fn help_tells_the_comparison_apart() {
    let help = text(&rarebit(&["minority", "--help"]).stdout);
    for what in ["Comparison:", "--compare <FILE.png>", "--null-prompt", "--sgms-every", "Optimisation:"] {
        assert!(help.contains(what), "no {what} in {help}");
    }
    assert!(!help.contains("--cads "), "the comparison always has CADS: {help}");
}
