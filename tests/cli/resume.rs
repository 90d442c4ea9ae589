//! What counts as already made: that image, whole, with everything that was asked for beside it.

use crate::common::command::{fails, files, path, rarebit, succeeds, text};
use crate::common::golden::data_folder;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// A prompt file and a folder for its images, with flags that take little time.
struct Run {
    folder: TempDir,
    args: Vec<String>,
}

impl Run {
    fn new(command: &str, prompts: &str, flags: &[&str]) -> Run {
        let folder = TempDir::new().unwrap();
        fs::write(folder.path().join("prompts.txt"), prompts).unwrap();
        let (prompts, images) = (path(&folder, "prompts.txt"), path(&folder, "images"));
        let model = data_folder("tiny-sd1").display().to_string();
        let args = [command, "--prompts", &prompts, "--out", &images, "--model", &model, "--quiet"];
        let args = [&args[..], flags].concat().iter().map(|arg| arg.to_string()).collect();
        Run { folder, args }
    }

    fn with<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        self.args.iter().map(String::as_str).chain(more.iter().copied()).collect()
    }

    /// Runs it and counts the images it says it made.
    #[track_caller]
    fn makes(&self, more: &[&str]) -> usize {
        succeeds(&self.with(more)).lines().count()
    }

    fn image(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join("images").join(name)
    }
}

#[test]
fn a_damaged_image_is_made_again_and_others_files_are_kept() {
    let run = Run::new("generate", "a cat\na dog\n", &["--steps", "1"]);
    assert_eq!(run.makes(&[]), 2);
    let image = run.image("00001-0.png");
    let whole = fs::read(&image).unwrap();
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    // Cut in its pixels, without its end, with a wrong bit or two in the pixels: ours, and no image.
    let pixels = whole.windows(4).position(|four| four == b"IDAT").unwrap();
    for damaged in
        [&b""[..], &whole[..pixels + 20], &whole[..whole.len() - 12], &whole[..whole.len() - 1], &flipped(pixels + 9)]
    {
        fs::write(&image, damaged).unwrap();
        assert_eq!(run.makes(&[]), 1, "{} of {} bytes", damaged.len(), whole.len());
        assert_eq!(fs::read(&image).unwrap(), whole);
    }
    let mut foreign = vec![];
    png::Encoder::new(&mut foreign, 64, 64).write_header().unwrap().write_image_data(&[0; 64 * 64]).unwrap();
    let grown = [&whole[..], b"more"].concat();
    for (bytes, word) in
        [(&b"somebody's"[..], "no whole PNG"), (&foreign, "does not say"), (&flipped(20), "no whole PNG")]
    {
        fs::write(&image, bytes).unwrap();
        fails(&run.with(&[]), 2, &["00001-0.png", word, "--overwrite"]);
        assert_eq!(fs::read(&image).unwrap(), bytes);
    }
    fs::write(&image, grown).unwrap();
    assert_eq!(run.makes(&[]), 1);
}

/// Without records a run cannot know, and says so.
#[test]
fn images_that_do_not_say_how_they_were_made() {
    let run = Run::new("generate", "a cat\na dog\n", &["--steps", "1"]);
    assert_eq!(run.makes(&["--no-metadata"]), 2);
    let again = rarebit(&run.with(&["--no-metadata"]));
    assert!(again.status.success() && again.stdout.is_empty());
    assert!(text(&again.stderr).contains("2 images are there that do not say"), "{}", text(&again.stderr));
    fails(&run.with(&[]), 2, &["does not say how it was made"]);
}

/// The embeddings decide, where a prompt or the negative prompt names them; another name of the model does not.
#[test]
fn learned_tokens_decide() {
    let run = Run::new("generate", "a <n>\n", &["--steps", "1"]);
    let token = |name: &str, word: &str, scale: f32| {
        let values: Vec<u8> = (0..64).flat_map(|i| ((i as f32 * 0.7).sin() * scale).to_le_bytes()).collect();
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1, 64], &values).unwrap();
        let file = run.folder.path().join(name);
        fs::write(&file, safetensors::serialize([(word, view)], None).unwrap()).unwrap();
        file.display().to_string()
    };
    let (one, other, copy) = (token("1.st", "<n>", 1.0), token("2.st", "<n>", 3.0), token("copy.st", "<n>", 1.0));
    let unused = token("3.st", "<unused>", 1.0);
    assert_eq!(run.makes(&["--token", &one]), 1);
    for same in [&["--token", &one][..], &["--token", &copy], &["--token", &unused, "--token", &one]] {
        assert_eq!(run.makes(same), 0);
    }
    fails(&run.with(&["--token", &other]), 2, &["00001-0.png", "other settings"]);
    fails(&run.with(&[]), 2, &["00001-0.png", "other settings"]);

    let run = Run::new("generate", "a cat\n", &["--steps", "1", "--negative", "<n>"]);
    assert_eq!(run.makes(&["--token", &one]), 1);
    assert_eq!(run.makes(&["--token", &one]), 0);
    fails(&run.with(&["--token", &other]), 2, &["other settings"]);
}

#[test]
fn what_belongs_to_an_image_is_made_by_the_next_run() {
    let flags = ["--steps", "4", "--t-lo", "0.2", "--iterations", "2", "--init", "random"];
    let run = Run::new("minority", "a cat\na dog\n", &flags);
    let (token, trace) = (path(&run.folder, "x.st"), path(&run.folder, "t.jsonl"));
    let all = ["--save-token", &token, "--trace", &trace];
    // A folder in the way is found before anything is made.
    fs::create_dir(path(&run.folder, "x-00001-0.st")).unwrap();
    fails(&run.with(&all), 2, &["x-00001-0.st", "is a folder"]);
    fs::remove_dir(path(&run.folder, "x-00001-0.st")).unwrap();
    assert!(!run.image("00001-0.png").exists());

    assert_eq!(run.makes(&all), 2);
    assert_eq!(run.makes(&all), 0);
    let whole = fs::read(&trace).unwrap();
    let second = path(&run.folder, "x-00002-0.st");
    let learned = fs::read(&second).unwrap();
    for damage in [None, Some(&learned[..learned.len() - 1])] {
        match damage {
            None => fs::remove_file(&second).unwrap(),
            Some(bytes) => fs::write(&second, bytes).unwrap(),
        }
        assert_eq!(run.makes(&all), 1);
        assert_eq!(fs::read(&second).unwrap(), learned);
        assert_eq!(fs::read(&trace).unwrap(), whole, "its lines are there once");
    }
    // Cut within the lines of the last image, and away.
    for length in [whole.len() - 1, whole.len() * 3 / 4, whole.len() / 4, 0] {
        fs::write(&trace, &whole[..length]).unwrap();
        run.makes(&all);
        let lines = |bytes: &[u8]| bytes.split(|&byte| byte == b'\n').map(<[u8]>::to_vec).collect::<Vec<_>>();
        let found = fs::read(&trace).unwrap();
        assert!(lines(&whole).iter().all(|line| lines(&found).contains(line)), "{length}");
    }
    // Without anything to trace it is no reason to make images again.
    let none =
        Run::new("minority", "a cat\n", &["--steps", "4", "--t-lo", "0.2", "--iterations", "0", "--init", "random"]);
    let trace = path(&none.folder, "t.jsonl");
    assert_eq!((none.makes(&["--trace", &trace]), none.makes(&["--trace", &trace])), (1, 0));
}

#[test]
fn a_trace_is_never_lost() {
    let flags = ["--steps", "4", "--t-lo", "0.2", "--iterations", "2", "--init", "random"];
    let run = Run::new("minority", "a cat\n", &flags);
    let trace = path(&run.folder, "t.jsonl");
    assert_eq!(run.makes(&["--trace", &trace]), 1);
    let first = fs::read(&trace).unwrap();
    fs::write(run.folder.path().join("prompts.txt"), "a cat\na dog\n").unwrap();
    assert_eq!(run.makes(&["--trace", &trace]), 1);
    let both = fs::read(&trace).unwrap();
    assert!(both.starts_with(&first) && both.len() > first.len());
    // A refused run leaves it, as does a file that is no trace, and one of other images.
    fails(&run.with(&["--trace", &trace, "--memory-limit", "1M", "--overwrite"]), 1, &["--memory-limit"]);
    assert_eq!(fs::read(&trace).unwrap(), both);
    fails(&run.with(&["--trace", &trace, "--count", "2"]), 2, &["the trace of other images"]);
    let note = path(&run.folder, "note.txt");
    fs::write(&note, "precious").unwrap();
    fails(&run.with(&["--trace", &note]), 2, &["note.txt", "no trace"]);
    assert_eq!(fs::read(&note).unwrap(), b"precious");
    assert_eq!(run.makes(&["--trace", &trace, "--overwrite"]), 2);
    assert_eq!(fs::read(&trace).unwrap(), both);
}

/// Which images a file of latents is of is said where it is not of all.
#[test]
fn latents_of_a_resumed_run() {
    let run = Run::new("generate", "a cat\na dog\n", &["--steps", "1"]);
    assert_eq!(run.makes(&[]), 2);
    let latents = path(&run.folder, "l.safetensors");
    let none = rarebit(&run.with(&["--latents-out", &latents]));
    assert!(none.status.success() && text(&none.stderr).contains("--latents-out is not written"));
    fs::remove_file(run.image("00002-0.png")).unwrap();
    let one = rarebit(&run.with(&["--latents-out", &latents]));
    assert!(one.status.success() && text(&one.stderr).contains("--latents-out holds the 1 images of this run"));
    assert_eq!(files(run.folder.path()), ["images", "l.safetensors", "prompts.txt"]);
}

/// Another name of the same model is the same model.
#[test]
fn a_model_may_be_renamed() {
    let run = Run::new("generate", "a cat\n", &["--steps", "1"]);
    assert_eq!(run.makes(&[]), 1);
    let link = run.folder.path().join("renamed");
    std::os::unix::fs::symlink(data_folder("tiny-sd1"), &link).unwrap();
    let args = run.args.iter().map(|arg| match Path::new(arg) == data_folder("tiny-sd1") {
        true => link.display().to_string(),
        false => arg.clone(),
    });
    let args: Vec<String> = args.collect();
    assert_eq!(succeeds(&args.iter().map(String::as_str).collect::<Vec<_>>()), "");
}
