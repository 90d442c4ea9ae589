//! Every flag of every subcommand, as the command line defines them: no two paths are one file, and no number is a surprise.

use crate::common::command::{files, text};
use clap::{Arg, Command};
use std::any::TypeId;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tempfile::TempDir;

/// What every path flag is for; a new one has to be entered here.
const INPUTS: [&str; 13] = [
    "model",
    "unet",
    "token",
    "noise",
    "prompts",
    "init_token",
    "baseline",
    "images",
    "path",
    "references",
    "other",
    "clip",
    "judge",
];
const OUTPUTS: [&str; 9] =
    ["out", "latents_out", "trace", "save_token", "save_noise", "compare", "sheet", "report", "cache"];

fn commands() -> Vec<Command> {
    let mut all = rarebit::cli::command();
    all.build();
    all.get_subcommands().cloned().collect()
}

fn is_path(arg: &Arg) -> bool {
    arg.get_value_parser().type_id() == TypeId::of::<PathBuf>()
}

fn takes_value(arg: &Arg) -> bool {
    arg.get_action().takes_values()
}

/// A command that does little, without the flags `left_out`.
fn base(command: &str, left_out: &[&str]) -> Vec<String> {
    let (positional, flags): (&[&str], &[(&str, &str)]) = match command {
        "generate" => (&["a red star"], &[("steps", "1")]),
        "minority" => (&["a red star"], &[("steps", "2"), ("iterations", "1"), ("t_lo", "0.1"), ("init", "word:a")]),
        "compare" => (&["a red star"], &[("steps", "1"), ("count", "1"), ("methods", "ddim")]),
        "seed" => (
            &["a red star"],
            &[("steps", "1"), ("iterations", "1"), ("starts", "1"), ("lr", "0.1"), ("references", "in.png")],
        ),
        "score" => (&["--shapes", "in.png"], &[]),
        "bench" => (&[], &[("steps", "1"), ("runs", "1"), ("warmup", "0")]),
        "inspect" => (&["--plan"], &[]),
        other => panic!("{other}: a new subcommand needs a way to be run here"),
    };
    let mut args = vec![command.to_string()];
    args.extend(flags.iter().filter(|(id, _)| !left_out.contains(id)).map(|(id, value)| flag(id, value)));
    if !left_out.contains(&"prompts") {
        args.extend(positional.iter().map(|arg| arg.to_string()));
    }
    args
}

fn flag(id: &str, value: &str) -> String {
    format!("--{}={value}", id.replace('_', "-"))
}

fn run(folder: &Path, args: &[String]) -> Output {
    std::process::Command::new(env!("CARGO_BIN_EXE_rarebit")).current_dir(folder).args(args).output().unwrap()
}

/// Runs `each` for all items on a few threads: most of a command's time is its start.
fn for_all<T: Sync>(items: &[T], each: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    each(item);
                }
            });
        }
    });
}

/// An output and another path of the same command, which are one file: in five spellings.
#[test]
fn no_output_is_an_input_or_another_output() {
    let (mut pairs, commands) = (vec![], commands());
    for command in &commands {
        let paths: Vec<&Arg> = command.get_arguments().filter(|arg| is_path(arg)).collect();
        for (one, other) in paths.iter().flat_map(|one| paths.iter().map(move |other| (one, other))) {
            let (one, other) = (one.get_id().as_str(), other.get_id().as_str());
            assert!(INPUTS.contains(&one) != OUTPUTS.contains(&one), "--{one}: is it read or written?");
            if one != other && OUTPUTS.contains(&one) {
                for spelling in ["in.png", "./in.png", "d/..//in.png", "soft.png", "hard.png"] {
                    pairs.push((command.get_name(), one, other, spelling));
                }
            }
        }
    }
    assert!(pairs.len() > 200, "{}", pairs.len());
    for_all(&pairs, |&(command, one, other, spelling)| {
        let folder = TempDir::new().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("d")).unwrap();
        // Of no kind that any of the flags takes: files are told apart before they are opened.
        fs::write(at("in.png"), "a red star\n").unwrap();
        symlink("in.png", at("soft.png")).unwrap();
        fs::hard_link(at("in.png"), at("hard.png")).unwrap();
        let before = files(folder.path());
        let mut args = base(command, &[one, other]);
        args.push(flag(one, spelling));
        if other != "images" {
            args.push(flag(other, "in.png"));
        }
        let output = run(folder.path(), &args);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
        assert_eq!(fs::read(at("in.png")).unwrap(), b"a red star\n", "{args:?}");
        assert_eq!(files(folder.path()), before, "{args:?}");
    });
}

/// Numbers beyond what anybody means: refused in one line, or done right, and soon.
#[test]
fn numbers_beyond_all_use() {
    const VALUES: [&str; 7] = ["0", "-1", "18446744073709551615", "18446744073709551616", "1e30", "NaN", ""];
    let (mut runs, mut known) = (vec![], vec![]);
    for command in commands() {
        for arg in command.get_arguments().filter(|arg| takes_value(arg) && !is_path(arg) && arg.get_long().is_some()) {
            let (id, of_text) = (arg.get_id().as_str(), arg.get_value_parser().type_id() == TypeId::of::<String>());
            let is_listed = !arg.get_possible_values().is_empty();
            if of_text || is_listed {
                continue;
            }
            // A flag means the same in all commands: what this one's parser lets pass is run once.
            let is_new = !known.contains(&id.to_string());
            known.push(id.to_string());
            for value in VALUES {
                let mut args = base(command.get_name(), &[id]);
                args.push(flag(id, value));
                args.extend(needed(id).iter().map(|arg| arg.to_string()));
                let parsed =
                    rarebit::cli::command().try_get_matches_from([&["rarebit".to_string()], &args[..]].concat());
                if is_new || parsed.is_err() {
                    runs.push((args, parsed.is_err()));
                }
            }
        }
    }
    assert!(runs.len() > 300 && known.len() > 60, "{} runs of {} flags", runs.len(), known.len());
    for_all(&runs, |(args, is_refused)| {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("in.png"), image()).unwrap();
        let started = Instant::now();
        let output = run(folder.path(), args);
        let (code, said) = (output.status.code(), text(&output.stderr));
        assert!(started.elapsed().as_secs() < 60, "{args:?}: {:?}", started.elapsed());
        assert!(!said.contains("panicked") && !said.contains("overflow"), "{args:?}: {said}");
        let is_right = match code {
            Some(0) => !is_refused,
            Some(1) => {
                !is_refused
                    && ["not finite", "infinite", "memory", "the plan needs", "NaN"]
                        .iter()
                        .any(|word| said.contains(word))
            }
            other => other == Some(2),
        };
        assert!(is_right, "{args:?}: {code:?} {said}");
        assert!(code == Some(0) || said.trim_end().lines().count() >= 1 && said.lines().all(|line| line.len() < 700));
    });
}

/// Flags without which the command would not look at this one.
fn needed(id: &str) -> &'static [&'static str] {
    match id {
        "by" => &["--best-of=2"],
        "search_step" | "search_neighbours" => &["--zero-order=2"],
        "search_epsilon" => &["--epsilon-greedy=2"],
        "search_population" | "search_elites" | "search_crossover" => &["--evolution=2"],
        id if id.starts_with("cads_") => &["--cads"],
        id if id.starts_with("sgms_") => &["--sgms=0.1"],
        _ => &[],
    }
}

/// A PNG of the `shapes` world's size, black.
fn image() -> Vec<u8> {
    let mut bytes = vec![];
    let mut encoder = png::Encoder::new(&mut bytes, 64, 64);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().unwrap().write_image_data(&[0; 3 * 64 * 64]).unwrap();
    bytes
}
