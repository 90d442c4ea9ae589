//! The `shapes` world as an oracle, and `rarebit score --shapes`: captions, exact densities, the reader, the report.

use crate::common::command::{fails, files, path, rarebit, succeeds, text};
use crate::common::golden::data_folder;
use rarebit::assets;
use rarebit::exec::cpu::Cpu;
use rarebit::metrics::shapes::{
    self, Cell, Conditional, Fraction, Instrument, Judge, Reader, Reading, Report, Statement, World,
};
use rarebit::pipeline::Pipeline;
use rarebit::pipeline::generate::{to_channels_first, to_channels_last};
use rarebit::pipeline::networks::{Networks, Tensor};
use rarebit::program::DType;
use safetensors::SafeTensors;
use serde_json::Value;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

fn world() -> World {
    World::embedded().unwrap()
}

/// Attribute and value names → positions.
fn stated(world: &World, pairs: &[(&str, &str)]) -> Statement {
    let mut statement = vec![None; world.attributes.len()];
    for (name, value) in pairs {
        let index = world.attributes.iter().position(|a| a.name == *name).unwrap();
        statement[index] = Some(world.attributes[index].values.iter().position(|v| v == value).unwrap());
    }
    statement
}

/// A plain cell with some attributes changed.
fn cell(world: &World, pairs: &[(&str, &str)]) -> Cell {
    let plain = [
        ("shape", "circle"),
        ("colour", "blue"),
        ("size", "medium"),
        ("texture", "plain"),
        ("finish", "flat"),
        ("position", "center"),
        ("bg", "white"),
        ("bgstyle", "flat"),
        ("tilt", "upright"),
        ("frame", "none"),
    ];
    stated(world, &[&plain[..], pairs].concat()).into_iter().map(Option::unwrap).collect()
}

#[track_caller]
fn close(a: f64, b: f64, within: f64) {
    assert!((a - b).abs() <= within, "{a} is not {b}");
}

#[test]
fn captions_state_what_they_say() {
    let world = world();
    let says = |caption: &str, pairs: &[(&str, &str)]| {
        assert_eq!(world.parse(caption), Ok(stated(&world, pairs)), "{caption}");
    };
    says("a circle", &[("shape", "circle")]);
    says("A  Star with a HOLE", &[("shape", "star with a hole")]);
    says("a star", &[("shape", "star")]);
    says(
        "an icon of a red star on a dark blue background",
        &[("shape", "star"), ("colour", "red"), ("bg", "dark blue")],
    );
    says("a plus sign on the left", &[("shape", "cross"), ("position", "left")]);
    // One word, two meanings, told apart by where it stands.
    says(
        "a flat black ring on a black background",
        &[("finish", "flat"), ("colour", "black"), ("shape", "ring"), ("bg", "black")],
    );
    says("a plain moon on a plain background", &[("texture", "plain"), ("shape", "crescent"), ("bgstyle", "flat")]);
    says(
        "a picture of a medium sized glossy spotted crimson box in the middle on a speckled navy background",
        &[
            ("size", "medium"),
            ("finish", "glossy"),
            ("texture", "dotted"),
            ("colour", "red"),
            ("shape", "square"),
            ("position", "center"),
            ("bgstyle", "speckled"),
            ("bg", "dark blue"),
        ],
    );
}

#[test]
fn what_is_no_caption_says_where() {
    let world = world();
    let refused = |caption: &str, why: &str| assert_eq!(world.parse(caption), Err(why.to_string()), "{caption}");
    refused("", "expected 'a' or 'an', found the end");
    refused("red star", "expected 'a' or 'an', found 'red'");
    refused("a photo of a cat", "no shape at word 2");
    refused("a red small star", "no shape at word 3");
    refused("a red star.", "no shape at word 3");
    refused("a star with a red hole", "expected 'on', found 'with'");
    refused("a star on the blue background", "expected 'a' or 'an', found 'the'");
    refused("a star on a blue background", "expected 'background', found 'blue'");
    refused("a star on a black", "expected 'background', found the end");
    refused("a star on a black background tilted", "'tilted' after the end");
}

/// Every phrase of the lexicon, in its slot, names its value and no other.
#[test]
fn every_phrase_of_the_lexicon() {
    let world = world();
    let json: Value = serde_json::from_str(assets::SHAPES_WORLD).unwrap();
    let lexicon = json["grammar"]["lexicon"].as_object().unwrap();
    let mut phrases = 0;
    for (name, values) in lexicon {
        for (value, options) in values.as_array().unwrap().iter().enumerate() {
            for option in options.as_array().unwrap() {
                let phrase = option[0].as_str().unwrap();
                let caption = match name.as_str() {
                    "shape" => format!("a {phrase}"),
                    "position" => format!("a circle {phrase}"),
                    "bg" | "bgstyle" => format!("a circle on a {phrase} background"),
                    _ => format!("a {phrase} circle"),
                };
                let index = world.attributes.iter().position(|a| a.name == *name).unwrap();
                let mut expected = stated(&world, &[("shape", "circle")]);
                expected[index] = Some(value);
                assert_eq!(world.parse(&caption), Ok(expected), "{caption}");
                phrases += 1;
            }
        }
    }
    assert!(phrases > 140, "{phrases}");
}

#[test]
fn densities_by_hand() {
    let world = world();
    // Blue is the circle's own colour; a blue thing stands on dark blue three times less often than others do.
    let blue = 0.35 + 0.65 * 0.30;
    let on_white = 0.36 / (1.0 - 0.7 * 0.15);
    let p: f64 = 0.236 * blue * 0.55 * 0.76 * 0.66 * 0.62 * on_white * 0.74 * 1.0 * 0.96;
    close(world.log_density(&cell(&world, &[])), p.ln(), 1e-12);

    // Yellow is the pierced star's own colour; black comes last, and the circle's black likewise.
    let rare = [("shape", "star with a hole"), ("colour", "black"), ("texture", "striped"), ("tilt", "inverted")];
    let on_white = 0.36 / (1.0 - 0.10);
    let p: f64 = 0.0045 * (0.65 * 0.010) * 0.55 * 0.14 * 0.66 * 0.62 * on_white * 0.74 * 0.04 * 0.96;
    close(world.log_density(&cell(&world, &rare)), p.ln(), 1e-12);

    for impossible in
        [vec![("colour", "white")], vec![("tilt", "tilted")], vec![("shape", "spiral"), ("texture", "dotted")]]
    {
        assert_eq!(world.log_density(&cell(&world, &impossible)), f64::NEG_INFINITY, "{impossible:?}");
    }
    let contrast = 2.0 * ((240 - 40) + (240 - 80) + (240 - 220)) as f64 / 3.0 / 255.0;
    close(world.aesthetic(&cell(&world, &[])), 3.0 + contrast + 0.6 + 0.3 + 0.0 + 1.0 + 0.0 + 0.0, 1e-5);
    let best = [("finish", "glowing"), ("bgstyle", "vignette"), ("frame", "framed")];
    close(world.aesthetic(&cell(&world, &best)), 3.0 + contrast + 0.6 + 0.3 + 2.6 + 1.0 + 1.6 + 0.6, 1e-5);
}

/// The world under a statement, cell by cell: marginals, and the log-density of every possible cell, ascending.
fn enumerate(world: &World, statement: &Statement) -> (Vec<Vec<f64>>, Vec<f64>) {
    let mut marginals: Vec<Vec<f64>> = world.attributes.iter().map(|a| vec![0.0; a.values.len()]).collect();
    let mut densities = Vec::new();
    let mut cell: Cell = statement.iter().map(|value| value.unwrap_or(0)).collect();
    loop {
        let density = world.log_density(&cell);
        if density.is_finite() {
            densities.push(density);
            marginals.iter_mut().zip(&cell).for_each(|(p, &value)| p[value] += density.exp());
        }
        // Counts up like an odometer over what is not stated.
        let next = (0..cell.len()).rev().find(|&i| statement[i].is_none() && cell[i] + 1 < marginals[i].len());
        let Some(next) = next else { break };
        cell[next] += 1;
        (next + 1..cell.len()).filter(|&i| statement[i].is_none()).for_each(|i| cell[i] = 0);
    }
    densities.sort_unstable_by(f64::total_cmp);
    let total: f64 = densities.iter().map(|x| x.exp()).sum();
    marginals.iter_mut().flatten().for_each(|p| *p /= total);
    (marginals, densities)
}

#[track_caller]
fn check_conditional(world: &World, statement: &Statement) -> f64 {
    let conditional = Conditional::new(world, statement).unwrap();
    let (marginals, densities) = enumerate(world, statement);
    for (index, (got, expected)) in conditional.marginals.iter().zip(&marginals).enumerate() {
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-9, "{}: {got} is not {expected}", world.attributes[index].name);
        }
    }
    let total: f64 = densities.iter().map(|x| x.exp()).sum();
    close(conditional.mean_log_density, densities.iter().map(|x| x.exp() * x).sum::<f64>() / total, 1e-9);
    for q in [0.001, 0.1, 0.5, 0.99] {
        let mut mass = 0.0;
        let reached = |x: &&f64| {
            mass += x.exp() / total;
            mass >= q
        };
        close(conditional.quantile(q), *densities.iter().find(reached).unwrap(), 1e-8);
    }
    let below: f64 = densities.iter().filter(|x| **x < conditional.tail_edge - 1e-9).map(|x| x.exp() / total).sum();
    close(conditional.tail_mass, below, 1e-9);
    total
}

#[test]
fn the_whole_world_adds_up() {
    let world = world();
    let nothing = vec![None; world.attributes.len()];
    close(check_conditional(&world, &nothing), 1.0, 1e-9);
    let conditional = Conditional::new(&world, &nothing).unwrap();
    close(conditional.mean_log_density, -10.717, 1e-3);
    close(conditional.quantile(0.1), -14.202, 1e-3);
    close(conditional.tail_mass, 0.1, 2e-3);
}

#[test]
fn conditionals_are_exact() {
    let world = world();
    for caption in [
        "a star with a hole",
        "a glossy ring on a beige background",
        "a small shaded striped red star in the center on a gradient white background",
    ] {
        check_conditional(&world, &world.parse(caption).unwrap());
    }
    // A child says something of its parent: under a white background no shape is white, whatever its own colour.
    let on_white = Conditional::new(&world, &stated(&world, &[("bg", "white")])).unwrap();
    assert_eq!(on_white.marginals[1][6], 0.0);
    assert!(on_white.marginals[0][5] < 0.05, "crosses, 7.5 % of all shapes and white by nature, are rarer there");
    for impossible in ["a dotted spiral", "a white heart on a white background"] {
        assert!(Conditional::new(&world, &world.parse(impossible).unwrap()).is_none(), "{impossible}");
    }
}

/// Scenes of the world, what they show, and the reader's logits by PyTorch (`tools/shapes/golden.py`).
struct Golden {
    /// `[N, 64, 64, 3]`.
    scenes: Vec<u8>,
    cells: Vec<Cell>,
    /// `[N, values]`.
    logits: Vec<f32>,
}

fn golden(world: &World) -> Golden {
    let bytes = fs::read(data_folder("shapes").join("reader.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let data = |name: &str| file.tensor(name).unwrap().data().to_vec();
    let cells = data("cells");
    let cells: Vec<usize> = cells.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as usize).collect();
    let logits = data("logits").chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let cells = cells.chunks(world.attributes.len()).map(<[usize]>::to_vec).collect();
    Golden { scenes: data("scenes"), cells, logits }
}

fn reader(world: &World, batch: usize) -> Reader {
    let instrument = Instrument::embedded(world).unwrap();
    let executor = Box::new(Cpu::<f32>::new().with_guards(true));
    let planned = instrument.plan(&*executor, DType::F32, batch).unwrap();
    instrument.load(executor, planned).unwrap()
}

#[test]
fn reader_gives_the_logits_of_pytorch() {
    let world = world();
    let Golden { scenes, cells, logits } = golden(&world);
    let images: Vec<f32> = scenes.iter().map(|&x| f32::from(x) / 127.5 - 1.0).collect();
    // A batch that does not divide the images.
    let mut reader = reader(&world, 7);
    let got = reader.logits(&images).unwrap();
    assert_eq!(got.len(), logits.len());
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let error = norm(&mut got.iter().zip(&logits).map(|(a, b)| a - b)) / norm(&mut logits.iter().copied());
    println!("logits: relative error {error:.2e}");
    assert!(error <= 1e-5, "{error:e}");

    // From 8 bits, each attribute is read by its largest logit, and the confidence is the least of those probabilities.
    let readings = reader.read(&scenes).unwrap();
    assert_eq!(readings.len(), cells.len());
    for (reading, logits) in readings.iter().zip(got.chunks(got.len() / cells.len())) {
        let (mut at, mut least) = (0, 1.0f64);
        for (attribute, &value) in world.attributes.iter().zip(&reading.cell) {
            let head = &logits[at..at + attribute.values.len()];
            assert!(head.iter().all(|x| *x <= head[value]), "{}", attribute.name);
            let total: f64 = head.iter().map(|x| f64::from(x - head[value]).exp()).sum();
            least = least.min(1.0 / total);
            at += head.len();
        }
        close(reading.confidence, least, 1e-9);
    }
}

/// Renders of attribute-uniform scenes, and the same through the embedded autoencoder: what all scores stand on.
#[test]
fn the_reader_reads_what_is_there() {
    let world = world();
    let Golden { scenes, cells, .. } = golden(&world);
    let mut reader = reader(&world, cells.len());
    let right = |readings: &[Reading]| -> usize {
        let same = |(reading, cell): (&Reading, &Cell)| reading.cell.iter().zip(cell).filter(|(a, b)| a == b).count();
        readings.iter().zip(&cells).map(same).sum()
    };
    let pipeline = Pipeline::open(assets::shapes().unwrap(), None).unwrap();
    let mut cpu = Cpu::<f32>::new();
    let mut networks = Networks::new(&pipeline, &mut cpu, DType::F32);
    let pixels: Vec<f32> = scenes.iter().map(|&x| f32::from(x) / 127.5 - 1.0).collect();
    let pixels = pixels.chunks(64 * 64 * 3).flat_map(|image| to_channels_first(image, 3)).collect();
    let (mut latents, _) = networks.encode(&Tensor { shape: vec![cells.len(), 3, 64, 64], data: pixels }).unwrap();
    // Decoding takes them at the UNet's scale.
    let scale = pipeline.config.vae.scaling_factor as f32;
    latents.data.iter_mut().for_each(|x| *x *= scale);
    let decoded = networks.decode(&latents).unwrap();
    let bytes: Vec<u8> = decoded
        .data
        .chunks(3 * 64 * 64)
        .flat_map(|image| to_channels_last(image, 3))
        .map(|x| ((x.clamp(-1.0, 1.0) + 1.0) * 127.5).round() as u8)
        .collect();
    let of = cells.len() * world.attributes.len();
    let (raw, reconstructed) = (right(&reader.read(&scenes).unwrap()), right(&reader.read(&bytes).unwrap()));
    println!("right: {raw} of {of} as rendered, {reconstructed} reconstructed");
    assert!(raw * 100 >= of * 98 && reconstructed * 100 >= of * 97, "{raw} and {reconstructed} of {of}");
}

/// A report of cells read without doubt.
fn report(world: &World, images: &[(Cell, Option<&str>)]) -> Report {
    let mut judge = Judge::new(world);
    let judged = images.iter().map(|(cell, prompt)| {
        let reading = Reading { cell: cell.clone(), confidence: 1.0 };
        judge.judge(reading, prompt.map(|prompt| world.parse(prompt).unwrap()))
    });
    shapes::report(world, &judged.collect::<Vec<_>>())
}

#[test]
fn report_of_one_prompt() {
    let world = world();
    let prompt = Some("a red star");
    let star = |pairs: &[(&str, &str)]| cell(&world, &[&[("shape", "star"), ("colour", "red")], pairs].concat());
    let images = [
        (star(&[]), prompt),
        (star(&[]), prompt),
        (star(&[("finish", "glowing"), ("bg", "violet"), ("frame", "framed"), ("texture", "checkered")]), prompt),
        (star(&[("colour", "blue")]), prompt),
        (star(&[("colour", "white")]), prompt),
    ];
    let report = report(&world, &images);
    assert_eq!((report.images, report.captioned, report.compared, report.distinct_cells), (5, 5, 5, 4));
    assert_eq!(report.right, Fraction { count: 3, of: 5 });
    assert_eq!(report.impossible, Fraction { count: 1, of: 5 });
    let common: Vec<(&str, &str)> =
        report.stated.iter().flatten().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(common, [("colour", "red"), ("shape", "star")]);
    // One image is far out in the tail; that the impossible one has no density does not make it rare.
    assert_eq!((report.tail, report.tail_and_right), (Fraction { count: 1, of: 5 }, Fraction { count: 1, of: 5 }));
    let densities: Vec<f64> = images[..4].iter().map(|(cell, _)| world.log_density(cell)).collect();
    let mean = densities.iter().sum::<f64>() / 4.0;
    let error = (densities.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 12.0).sqrt();
    let estimate = report.log_density.unwrap();
    close(estimate.mean, mean, 1e-12);
    close(estimate.standard_error.unwrap(), error, 1e-12);
    let conditional = Conditional::new(&world, &world.parse("a red star").unwrap()).unwrap();
    assert_eq!(report.expected_log_density, Some(conditional.mean_log_density));
    assert_eq!(report.expected_tail, Some(conditional.tail_mass));

    let by_name = |name: &str| report.attributes.iter().find(|a| a.name == name).unwrap();
    let colour = by_name("colour");
    assert_eq!((colour.right, colour.open), (Fraction { count: 3, of: 5 }, 0));
    assert_eq!((colour.total_variation, colour.chance_total_variation), (None, None));
    assert_eq!((&colour.counts[..2], colour.counts[6], colour.expected[0]), (&[3, 1][..], 1, 1.0));
    let frame = by_name("frame");
    assert_eq!((frame.counts.as_slice(), frame.open, frame.right.of), (&[4, 1][..], 5, 0));
    close(frame.expected[1], 0.04, 1e-12);
    close(frame.total_variation.unwrap(), 0.16, 1e-12);
    close(frame.entropy, -(0.8 * 0.8f64.ln() + 0.2 * 0.2f64.ln()), 1e-12);
    close(frame.expected_entropy, -(0.96 * 0.96f64.ln() + 0.04 * 0.04f64.ln()), 1e-12);
}

#[test]
fn report_of_several_prompts_and_none() {
    let world = world();
    let images = [
        (cell(&world, &[]), Some("a circle")),
        (cell(&world, &[]), Some("a framed circle").filter(|p| world.parse(p).is_ok())),
        (cell(&world, &[("shape", "spiral"), ("colour", "purple")]), Some("a dotted spiral")),
    ];
    let report = report(&world, &images);
    // Frames cannot be asked for: the second image has no caption and stands against the whole world; the third has one that
    // nothing can follow and stands against nothing.
    assert_eq!((report.images, report.captioned, report.compared, report.stated), (3, 2, 2, None));
    assert_eq!(report.right, Fraction { count: 1, of: 2 });
    assert_eq!(report.tail.of, 2);
    let shape = &report.attributes[0];
    assert_eq!((shape.counts[0], shape.open, shape.right), (2, 1, Fraction { count: 2, of: 2 }));
    close(shape.expected[0], (1.0 + 0.236) / 2.0, 1e-12);
    close(shape.total_variation.unwrap(), 1.0 - 0.236, 1e-12);
    let only = shapes::report(&world, &[]);
    assert_eq!((only.images, only.log_density, only.expected_tail), (0, None, None));
}

/// A set drawn from the world itself looks like it, within what chance allows.
#[test]
fn draws_from_the_world_look_like_it() {
    let world = world();
    let marginal =
        |statement: &Statement, index: usize| Conditional::new(&world, statement).unwrap().marginals.swap_remove(index);
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let prompt = "a circle on a gradient background";
    let mut images = Vec::new();
    for _ in 0..400 {
        // Attribute by attribute, each given those drawn before.
        let mut statement = world.parse(prompt).unwrap();
        for index in 0..statement.len() {
            let mut left = uniform();
            let p = marginal(&statement, index);
            let drawn = p.iter().position(|p| {
                left -= p;
                left < 0.0
            });
            statement[index] = drawn.or(statement[index]);
        }
        images.push((statement.into_iter().map(Option::unwrap).collect(), Some(prompt)));
    }
    let report = report(&world, &images);
    let estimate = report.log_density.unwrap();
    close(estimate.mean, report.expected_log_density.unwrap(), 3.0 * estimate.standard_error.unwrap());
    close(report.tail.count as f64 / 400.0, report.expected_tail.unwrap(), 0.045);
    assert_eq!((report.right.count, report.impossible.count), (400, 0));
    for attribute in report.attributes.iter().filter(|a| a.open > 0) {
        let (distance, chance) = (attribute.total_variation.unwrap(), attribute.chance_total_variation.unwrap());
        assert!(distance <= 3.0 * chance, "{}: {distance} where chance makes {chance}", attribute.name);
    }
}

/// Writes a PNG of a shaded square with the `parameters` text.
fn write_png(path: &Path, side: u32, parameters: Option<&str>) {
    let mut encoder = png::Encoder::new(fs::File::create(path).unwrap(), side, side);
    encoder.set_color(png::ColorType::Rgb);
    if let Some(text) = parameters {
        encoder.add_text_chunk("parameters".into(), text.into()).unwrap();
    }
    let pixels: Vec<u8> = (0..3 * side * side).map(|i| (i * 7 % 251) as u8).collect();
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
}

/// A folder with an image of each kind of prompt.
fn folder_of_images() -> TempDir {
    let folder = TempDir::new().unwrap();
    write_png(&folder.path().join("a.png"), 64, Some("a red star\nSteps: 20, Sampler: ddim"));
    write_png(&folder.path().join("b.PNG"), 64, Some("a photo of a cat\nNegative prompt: dog\nSteps: 20"));
    write_png(&folder.path().join("c.png"), 64, None);
    fs::write(folder.path().join("notes.txt"), "no image").unwrap();
    folder
}

fn events(stdout: &str) -> Vec<Value> {
    stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn scores_a_folder_as_json() {
    let folder = folder_of_images();
    let folder_path = folder.path().display().to_string();
    let events = events(&succeeds(&["score", "--shapes", &folder_path, "--json", "--batch", "2"]));
    assert_eq!(events.len(), 4);
    for (event, name) in events.iter().zip(["a.png", "b.PNG", "c.png"]) {
        assert_eq!(event["event"], "image");
        assert!(event["path"].as_str().unwrap().ends_with(name), "{event}");
        assert_eq!(event["read"].as_object().unwrap().len(), 10);
        assert!(event["confidence"].as_f64().unwrap() > 0.0 && event["aesthetic"].as_f64().unwrap() > 2.0);
        assert_eq!(event["log_density"].is_null(), event["impossible"].as_bool().unwrap());
        // One picture, whatever its prompt.
        assert_eq!(event["read"], events[0]["read"]);
    }
    let prompts: Vec<&Value> = events.iter().map(|event| &event["prompt"]).collect();
    assert_eq!(
        prompts[..3],
        ["a red star", "a photo of a cat", "null"]
            .map(|p| if p == "null" { Value::Null } else { p.into() })
            .iter()
            .collect::<Vec<_>>()
    );
    assert_eq!(events[0]["stated"], serde_json::json!({"shape": "star", "colour": "red"}));
    assert!(events[1]["stated"].is_null() && events[2]["stated"].is_null());
    let wrong = ["shape", "colour"].iter().filter(|name| events[0]["read"][**name] != events[0]["stated"][**name]);
    assert_eq!(events[0]["wrong"].as_array().unwrap().len(), wrong.count());

    let summary = &events[3];
    assert_eq!(summary["event"], "summary");
    let report = &summary["report"];
    assert_eq!((&report["images"], &report["captioned"], &report["compared"]), (&3.into(), &1.into(), &3.into()));
    assert_eq!(
        summary["not_captions"],
        serde_json::json!({"prompts": 1, "first": "'a photo of a cat': no shape at word 2"})
    );
    assert!(summary.as_object().unwrap().contains_key("reader"));
    let counts = report["attributes"][0]["counts"].as_array().unwrap();
    assert_eq!(counts.iter().map(|n| n.as_u64().unwrap()).sum::<u64>(), 3);
    assert_eq!(report["distinct_cells"], 1);
}

#[test]
fn a_given_prompt_counts_for_all() {
    let folder = folder_of_images();
    let folder_path = folder.path().display().to_string();
    let args = ["score", "--shapes", &folder_path, "--prompt", "a dotted arrow", "--quiet"];
    let shown = succeeds(&args);
    for word in
        ["a.png", "c.png", "3, 3 with a caption", "shape arrow, texture dotted", "agreement", "world -", "reader"]
    {
        assert!(shown.contains(word), "'{word}' is not in: {shown}");
    }
    assert!(!shown.contains("not captions"), "{shown}");
    let widest = shown.lines().skip(5).map(|line| line.chars().count()).max().unwrap();
    assert!(widest <= 180, "{widest}: {shown}");

    // Forty images get no lines of their own unless they are asked for.
    let many: Vec<&str> = ["score", "--shapes"].into_iter().chain([folder_path.as_str(); 14]).collect();
    let shown = succeeds(&many);
    assert!(!shown.contains("a.png") && shown.starts_with("images         42, 14 with"), "{shown}");
    assert!(shown.contains("14 prompts, e.g. 'a photo of a cat'"), "{shown}");
    assert!(succeeds(&[&many[..], &["--each"]].concat()).contains("a.png"));
    // The world holds no dotted spiral to compare with; agreement counts all the same.
    let shown = succeeds(&["score", "--shapes", &folder_path, "--prompt", "a dotted spiral"]);
    assert!(shown.contains("left out       3 images") && shown.contains("agreement"), "{shown}");
}

/// From `generate` to `score`: the record's prompt, a sheet, and the same numbers whatever the batch and the threads.
#[test]
fn generated_images_and_their_sheet() {
    let folder = TempDir::new().unwrap();
    let images = path(&folder, "images");
    fs::create_dir(&images).unwrap();
    let prompt = "a small blue ring on the left";
    let image = format!("{images}/ring.png");
    succeeds(&["generate", prompt, "--steps", "2", "--count", "3", "--batch", "3", "--quiet", "--out", &image]);
    let sheet = path(&folder, "sheet.png");
    let json = succeeds(&["score", "--shapes", &images, "--json", "--sheet", &sheet, "--threads", "1"]);
    assert_eq!(events(&json)[0]["prompt"], prompt);
    assert_eq!(events(&json)[3]["report"]["stated"]["position"], "left");
    assert_eq!(json, succeeds(&["score", "--shapes", &images, "--json", "--batch", "1"]));
    assert_eq!(files(folder.path()), ["images", "sheet.png"]);
    let reader = png::Decoder::new(std::io::BufReader::new(fs::File::open(&sheet).unwrap())).read_info().unwrap();
    let (width, height) = reader.info().size();
    assert!((2 * 128..600).contains(&width) && (2 * 128..600).contains(&height), "{width}x{height}");
    // A sheet is no input.
    fails(&["score", "--shapes", &image.replace(".png", "-0.png"), &sheet], 1, &["sheet.png", "64x64"]);
}

#[test]
fn score_refuses_in_one_line() {
    let folder = folder_of_images();
    let good = path(&folder, "a.png");
    fails(&["score", &good], 2, &["--shapes"]);
    fails(&["score", "--shapes"], 2, &["IMAGES"]);
    fails(&["score", "--shapes", &path(&folder, "none.png")], 1, &["none.png", "No such file"]);
    fails(&["score", "--shapes", &path(&folder, "notes.txt")], 1, &["notes.txt", "not a readable PNG"]);
    fails(&["score", "--shapes", &good, "--device", "gpu"], 2, &["--device"]);
    fails(&["score", "--shapes", &good, "--memory-limit", "1M"], 1, &["--memory-limit is 1.0 MiB"]);
    fails(&["score", "--shapes", &good, "--sheet", &good], 2, &["a.png", "--sheet"]);
    fails(&["score", "--shapes", &good, "--sheet", &path(&folder, "no/sheet.png")], 1, &["no/sheet.png"]);
    fails(&["score", "--shapes", &good, "--batch", "0"], 2, &["--batch"]);
    let empty = TempDir::new().unwrap();
    fails(&["score", "--shapes", &empty.path().display().to_string()], 1, &["holds no PNG"]);

    let sheet = path(&folder, "sheet.png");
    let large = path(&folder, "large.png");
    write_png(Path::new(&large), 65, None);
    fails(
        &["score", "--shapes", &good, &large, "--quiet", "--json", "--sheet", &sheet],
        1,
        &["large.png", "65x65", "64x64"],
    );
    let bytes = fs::read(&good).unwrap();
    let cut = path(&folder, "cut.png");
    for length in [0, 20, bytes.len() / 2, bytes.len() - 14] {
        fs::write(&cut, &bytes[..length]).unwrap();
        fails(
            &["score", "--shapes", &good, &cut, "--quiet", "--json", "--sheet", &sheet],
            1,
            &["cut.png", "not a readable PNG"],
        );
    }
}

/// One line each for what cannot be read, the others measured, and a failure at the end.
#[test]
fn a_broken_image_stops_no_other() {
    let folder = folder_of_images();
    let named = |name: &str| path(&folder, name);
    let good = fs::read(named("a.png")).unwrap();
    fs::write(named("aa.png"), &good[..good.len() / 2]).unwrap();
    fs::write(named("bb.jpg"), "<!DOCTYPE html>").unwrap();
    write_png(Path::new(&named("cc.png")), 65, None);
    let (folder_path, none, sheet) = (folder.path().display().to_string(), named("none.png"), named("sheet.png"));
    for batch in ["1", "2", "16"] {
        let args = ["score", "--shapes", &folder_path, &none, "--batch", batch, "--quiet"];
        let output = rarebit(&args);
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(stderr.lines().count(), 4, "{stderr}");
        for name in ["aa.png", "bb.jpg", "cc.png", "none.png"] {
            assert_eq!(stderr.lines().filter(|line| line.contains(name)).count(), 1, "{stderr}");
            assert!(!stdout.contains(name), "{stdout}");
        }
        assert!(["a.png", "b.PNG", "c.png", "images         3, 1 with"].iter().all(|word| stdout.contains(word)));

        let output = rarebit(&[&args[..], &["--json", "--sheet", &sheet]].concat());
        let events = events(&text(&output.stdout));
        let unreadable = events.iter().filter(|event| event["event"] == "unreadable").count();
        assert_eq!((output.status.code(), unreadable, events.len()), (Some(1), 4, 4 + 3 + 1));
        assert_eq!(events[7]["report"]["images"], 3);
        fs::remove_file(&sheet).unwrap();
        let output = rarebit(&[&args[..], &["--json", "--sheet", &sheet, "--strict"]].concat());
        assert_eq!((output.status.code(), text(&output.stderr).lines().count()), (Some(1), 1));
        assert!(!text(&output.stdout).contains("summary") && !Path::new(&sheet).exists());
    }
    // Nothing that could be measured is no report.
    fails(&["score", "--shapes", &named("aa.png"), "--json"], 1, &["aa.png"]);
    assert!(!text(&rarebit(&["score", "--shapes", &named("aa.png")]).stdout).contains("images"));
}

#[cfg(unix)]
#[test]
fn what_is_no_file_is_not_read() {
    let folder = TempDir::new().unwrap();
    let socket = path(&folder, "a.png");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for name in [&socket, "/dev/zero"] {
        fails(&["score", "--shapes", name], 1, &["is not a regular file"]);
        fails(&["inspect", name], 1, &["is not a regular file"]);
    }
}
