//! The parameters text of the web UIs: any text is read, and what was read can be written so that it reads the same but for white space.
#![no_main]

use rarebit::data::parameters::{parse, write};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let words = |text: &str| text.split_whitespace().map(String::from).collect::<Vec<_>>();
    let read = parse(text);
    let settings = [("Steps", "2".to_string()), ("Seed", "1".to_string()), ("Model", text.to_string())];
    let again = parse(&write(&read.prompt, &read.negative, &settings));
    assert_eq!((words(&again.prompt), words(&again.negative)), (words(&read.prompt), words(&read.negative)));
    let found: Vec<(&str, String)> = again.settings.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
    assert_eq!(found, settings);
});
