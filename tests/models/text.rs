//! The promise: prompts become the ids transformers gives them, for any text, and no file content panics.

use rarebit::text::{END, OPEN_CLIP_PAD, START, Tokenizer};
use serde_json::Value;

const VOCAB: &[u8] = include_bytes!("../../src/assets/shapes/tokenizer/vocab.json");
const MERGES: &[u8] = include_bytes!("../../src/assets/shapes/tokenizer/merges.txt");
const CONFIG: &[u8] = include_bytes!("../../src/assets/shapes/tokenizer/tokenizer_config.json");
const MAP: &[u8] = include_bytes!("../../src/assets/shapes/tokenizer/special_tokens_map.json");
const GOLDEN: &str = include_str!("../data/clip_tokens.json");

/// More than any vocabulary here needs.
const ROWS: usize = 1 << 20;

fn shapes() -> Tokenizer {
    Tokenizer::from_bytes(VOCAB, MERGES, Some(CONFIG), Some(MAP)).expect("shapes tokenizer")
}

fn clip() -> Tokenizer {
    Tokenizer::clip(END).expect("embedded tokenizer")
}

#[test]
fn added_tokens_continue_the_vocabulary() {
    let plain = shapes();
    let next = plain.vocab_size();
    let list = format!("{{\"<cat-toy>\": {next}, \"{END}\": {}}}", plain.end());
    let added = shapes().with_added_tokens(Some(list.as_bytes()), Some(CONFIG), None, ROWS).expect("added");
    assert_eq!(added.vocab_size(), next + 1);
    let ids = added.encode("a <cat-toy> star").expect("ids").ids;
    assert_eq!(ids.iter().filter(|&&id| id == next as i32).count(), 1);
    assert_eq!(added.encode("a star").expect("ids"), plain.encode("a star").expect("ids"));
    let decoder = format!("{{\"added_tokens_decoder\": {{\"{next}\": {{\"content\": \"<x>\"}}}}}}");
    assert_eq!(
        shapes().with_added_tokens(None, Some(decoder.as_bytes()), None, ROWS).expect("added").vocab_size(),
        next + 1
    );
    let gap = format!("{{\"<x>\": {}}}", next + 5);
    let error = shapes().with_added_tokens(Some(gap.as_bytes()), None, None, ROWS).err().expect("a gap").to_string();
    assert!(error.contains("<x>") && error.contains(&next.to_string()), "{error}");
}

#[test]
fn added_tokens_that_do_not_fit_are_refused() {
    let next = shapes().vocab_size();
    let list = format!("{{\"<x>\": {next}}}");
    let decoder = |text: &str| format!("{{\"added_tokens_decoder\": {text}}}");
    let other = decoder(&format!("{{\"{next}\": {{\"content\": \"<y>\"}}}}"));
    let long = format!("{{\"{}\": 1}}", "x".repeat(5000));
    let cases: [(Option<&str>, Option<&str>, &str, &str); 9] = [
        (Some("<html>"), None, "added_tokens.json", "is a web page (HTML), not JSON"),
        (Some("[1]"), None, "added_tokens.json", "not an object"),
        (Some("{\"<x>\": \"1\"}"), None, "added_tokens.json", "lacks its id"),
        (Some("{\" \": 1054}"), None, "added_tokens.json", "is blank"),
        (Some(&long), None, "added_tokens.json", "xxx…' has id 1, the next free one is"),
        (Some("{\"<|endoftext|>\": 3}"), None, "added_tokens.json", "in the vocabulary it has 1053"),
        (Some(&list), Some(&other), "tokenizer_config.json", "is '<y>', in added_tokens.json it is '<x>'"),
        (None, Some(&decoder("[]")), "tokenizer_config.json", "not an object"),
        (None, Some(&decoder("{\"819\": {\"text\": \"<x>\"}}")), "tokenizer_config.json", "lacks its id or text"),
    ];
    for (list, config, file, why) in cases {
        let bytes = |text: Option<&str>| text.map(|text| text.as_bytes().to_vec());
        let (list, config) = (bytes(list), bytes(config));
        let refused = shapes().with_added_tokens(list.as_deref(), config.as_deref(), None, ROWS);
        let error = refused.err().expect("refused").to_string();
        assert!(error.starts_with(file) && error.contains(why) && error.len() < 200, "{error}");
    }
    let same = decoder(&format!("{{\"{next}\": {{\"content\": \"<x>\"}}}}"));
    let both = shapes().with_added_tokens(Some(list.as_bytes()), Some(same.as_bytes()), None, next + 1);
    assert_eq!(both.expect("the same token twice").vocab_size(), next + 1);
    let error = shapes().with_added_tokens(Some(list.as_bytes()), None, None, next).err().expect("no row").to_string();
    assert_eq!(error, format!("has {} tokens but the text encoder embeds {next}", next + 1));
}

/// The work grows with the number of tokens, not with its square: a hundred thousand are added, or refused, in about a second. The
/// bound is for slow machines; the square took minutes.
#[test]
fn a_hundred_thousand_added_tokens_take_no_longer_than_they_must() {
    let next = shapes().vocab_size();
    let entries: Vec<String> = (0..100_000).map(|i| format!("\"<x{i}>\": {}", next + i)).collect();
    let list = format!("{{{}}}", entries.join(","));
    let started = std::time::Instant::now();
    assert!(shapes().with_added_tokens(Some(list.as_bytes()), None, None, next + 9).is_err());
    let added = shapes().with_added_tokens(Some(list.as_bytes()), None, None, ROWS).expect("added");
    assert_eq!(added.vocab_size(), next + 100_000);
    let ids = added.encode("a <x99999> star").expect("ids").ids;
    assert!(ids.contains(&(next as i32 + 99_999)), "{ids:?}");
    assert!(started.elapsed().as_secs() < 20, "{:?}", started.elapsed());
}

#[test]
fn ids_are_those_of_transformers() {
    let golden: Value = serde_json::from_str(GOLDEN).expect("golden file");
    let cases = golden["cases"].as_array().expect("cases");
    assert!(cases.len() >= 60, "golden file has lost cases");
    let tokenizers =
        [("shapes", shapes()), ("clip", clip()), ("open_clip", Tokenizer::clip(OPEN_CLIP_PAD).expect("embedded"))];
    for case in cases {
        let prompt = case["prompt"].as_str().expect("prompt");
        for (name, tokenizer) in &tokenizers {
            let mut expected: Vec<i32> = serde_json::from_value(case[name].clone()).expect("ids");
            // The file keeps one of the padding ids.
            expected.resize(tokenizer.max_length(), *expected.last().expect("ids"));
            let got = tokenizer.encode(prompt).expect("encode");
            assert_eq!(got.ids, expected, "{name}: {prompt:?}");
            assert_eq!(
                got.eos,
                expected.iter().position(|&id| id == tokenizer.end()).expect("end"),
                "{name}: {prompt:?}"
            );
        }
    }
}

#[test]
fn the_embedded_vocabulary_is_clip() {
    let tokenizer = clip();
    assert_eq!((tokenizer.vocab_size(), tokenizer.max_length()), (49_408, 77));
    assert_eq!((tokenizer.start(), tokenizer.end(), tokenizer.pad()), (49_406, 49_407, 49_407));
    assert_eq!(Tokenizer::clip(OPEN_CLIP_PAD).expect("embedded").pad(), 0);
    assert!(Tokenizer::clip("no such token").is_err());
    // OpenAI's own example.
    let ids = tokenizer.encode("a diagram").expect("encode").ids;
    assert_eq!(ids[..4], [49_406, 320, 22_697, 49_407]);
}

#[test]
fn what_does_not_fit_is_reported() {
    let tokenizer = shapes().with_max_length(6);
    let prompt = "A Red circle and the BLUE square";
    let encoded = tokenizer.encode(prompt).expect("encode");
    assert_eq!(encoded.ids.len(), 6);
    assert_eq!((encoded.ids[0], encoded.ids[5], encoded.eos), (tokenizer.start(), tokenizer.end(), 5));
    assert_eq!(tokenizer.token_count(prompt).expect("count"), 4 + encoded.truncated.len());
    assert!(prompt.replace(' ', "").ends_with(&encoded.truncated.concat()), "{:?}", encoded.truncated);
    assert!(encoded.truncated.concat().ends_with("BLUEsquare"));
    assert!(shapes().encode("a red circle").expect("encode").truncated.is_empty());
    assert_eq!(shapes().with_max_length(0).encode("a").expect("encode").ids.len(), 2);
    let emoji = clip().encode(&"😀👨‍👩‍👧‍👦é".repeat(40)).expect("encode");
    assert!(!emoji.truncated.is_empty());
}

#[test]
fn placeholders_are_new_ids_found_anywhere() {
    let mut tokenizer = clip();
    let id = tokenizer.add_placeholder("<rare>", false).expect("placeholder");
    assert_eq!((id, tokenizer.vocab_size()), (49_408, 49_409));
    let ids = tokenizer.encode("a photo of a <rare> cat").expect("encode").ids;
    assert_eq!(ids[..8], [49_406, 320, 1125, 539, 320, 49_408, 2368, 49_407]);
    assert_eq!(tokenizer.add_placeholder("*", false).expect_err("taken").exit_code(), 2);
    assert!(tokenizer.add_placeholder("<rare>", false).is_err() && tokenizer.add_placeholder(" ", false).is_err());
    assert_eq!(tokenizer.add_placeholder("<other>", false).expect("placeholder"), 49_409);
}

#[test]
fn the_pad_token_comes_from_the_right_file() {
    let pad = |config: &str, map: Option<&str>| {
        Tokenizer::from_bytes(VOCAB, MERGES, Some(config.as_bytes()), map.map(str::as_bytes)).expect("tokenizer").pad()
    };
    let end = shapes().end();
    assert_eq!(pad("{}", None), end);
    assert_eq!(pad(r#"{"pad_token":"!"}"#, None), 0);
    assert_eq!(pad(r#"{"pad_token":"<|endoftext|>"}"#, Some(r#"{"pad_token":"!"}"#)), 0);
    assert_eq!(
        pad(r#"{"pad_token":"!"}"#, Some(r#"{"pad_token":{"content":"<|endoftext|>","normalized":true}}"#)),
        end
    );
    assert_eq!(pad(r#"{"pad_token":"!","added_tokens_decoder":{}}"#, Some(r#"{"pad_token":"<|endoftext|>"}"#)), 0);
}

#[test]
fn lengths_come_from_the_config() {
    let length = |config: &str| {
        Tokenizer::from_bytes(VOCAB, MERGES, Some(config.as_bytes()), None).map(|t| t.max_length()).unwrap_or(0)
    };
    assert_eq!(shapes().max_length(), 32);
    assert_eq!(length(r#"{"model_max_length":40}"#), 40);
    for none in ["{}", r#"{"model_max_length":1e30}"#, r#"{"model_max_length":1000000000000000019884624838656}"#, "7"] {
        assert_eq!(length(none), 77, "{none}");
    }
    assert_eq!(length(r#"{"model_max_length":1}"#), 0);
}

#[test]
fn tokenizer_json_gives_the_same_ids() {
    let vocab: Value = serde_json::from_slice(VOCAB).expect("vocab");
    let text = std::str::from_utf8(MERGES).expect("merges");
    let lines: Vec<&str> = text.lines().skip(1).collect();
    let pairs: Vec<Vec<&str>> = lines.iter().map(|l| l.split(' ').collect()).collect();
    for merges in [serde_json::json!(lines), serde_json::json!(pairs)] {
        let model = serde_json::json!({"type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": merges});
        let json = serde_json::json!({ "model": model }).to_string();
        let tokenizer = Tokenizer::from_tokenizer_json(json.as_bytes(), Some(CONFIG), None).expect("tokenizer");
        let prompt = "a large red circle, don't!";
        assert_eq!(tokenizer.encode(prompt).expect("encode"), shapes().encode(prompt).expect("encode"));
        let folder = tempfile::tempdir().expect("folder");
        std::fs::write(folder.path().join("tokenizer.json"), &json).expect("write");
        std::fs::write(folder.path().join("tokenizer_config.json"), CONFIG).expect("write");
        let tokenizer = Tokenizer::from_folder(folder.path()).expect("folder");
        assert_eq!(tokenizer.encode(prompt).expect("encode"), shapes().encode(prompt).expect("encode"));
    }
}

#[test]
fn malformed_files_are_named_in_one_line() {
    let good = r#"{"a":0,"b":1,"ab":2,"<|startoftext|>":3,"<|endoftext|>":4}"#;
    let bad: [(&[u8], &[u8], &str); 11] = [
        (b"", b"", "vocab.json"),
        (b"[]", b"", "vocab.json"),
        (b"{\"a\":-1}", b"", "vocab.json"),
        (b"{\"a\":1e400}", b"", "vocab.json"),
        (b"{}", b"", "vocab.json"),
        (b"{\"a\":0,\"<|startoftext|>\":0,\"<|endoftext|>\":1}", b"", "merges.txt"),
        (b"{\"a\":4294967295,\"<|startoftext|>\":0,\"<|endoftext|>\":1}", b"", "merges.txt"),
        (good.as_bytes(), b"\xff\xfe", "merges.txt"),
        (good.as_bytes(), b"ab", "merges.txt"),
        (good.as_bytes(), b"a c", "merges.txt"),
        // Longer than any token of the vocabulary.
        (good.as_bytes(), b"<|startoftext|> <|endoftext|>", "merges.txt"),
    ];
    for (vocab, merges, name) in bad {
        let error = Tokenizer::from_bytes(vocab, merges, None, None).err().expect("refused").to_string();
        assert!(error.contains(name) && !error.contains('\n'), "{error}");
    }
    for config in [&b"{"[..], b"\xff"] {
        let error = Tokenizer::from_bytes(VOCAB, MERGES, Some(config), None).err().expect("refused").to_string();
        assert!(error.contains("tokenizer_config.json"), "{error}");
    }
    for json in [&b"{}"[..], b"null", br#"{"model":{"type":"Unigram","vocab":[]}}"#] {
        assert!(Tokenizer::from_tokenizer_json(json, None, None).is_err());
    }
    let tiny = Tokenizer::from_bytes(good.as_bytes(), b"#version: 0.2\na b\n", None, None).expect("tiny");
    // A vocabulary without the end-of-word characters maps them to the unknown token.
    assert!(tiny.encode("ab c é").is_ok());
    assert!(Tokenizer::from_folder(std::path::Path::new("/nonexistent")).is_err());
    assert_eq!(START, "<|startoftext|>");
}

/// Deterministic mutations of real files: any outcome but a panic.
#[test]
fn mutated_files_never_panic() {
    let mut state = 1u64;
    let mut random = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let files = [VOCAB, MERGES, CONFIG, MAP];
    for _ in 0..400 {
        let mut mutated = files.map(<[u8]>::to_vec);
        let file = &mut mutated[random(4)];
        for _ in 0..=random(3) {
            match random(3) {
                0 => {
                    let at = random(file.len());
                    file[at] = random(256) as u8;
                }
                1 => file.truncate(random(file.len()) + 1),
                _ => {
                    let (from, to) = (random(file.len()), random(file.len()));
                    let piece = file[from..(from + 40).min(file.len())].to_vec();
                    file.splice(to..to, piece);
                }
            }
        }
        let [vocab, merges, config, map] = mutated;
        if let Ok(tokenizer) = Tokenizer::from_bytes(&vocab, &merges, Some(&config), Some(&map)) {
            let _ = tokenizer.encode("A red circle, don't 😀");
        }
    }
}
