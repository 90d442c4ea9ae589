//! The `parameters` text of AUTOMATIC1111's web UI, which many programs write into their images and read out of them: the prompt, a
//! line that begins with `Negative prompt:`, and a last line of settings, `key: value, key: value`.

use std::fmt::Write;

const NEGATIVE: &str = "Negative prompt:";
const STEPS: &str = "Steps:";

/// What such a text says; what it does not say is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    pub prompt: String,
    pub negative: String,
    pub settings: Vec<(String, String)>,
}

/// Reads it as the web UI does, and where its writer left parts out.
pub fn parse(text: &str) -> Parameters {
    let text = text.replace("\r\n", "\n").replace('\0', " ");
    let lines: Vec<&str> = text.trim().split('\n').map(str::trim).collect();
    let at = settings_line(&lines);
    let mut found = Parameters { settings: pairs(lines.get(at).unwrap_or(&"")), ..Parameters::default() };
    let mut is_negative = false;
    for line in &lines[..at] {
        let line = match line.strip_prefix(NEGATIVE) {
            Some(rest) => {
                is_negative = true;
                rest.trim()
            }
            None => line,
        };
        let part = if is_negative { &mut found.negative } else { &mut found.prompt };
        if !part.is_empty() {
            part.push('\n');
        }
        part.push_str(line);
    }
    found
}

/// Which line the settings are; behind the last where there are none. The web UI takes the last line of three pairs or more: here,
/// one of them must be a setting's, for prompts have colons too. A line of fewer pairs begins with the number of steps.
fn settings_line(lines: &[&str]) -> usize {
    const USUAL: [&str; 8] = ["Steps", "Sampler", "CFG scale", "Seed", "Size", "Model", "Model hash", "Version"];
    let last = lines.len() - 1;
    let found = pairs(lines[last]);
    if found.len() >= 3 && found.iter().any(|(key, _)| USUAL.contains(&key.as_str())) {
        return last;
    }
    lines.iter().rposition(|line| begins_with_steps(line)).unwrap_or(lines.len())
}

fn begins_with_steps(line: &str) -> bool {
    line.strip_prefix(STEPS).is_some_and(|rest| rest.trim_start().starts_with(|c: char| c.is_ascii_digit()))
}

/// `key: value` between commas; a value in quotes is a JSON string. What is no pair is left out.
fn pairs(line: &str) -> Vec<(String, String)> {
    let is_key = |key: &str| {
        let of_key = |c: char| c.is_alphanumeric() || matches!(c, '_' | ' ' | '-' | '/');
        key.chars().count() > 1 && key.chars().all(of_key)
    };
    let mut found = vec![];
    let mut rest = line;
    while let Some(at) = rest.find([':', ',']) {
        let (key, after) = (rest[..at].trim(), &rest[at + 1..]);
        if rest[at..].starts_with(',') {
            rest = after;
            continue;
        }
        let (value, after) = quoted(after).unwrap_or_else(|| {
            let (value, after) = after.split_once(',').unwrap_or((after, ""));
            (value.trim().to_string(), after)
        });
        if is_key(key) {
            found.push((key.to_string(), value));
        }
        rest = after;
    }
    found
}

/// The JSON string that the text begins with, and what follows the comma behind it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let text = text.trim_start();
    if !text.starts_with('"') {
        return None;
    }
    let mut strings = serde_json::Deserializer::from_str(text).into_iter::<String>();
    let value = strings.next()?.ok()?;
    let after = text[strings.byte_offset()..].trim_start();
    match after.strip_prefix(',') {
        Some(after) => Some((value, after)),
        None => after.is_empty().then_some((value, "")),
    }
}

/// Writes it so that [`parse`] and the web UI read back what is given, but for white space at the ends of lines. Where a line of the
/// prompt or of the negative one would pass for something else, they are written in one line each.
pub fn write(prompt: &str, negative: &str, settings: &[(&str, String)]) -> String {
    let mut text = plain(prompt);
    if !negative.is_empty() {
        // Writing to a string cannot fail.
        let _ = write!(text, "\n{NEGATIVE} {}", plain(negative));
    }
    let settings: Vec<String> = settings.iter().map(|(key, value)| format!("{key}: {}", quote(value))).collect();
    text + "\n" + &settings.join(", ")
}

fn plain(text: &str) -> String {
    // PNG's text has none.
    let text = text.replace('\0', " ");
    let lines: Vec<&str> = text.split(['\n', '\r']).map(str::trim).collect();
    match lines.iter().any(|line| line.starts_with(NEGATIVE) || line.starts_with(STEPS)) {
        true => lines.join(" "),
        false => text,
    }
}

/// A value as a JSON string where it would not end where it does, or would not be what it is.
fn quote(value: &str) -> String {
    let is_plain = !value.contains([',', ':']) && !value.contains(char::is_control);
    match is_plain && !value.starts_with('"') && value.trim() == value {
        true => value.to_string(),
        false => serde_json::Value::from(value).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SETTINGS: &str = "Steps: 24, Sampler: Euler a, CFG scale: 6, Seed: 5, Size: 64x64, Model: x, Version: v1.9.4";

    #[track_caller]
    fn reads(text: &str, prompt: &str, negative: &str) -> Vec<(String, String)> {
        let found = parse(text);
        assert_eq!((found.prompt.as_str(), found.negative.as_str()), (prompt, negative), "{text:?}");
        found.settings
    }

    #[test]
    fn parts_may_be_missing() {
        let all = reads(&format!("a star\nNegative prompt: soft\n{SETTINGS}"), "a star", "soft");
        assert_eq!(all.len(), 7);
        assert_eq!(all[1], ("Sampler".to_string(), "Euler a".to_string()));
        assert_eq!(reads(&format!("Negative prompt: soft, dull\n{SETTINGS}"), "", "soft, dull"), all);
        assert_eq!(reads(&format!("\nNegative prompt: \n{SETTINGS}"), "", ""), all);
        assert_eq!(reads(SETTINGS, "", ""), all);
        assert_eq!(reads(&format!("\n{SETTINGS}\n"), "", ""), all);
        assert_eq!(reads("Steps: 24", "", "").len(), 1);
        assert_eq!(reads("a star\nSteps: 2, Seed: 1", "a star", "").len(), 2);
        assert_eq!(reads("Negative prompt: soft", "", "soft"), []);
        assert_eq!(reads("a star", "a star", ""), []);
        assert_eq!(reads("", "", ""), []);
        assert_eq!(reads("Sampler: Euler a, Seed: 5, Size: 64x64", "", "").len(), 3);
    }

    #[test]
    fn several_lines_and_lines_that_look_like_others() {
        let text = format!("two\r\n lines\r\nNegative prompt: soft\r\nand dull\r\n{SETTINGS}");
        assert_eq!(reads(&text, "two\nlines", "soft\nand dull").len(), 7);
        // The last line of settings is the settings.
        let text = format!("a star\nSteps: 3 of them, Seed: a, Size: b\n{SETTINGS}");
        reads(&text, "a star\nSteps: 3 of them, Seed: a, Size: b", "");
        let text = format!("stairs\nSteps: many\n{SETTINGS}");
        reads(&text, "stairs\nSteps: many", "");
        let prompt = "style: photo, light: soft, lens: wide";
        reads(prompt, prompt, "");
        // Extensions write lines of their own behind the settings.
        reads(&format!("a star\n{SETTINGS}\nTemplate: a {{star|ring}}"), "a star", "");
    }

    #[test]
    fn values_in_quotes() {
        let line =
            r#"Steps: 2, Lora hashes: "a: 1, b: \"2\"", Model: "odd, \\ name: \n", Hires, Note: "half" open, Seed: 5"#;
        let found = reads(&format!("a\n{line}"), "a", "");
        let value = |key: &str| found.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str());
        assert_eq!(value("Lora hashes"), Some("a: 1, b: \"2\""));
        assert_eq!(value("Model"), Some("odd, \\ name: \n"));
        assert_eq!(value("Note"), Some("\"half\" open"));
        assert_eq!(value("Seed"), Some("5"));
        assert_eq!(found.len(), 5);
    }

    /// Lines without white space at their ends: reading takes that off.
    fn trimmed(text: &str) -> String {
        text.replace("\r\n", "\n").trim().split('\n').map(str::trim).collect::<Vec<_>>().join("\n").trim().to_string()
    }

    proptest! {
        /// What was read can be written, and reads the same but for white space.
        #[test]
        fn any_text_is_read(text in "(\\PC|[\\x00\\n\\r,:\"]|Steps: |Steps: 1, |Negative prompt: ){0,60}") {
            let words = |text: &str| text.split_whitespace().map(String::from).collect::<Vec<_>>();
            let read = parse(&text);
            let settings = [("Steps", "2".to_string()), ("Seed", "1".to_string()), ("Model", text)];
            let again = parse(&write(&read.prompt, &read.negative, &settings));
            prop_assert_eq!(words(&again.prompt), words(&read.prompt));
            prop_assert_eq!(words(&again.negative), words(&read.negative));
            prop_assert_eq!(again.settings, settings.map(|(key, value)| (key.to_string(), value)));
        }

        #[test]
        fn settings_read_back(model in "(\\PC|[\\n\\r\\t,:\"\\\\]){0,20}", steps in 1..100usize) {
            let settings = [("Steps", steps.to_string()), ("Model", model), ("Version", "rarebit".to_string())];
            let found = parse(&write("a star", "", &settings)).settings;
            let expected: Vec<_> = settings.iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
            prop_assert_eq!(found, expected);
        }

        /// Words that pass for something else are read back as words; only the ends of lines may change.
        #[test]
        fn prompts_read_back(
            prompt in "[a-z][a-z,:]{0,9}((\\n|\\r\\n| )(Steps: 1, Seed: 2, Size: 3|Negative prompt: x|[a-z]{1,9})){0,5}",
            negative in "([a-z,:]{1,9}((\\n| )(Steps: 1, Seed: 2, Size: 3|Negative prompt: x|[a-z]{1,9})){0,5})?",
        ) {
            let settings = [("Steps", "20".to_string()), ("Sampler", "ddim".to_string()), ("Seed", "1".to_string())];
            let found = parse(&write(&prompt, &negative, &settings));
            let words = |text: &str| text.split_whitespace().map(String::from).collect::<Vec<_>>();
            prop_assert_eq!(words(&found.prompt), words(&prompt));
            prop_assert_eq!(words(&found.negative), words(&negative));
            if !prompt.contains("Steps:") && !prompt.contains("Negative") {
                prop_assert_eq!(found.prompt, trimmed(&prompt));
            }
        }
    }
}
