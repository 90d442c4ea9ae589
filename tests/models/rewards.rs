//! Rewards: torch's numbers, gradients against central differences in f64, two CLIPs beside each other, and scores in batches.

#[path = "../../examples/reward.rs"]
mod example;

use crate::common::auxiliary::{Clip as GoldenClip, channels_last};
use crate::common::emulated;
use crate::common::golden::data_folder;
use crate::common::inputs::noise;
use example::Brightness;
use rarebit::autodiff::{Cotangent, Request, differentiate};
use rarebit::exec::cpu::{Cpu, Real};
use rarebit::exec::cuda::Settings;
use rarebit::exec::{Data, DataMut, Executor};
use rarebit::metrics::shapes::World;
use rarebit::models::{clip_image, detect};
use rarebit::plan::plan;
use rarebit::program::{Builder, DType, Program};
use rarebit::rewards::{Aesthetic, Attributes, Clip, Reward, Scorer};
use rarebit::weights::{Component, Model};
use rarebit::{Error, Result};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

const LIMIT: f64 = 2e-5;

/// A CLIP's folder with a tokenizer beside it: single letters, the start and the end.
fn with_tokenizer(name: &str) -> TempDir {
    let folder = TempDir::new().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(data_folder(name).join(file), folder.path().join(file)).unwrap();
    }
    letters(folder.path());
    folder
}

fn letters(folder: &Path) {
    let tokens = ('a'..='z').flat_map(|c| [c.to_string(), format!("{c}</w>")]);
    let tokens = tokens.chain(["<|startoftext|>", "<|endoftext|>"].map(str::to_string));
    let vocab: serde_json::Map<_, _> = tokens.zip(0..).map(|(token, id)| (token, serde_json::json!(id))).collect();
    fs::write(folder.join("vocab.json"), serde_json::to_string(&vocab).unwrap()).unwrap();
    fs::write(folder.join("merges.txt"), "#version: 0.2\n").unwrap();
}

/// The embedded model with its reader and, held out, another CLIP.
fn model() -> Model {
    let mut model = rarebit::assets::shapes().unwrap();
    model.take(Component::Reader, rarebit::assets::shapes_reader().unwrap()).unwrap();
    model.add(Component::HeldOutClip, with_tokenizer("tiny-clip-h").path()).unwrap();
    model
}

fn attributes(model: &Model) -> Attributes {
    let world = World::embedded().unwrap();
    Attributes::new(model, move |prompt| world.parse(prompt).map_err(Error::Usage)).unwrap()
}

/// All rewards there are.
fn rewards(model: &Model) -> Vec<Box<dyn Reward>> {
    vec![
        Box::new(Clip::new(model, Component::Clip).unwrap()),
        Box::new(Clip::new(model, Component::HeldOutClip).unwrap()),
        Box::new(Aesthetic::new(model, Component::Clip).unwrap()),
        Box::new(attributes(model)),
        Box::new(Brightness),
    ]
}

const SIDE: usize = 64;
const PROMPTS: [&str; 3] = ["a red star", "a large blue ring on a gray background", "a green heart"];

/// Images of 8 bits, of smooth noise.
fn images(count: usize) -> Vec<Vec<u8>> {
    let image = |i: usize| {
        let coarse = noise("image", i, 3 * (SIDE / 8) * (SIDE / 8));
        let at = |y: usize, x: usize, c: usize| coarse[(y / 8 * (SIDE / 8) + x / 8) * 3 + c];
        let pixels = (0..SIDE * SIDE * 3).map(|k| at(k / 3 / SIDE, k / 3 % SIDE, k % 3));
        pixels.map(|x| (127.5 + 60.0 * x) as u8).collect()
    };
    (0..count).map(image).collect()
}

fn scores(cpu: &mut Cpu<f32>, reward: &dyn Reward, model: &Model, batch: usize, count: usize) -> Vec<f64> {
    scores_in(cpu, DType::F32, reward, model, batch, count)
}

fn scores_in(
    executor: &mut dyn Executor,
    dtype: DType,
    reward: &dyn Reward,
    model: &Model,
    batch: usize,
    count: usize,
) -> Vec<f64> {
    let images = images(count);
    let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
    let prompts: Vec<&str> = (0..count).map(|i| PROMPTS[i % PROMPTS.len()]).collect();
    let scorer = Scorer::plan(reward, executor, dtype, batch, [SIDE; 2]).unwrap();
    scorer.load(executor, model).unwrap().score(executor, &images, &prompts).unwrap()
}

/// The reward of one buffer of pixels, and its gradient to them.
fn program(reward: &dyn Reward, dtype: DType, shape: &[usize]) -> Program {
    let mut b = Builder::new("reward", dtype);
    let image = b.accumulator_input("pixels", shape);
    let score = reward.append(&mut b, image);
    b.output("score", score);
    let program = b.finish().unwrap();
    let request = Request { objectives: vec![(score, Cotangent::Ones)], leaves: vec![(image, "d pixels".into())] };
    differentiate(&program, &request, None).unwrap()
}

/// Loads what a reward needs and writes the prompts.
fn load<T: Real>(
    cpu: &mut Cpu<T>,
    reward: &dyn Reward,
    program: Program,
    model: &Model,
    prompts: &[&str],
) -> rarebit::exec::ProgramId {
    let mut load = |program: Program| {
        let planned = plan(program, |program, node| cpu.workspace(program, node));
        cpu.load(planned, model).unwrap()
    };
    let prepare = reward.prepare(T::DTYPE, prompts.len()).unwrap().map(&mut load);
    let id = load(program);
    reward.write(cpu, prompts).unwrap();
    prepare.into_iter().for_each(|prepare| cpu.run(prepare).unwrap());
    id
}

#[test]
fn gradients_against_central_differences() {
    let model = model();
    for reward in rewards(&model) {
        let shape = [2, SIDE, SIDE, 3];
        let len: usize = shape.iter().product();
        let mut cpu = Cpu::<f64>::new();
        let id = load(&mut cpu, &*reward, program(&*reward, DType::F64, &shape), &model, &PROMPTS[..2]);
        // Away from the clamp at ±1, and smooth enough for the reader's and towers' many layers.
        let (start, along) = (noise("pixels", 0, len), noise("along", 1, len));
        let mut at = |h: f64| {
            let x: Vec<f64> = start.iter().zip(&along).map(|(x, a)| 0.4 * x + h * a).collect();
            cpu.write("pixels", Data::F64(&x)).unwrap();
            cpu.run(id).unwrap();
            let (mut score, mut gradient) = (vec![0.0; 2], vec![0.0; len]);
            cpu.read("score", DataMut::F64(&mut score)).unwrap();
            cpu.read("d pixels", DataMut::F64(&mut gradient)).unwrap();
            (score.iter().sum::<f64>(), gradient)
        };
        let slope: f64 = at(0.0).1.iter().zip(&along).map(|(d, a)| d * a).sum();
        let mut error = |h: f64| ((at(h).0 - at(-h).0) / (2.0 * h) - slope).abs() / slope.abs();
        let best = [1e-3, 1e-4, 1e-5, 1e-6].into_iter().map(&mut error).fold(f64::INFINITY, f64::min);
        println!("{}: slope {slope:.3e}, off by {best:.1e}", reward.name());
        assert!(slope != 0.0 && best <= 1e-6, "{}: {best:e}", reward.name());
    }
}

/// The golden pairs: the reward of an image and a text is their logit over the scale.
#[test]
fn clip_similarity_is_torchs() {
    let folder = TempDir::new().unwrap();
    // The pair of `tiny-clip-l` lies in several folders.
    for part in ["clip", "text_encoder"] {
        fs::create_dir(folder.path().join(part)).unwrap();
        for entry in fs::read_dir(data_folder("tiny-clip-l").join(part)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), folder.path().join(part).join(entry.file_name())).unwrap();
        }
    }
    letters(&folder.path().join("clip"));
    let l = Model::open(folder.path()).unwrap();
    let h = Model::network(Component::Clip, with_tokenizer("tiny-clip-h").path()).unwrap();
    for (golden, model) in [(GoldenClip::l(), l), (GoldenClip::h(), h)] {
        let reward = Clip::new(&model, Component::Clip).unwrap();
        let case = golden.golden.cases("logits").next().unwrap();
        let pixels = golden.golden.tensor(&case.text("pixels")).unwrap();
        let [batch, _, height, width] = pixels.shape[..] else { panic!("no images") };
        let (ids, ends) = (golden.golden.ints("text/ids"), golden.golden.ints("text/ends"));
        let logits = golden.golden.tensor("logits").unwrap().data;
        let scale = golden.config.logit_scale.unwrap().exp() as f32;
        for text in 0..ends.len() {
            let program = program(&reward, DType::F32, &[batch, height, width, 3]);
            let mut cpu = Cpu::<f32>::new();
            let id = load(&mut cpu, &reward, program, &model, &vec!["a b"; batch]);
            // The same text for every image, in the place of the prompt's.
            let tokens = ids.len() / ends.len();
            let row = &ids[text * tokens..][..tokens];
            let prepare = reward.prepare(DType::F32, batch).unwrap().unwrap();
            let planned = plan(prepare, |program, node| cpu.workspace(program, node));
            let prepare = cpu.load(planned, &model).unwrap();
            cpu.write(&format!("clip.ids {batch}"), Data::I32(&row.repeat(batch))).unwrap();
            cpu.write(&format!("clip.ends {batch}"), Data::I32(&vec![ends[text]; batch])).unwrap();
            cpu.run(prepare).unwrap();
            cpu.write("pixels", Data::F32(&channels_last(&pixels))).unwrap();
            cpu.run(id).unwrap();
            let mut found = vec![0.0f32; batch];
            cpu.read("score", DataMut::F32(&mut found)).unwrap();
            for (image, found) in found.iter().enumerate() {
                let expected = logits[image * ends.len() + text] / scale;
                assert!(
                    (found - expected).abs() as f64 <= LIMIT,
                    "image {image}, text {text}: {found}, not {expected}"
                );
            }
        }
    }
}

/// The prompt decides: each of three renders is likeliest, by the reader and by CLIP, under what it shows.
#[test]
fn rewards_know_what_a_prompt_states() {
    let bytes = fs::read(data_folder("shapes").join("reader.safetensors")).unwrap();
    let golden = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (scenes, cells) = (golden.tensor("scenes").unwrap(), golden.tensor("cells").unwrap());
    let world = World::embedded().unwrap();
    let cells: Vec<i64> = cells.data().as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
    let index = |name: &str| world.attributes.iter().position(|a| a.name == name).unwrap();
    let word = |scene: usize, name: &str| {
        let i = index(name);
        world.attributes[i].values[cells[scene * world.attributes.len() + i] as usize].clone()
    };
    // Scenes of different shapes.
    let mut picked: Vec<usize> = vec![];
    for scene in 0..scenes.shape()[0] {
        if picked.len() < 3 && picked.iter().all(|other| word(*other, "shape") != word(scene, "shape")) {
            picked.push(scene);
        }
    }
    let captions: Vec<String> = picked
        .iter()
        .map(|&scene| {
            format!("a {} {} on a {} background", word(scene, "colour"), word(scene, "shape"), word(scene, "bg"))
        })
        .collect();
    let model = model();
    for reward in [&Clip::new(&model, Component::Clip).unwrap() as &dyn Reward, &attributes(&model)] {
        let mut cpu = Cpu::<f32>::new();
        let scorer = Scorer::plan(reward, &cpu, DType::F32, 2, [SIDE; 2]).unwrap();
        let scorer = scorer.load(&mut cpu, &model).unwrap();
        for &scene in &picked {
            let image = &scenes.data()[scene * 3 * SIDE * SIDE..][..3 * SIDE * SIDE];
            let prompts: Vec<&str> = captions.iter().map(String::as_str).collect();
            let found = scorer.score(&mut cpu, &[image; 3], &prompts).unwrap();
            let best = (0..3).max_by(|a, b| found[*a].total_cmp(&found[*b])).unwrap();
            assert_eq!(picked[best], scene, "{}: {found:?} for {captions:?}", reward.name());
            assert!(reward.name() == "clip" || (found[best] <= 0.0 && found[best] > -0.1), "{found:?}");
        }
        let error = scorer.score(&mut cpu, &[&images(1)[0]], &["no caption"]).err();
        assert_eq!(error.is_some(), reward.name() == "shapes", "{error:?}");
    }
}

/// A score has the same bits in any batch, among any neighbours, and beside any programs of the executor.
#[test]
fn scores_are_the_same_in_any_company() {
    let model = model();
    let alone: Vec<Vec<f64>> =
        rewards(&model).iter().map(|reward| scores(&mut Cpu::new(), &**reward, &model, 1, 5)).collect();
    let mut cpu = Cpu::<f32>::new();
    for batch in [1, 2, 5] {
        for (reward, alone) in rewards(&model).iter().zip(&alone) {
            assert_eq!(scores(&mut cpu, &**reward, &model, batch, 5), *alone, "{} by {batch}", reward.name());
        }
    }
    assert!(alone.iter().all(|scores| scores[0] != scores[1]), "{alone:?}");
    // Black to white.
    let gray = |level: u8| vec![level; 3 * SIDE * SIDE];
    let scorer = Scorer::plan(&Brightness, &cpu, DType::F32, 2, [SIDE; 2]).unwrap().load(&mut cpu, &model).unwrap();
    let found = scorer.score(&mut cpu, &[&gray(0), &gray(255), &gray(51)], &[""; 3]).unwrap();
    let off = found.iter().zip([-1.0, 1.0, -0.6]).map(|(found, expected)| (found - expected).abs());
    assert!(off.fold(0.0, f64::max) < LIMIT, "{found:?}");
}

/// On a device in f16, within what 11 bits explain.
#[test]
fn scores_in_sixteen_bits() {
    let model = model();
    for reward in rewards(&model) {
        let expected = scores(&mut Cpu::new(), &*reward, &model, 2, 2);
        let mut device = emulated::cuda(Settings::default().workers(2));
        let found = scores_in(&mut device, DType::F16, &*reward, &model, 2, 2);
        let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs() / b.abs().max(1.0)).fold(0.0, f64::max);
        println!("{}: {found:?}, {expected:?} in f32, off by {off:.1e}", reward.name());
        assert!(off <= 3e-3, "{}: {off:.1e}", reward.name());
    }
}

/// The features of an image by one of a model's CLIPs.
fn features(executor: &mut dyn Executor, model: &Model, component: Component) -> Vec<f32> {
    let config = detect::clip_config(model, component).unwrap();
    let mut b = Builder::new("features", DType::F32);
    let image = b.input("image", &[1, SIDE, SIDE, 3]);
    let image = config.preprocess.append(&mut b, image);
    let features = clip_image::features(&mut b, &config.image, component, image);
    let name = format!("features of {}", config.image.projection);
    b.output(&name, features);
    let planned = plan(b.finish().unwrap(), |program, node| executor.workspace(program, node));
    let id = executor.load(planned, model).unwrap();
    let pixels: Vec<f64> = noise("features", 0, SIDE * SIDE * 3).iter().map(|x| 0.5 * x).collect();
    executor.write("image", Data::F64(&pixels)).unwrap();
    executor.run(id).unwrap();
    let mut found = vec![0.0; config.image.projection];
    executor.read(&name, DataMut::F32(&mut found)).unwrap();
    found
}

/// Every pair of three CLIPs as the optimised and the held-out one of a model, on one executor: the bits each has alone.
#[test]
fn two_clips_side_by_side() {
    let embedded = || rarebit::assets::shapes().unwrap();
    let folders = [("tiny-clip-l", "clip"), ("tiny-clip-h", "")];
    let alone = |component: Component| {
        folders.map(|(name, inside)| {
            let model = Model::network(component, &data_folder(name).join(inside));
            // The pair of `tiny-clip-l` shares files beside its folder, which a model opened there finds.
            features(&mut Cpu::<f32>::new(), &model.unwrap(), component)
        })
    };
    let first = alone(Component::Clip);
    assert_eq!(first, alone(Component::HeldOutClip), "by whichever name");
    let shapes = features(&mut Cpu::<f32>::new(), &embedded(), Component::Clip);
    for ((name, inside), expected) in folders.iter().zip(&first) {
        let mut model = embedded();
        model.add(Component::HeldOutClip, &data_folder(name).join(inside)).unwrap();
        let mut cpu = Cpu::<f32>::new();
        assert_eq!(features(&mut cpu, &model, Component::HeldOutClip), *expected, "{name}");
        assert_eq!(features(&mut cpu, &model, Component::Clip), shapes);
        assert_eq!(
            model.fingerprint().unwrap(),
            embedded().fingerprint().unwrap(),
            "what scores says nothing about what makes images"
        );
    }
}

/// Weights of one name from another model, or put in the place of those that were loaded, are never taken for each other.
#[test]
fn an_executor_tells_models_apart() {
    let file = data_folder("tiny-clip-h").join("model.safetensors");
    let folder = TempDir::new().unwrap();
    fs::copy(data_folder("tiny-clip-h").join("config.json"), folder.path().join("config.json")).unwrap();
    // The same network with other numbers: every tensor backwards.
    let bytes = fs::read(file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let reversed: Vec<(String, Vec<u8>)> = tensors
        .iter()
        .map(|(name, view)| (name.to_string(), view.data().rchunks(2).flatten().copied().collect()))
        .collect();
    let views = reversed.iter().map(|(name, data)| {
        let view = tensors.tensor(name).unwrap();
        (name.clone(), safetensors::tensor::TensorView::new(view.dtype(), view.shape().to_vec(), data).unwrap())
    });
    fs::write(folder.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();

    let open = |path: &Path| Model::network(Component::Clip, path).unwrap();
    let emulated = || emulated::cuda(Settings::default().workers(2));
    let executors: [&dyn Fn() -> Box<dyn Executor>; 2] = [&|| Box::new(Cpu::<f32>::new()), &|| Box::new(emulated())];
    for executor in executors {
        let mut one = open(&data_folder("tiny-clip-h"));
        let other = open(folder.path());
        let expected = [&one, &other].map(|model| features(&mut *executor(), model, Component::Clip));
        assert_ne!(expected[0], expected[1]);
        let mut shared = executor();
        assert_eq!(features(&mut *shared, &one, Component::Clip), expected[0]);
        assert_eq!(features(&mut *shared, &other, Component::Clip), expected[1]);
        one.add(Component::Clip, folder.path()).unwrap();
        assert_eq!(features(&mut *shared, &one, Component::Clip), expected[1], "put in the place of the first");
        // What another model has is no answer for one that lacks it.
        let policy = Model::network(Component::Policy, &data_folder("tiny-gpt2")).unwrap();
        let error = load_error(&mut *shared, &other, &policy);
        assert!(error.contains("is missing from the clip") && error.contains("tiny-gpt2"), "{error}");
    }
}

/// Loading the CLIP of `like` with the weights of `model`.
fn load_error(executor: &mut dyn Executor, like: &Model, model: &Model) -> String {
    let config = detect::clip_config(like, Component::Clip).unwrap();
    let mut b = Builder::new("features", DType::F32);
    let image = b.input("small image", &[1, 28, 28, 3]);
    let features = clip_image::features(&mut b, &config.image, Component::Clip, image);
    b.output("small features", features);
    let planned = plan(b.finish().unwrap(), |program, node| executor.workspace(program, node));
    executor.load(planned, model).unwrap_err().to_string()
}

#[test]
fn mistakes_are_one_line() {
    let model = model();
    let one_line = |error: Option<Error>, what: &str| {
        let error = error.expect("an error").to_string();
        assert!(error.contains(what) && !error.contains('\n'), "{error}");
    };
    let bare = Model::network(Component::Clip, &data_folder("tiny-clip-h")).unwrap();
    one_line(Clip::new(&bare, Component::Clip).err(), "vocab.json");
    one_line(Clip::new(&bare, Component::HeldOutClip).err(), "clip_held_out");
    one_line(Aesthetic::new(&model, Component::HeldOutClip).err(), "of the 24 of the CLIP");
    one_line(Attributes::new(&rarebit::assets::shapes().unwrap(), |_| Ok(vec![])).err(), "reader");
    let mut taken = Model::network(Component::Clip, &data_folder("tiny-clip-h")).unwrap();
    one_line(taken.take(Component::Reader, rarebit::assets::shapes().unwrap()).err(), "has no reader");

    let mut cpu = Cpu::<f32>::new();
    let shapes = attributes(&model);
    one_line(Scorer::plan(&shapes, &cpu, DType::F32, 1, [32; 2]).err(), "takes 64x64 images");
    let short = Attributes::new(&model, |_| Ok(vec![None])).unwrap();
    let scorer = Scorer::plan(&short, &cpu, DType::F32, 1, [SIDE; 2]).unwrap().load(&mut cpu, &model).unwrap();
    let image = &images(1)[0];
    one_line(scorer.score(&mut cpu, &[image], &["a ring"]).err(), "'a ring' states [None]");
    one_line(scorer.score(&mut cpu, &[image], &[]).err(), "1 images and 0 prompts");
    one_line(scorer.score(&mut cpu, &[&image[1..]], &["a ring"]).err(), "an image of 12287 bytes");

    struct Wrong;
    impl Reward for Wrong {
        fn name(&self) -> &str {
            "wrong"
        }
        fn append(&self, _: &mut Builder, image: rarebit::program::ValueId) -> rarebit::program::ValueId {
            image
        }
    }
    let planned: Result<_> = Scorer::plan(&Wrong, &cpu, DType::F32, 2, [SIDE; 2]);
    one_line(planned.err(), "a number per image is [2]");
}
