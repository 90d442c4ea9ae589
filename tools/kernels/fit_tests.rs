//! The fit on made-up times.

use super::*;
use serde_json::json;

/// Of one in [0, 1), a function of the number.
fn random(number: usize) -> f64 {
    let z = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

const MHZ: f64 = 1700.0;

/// Rows of a sample, columns, depth, and whether Hopper can, as Stable Diffusion has them.
const SHAPES: [([usize; 3], bool); 16] = [
    ([4096, 320, 2880], true),
    ([4096, 320, 320], true),
    ([4096, 2560, 320], true),
    ([4096, 320, 1280], true),
    ([1024, 640, 5760], true),
    ([1024, 640, 640], true),
    ([1024, 640, 2560], true),
    ([256, 1280, 11520], true),
    ([256, 10240, 1280], true),
    ([256, 1280, 5120], true),
    ([64, 1280, 11520], true),
    ([64, 1280, 1280], true),
    ([4096, 4, 2880], false),
    ([77, 1280, 2048], true),
    // Shallow: little but a block's ends.
    ([4096, 64, 64], false),
    ([1024, 320, 32], false),
];

/// Times as a table would have them, with up to so much noise.
fn made_up(table: &Table, noise: f64) -> String {
    let mut text = json!({"sweep": 1, "device": "made up", "multiprocessors": MULTIPROCESSORS}).to_string() + "\n";
    let mut number = 0;
    for (dtype, batch) in [(DType::BF16, 2), (DType::BF16, 16), (DType::F32, 2)] {
        for ([rows, columns, depth], can) in SHAPES {
            let shape = Shape::of_samples(dtype, &[batch, rows, 1], columns, depth);
            let shape = shape.on_hopper(Hopper::Auto, Lines::KMajor, can);
            for cut in shape.legal() {
                number += 1;
                let place = tiles(&TABLE).iter().position(|tile| *tile == cut.tile).unwrap();
                let clocks = table.clocks(&shape, &Cut { tile: tiles(table)[place], ..cut });
                let ms = clocks / MHZ / 1e3 * (1.0 + noise * (2.0 * random(number) - 1.0));
                let line = json!({
                    "case": format!("{batch}x{rows}x{columns}x{depth} {dtype}"), "tile": cut.tile.name,
                    "hopper": cut.tile.hopper, "splits": cut.splits, "stages": cut.stages, "dtype": dtype.to_string(),
                    "rows": shape.rows, "nominal_rows": shape.nominal_rows, "columns": columns, "depth": depth,
                    "boxes": shape.boxes.map(|_| "reduced"), "ms": ms, "mhz": MHZ,
                });
                text += &format!("{}\n{line}\n", json!({"begin": {}}));
            }
        }
    }
    text
}

/// Another GPU's: every number is off, by a third to a half.
fn truth(seed: usize) -> Table {
    let mut truth = TABLE;
    for (number, (_, value)) in numbers(&mut truth).into_iter().enumerate() {
        *value *= if random(1000 * seed + number) < 0.5 { 0.65 } else { 1.5 };
    }
    truth
}

#[test]
fn rates_come_back_through_noise() {
    (0..4).for_each(come_back);
}

fn come_back(seed: usize) {
    let mut truth = truth(seed);
    let sweep = Sweep::parse(&made_up(&truth, 0.05)).unwrap();
    let fitted = Fitted::new(&sweep, &TABLE);
    let mut table = fitted.table;
    let output = fitted.report(&sweep, &TABLE);
    assert!(loss(&sweep.points, &table) < 1.02 * loss(&sweep.points, &truth), "{output}");
    for ((name, found), (_, value)) in numbers(&mut table).into_iter().zip(numbers(&mut truth)) {
        if fitted.bounds.contains(&format!("{name} at most")) {
            assert!(*found > 0.9 * *value, "{name}: {found}, {value}\n{output}");
        } else if !fitted.kept.contains(&name) {
            assert!((*found / *value).ln().abs() < 0.1, "{name}: {found}, {value}\n{output}");
        }
    }
    // A wait shows only where products do not take longer.
    assert!(fitted.kept.iter().chain(&fitted.bounds).all(|name| name.contains("latency")), "{output}");
    let [before, after, least] = [&TABLE, &table, &truth].map(|table| Regret::of(&sweep, table));
    assert_eq!([before.missing, after.missing, least.missing], [0; 3]);
    assert!(after.mean < 1.01 * least.mean && before.mean > after.mean, "{}\n{output}", least.mean);
    assert!(output.contains("before") && output.contains("1700 MHz, as measured"), "{output}");
}

#[test]
fn what_is_not_measured_keeps_its_rates() {
    let text = made_up(&truth(0), 0.0);
    let some: String = text
        .lines()
        .filter(|line| !line.contains("f32") && !line.contains("\"160\""))
        .map(|line| format!("{line}\n"))
        .collect();
    let fitted = Fitted::new(&Sweep::parse(&some).unwrap(), &TABLE);
    assert_eq!(fitted.table.single, TABLE.single);
    assert_eq!(fitted.table.hopper[0], TABLE.hopper[0]);
    assert!(fitted.kept.contains(&"single 64 rate".into()) && !fitted.kept.contains(&"hopper 128 rate".into()));
}

#[test]
fn the_true_table_is_kept_whole() {
    let sweep = Sweep::parse(&made_up(&TABLE, 0.0)).unwrap();
    assert_eq!(Fitted::new(&sweep, &TABLE).table, TABLE);
}

#[test]
fn torn_lines_other_versions_and_failures_are_told() {
    let text = made_up(&TABLE, 0.0);
    let points = Sweep::parse(&text).unwrap().points.len();
    let torn = Sweep::parse(&text[..text.len() - 9]).unwrap();
    assert_eq!(torn.points.len(), points - 1);
    let last = text.lines().last().unwrap();
    let more =
        [text.as_str(), &last.replace("\"splits\":", "\"splits\":7"), "\n", "{\"case\":\"\",\"error\":\"faulted\"}\n"]
            .concat();
    let sweep = Sweep::parse(&more).unwrap();
    assert_eq!((sweep.points.len(), sweep.unknown, sweep.failed), (points, 1, 1));
    for (bad, why) in [
        (text.replace(&format!(":{MULTIPROCESSORS}"), ":108"), "108 multiprocessors"),
        (text.replacen("\"ms\"", "\"s\"", 1), "line 3: no measurement"),
        (text.replacen("{\"", "{", 1), "line 1: "),
        (String::new(), "no measurement"),
    ] {
        let output = Sweep::parse(&bad).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(output.contains(why), "{output}");
    }
}

#[test]
fn a_clock_that_is_not_known_is_fitted() {
    let text = made_up(&TABLE, 0.0).replace(",\"mhz\":1700.0", "");
    assert!(Sweep::parse(&text).unwrap().clock.starts_with("1700 MHz, unknown"));
}

#[test]
fn the_fastest_ring_is_taken() {
    let mut sweep = Sweep::parse(&made_up(&TABLE, 0.0)).unwrap();
    for Point { cut, clocks, .. } in &mut sweep.points {
        let faster = cut.tile.hopper && cut.tile.name == "160" && cut.stages == 4;
        *clocks *= if faster { 0.9 } else { 1.0 };
    }
    let fitted = Fitted::new(&sweep, &TABLE);
    assert_eq!(fitted.table.hopper.map(|tile| tile.stages), [4, TABLE.hopper[1].stages]);
}

/// What is written back is what rustfmt would leave of it.
#[test]
fn the_table_is_written_as_it_stands() {
    let source = include_str!("../../src/exec/cuda/rates.rs");
    assert!(source.contains(&show(&TABLE)), "{}", show(&TABLE));
    let lines = format!("// fit: anew\n{}// fit: end\n", show(&TABLE));
    let replaced = replace(source, &lines).unwrap();
    assert!(replaced.contains("// fit: anew\npub const TABLE") && replaced.matches("pub const TABLE").count() == 1);
    assert_eq!(replace(&replaced, &lines).unwrap(), replaced);
    assert!(replace("", &lines).is_err());
}
