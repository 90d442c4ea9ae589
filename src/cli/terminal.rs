//! What is shown to a person: lines in which nothing that came from a file can command the terminal. `--json` is escaped by the
//! same rule.

use crate::{Error, Result};
use serde_json::Value;
use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::Write;

/// Most characters of a message; the middle of a longer one is left out.
const MESSAGE: usize = 600;

/// One line to stderr. A closed stderr is no reason to stop.
pub fn say(message: &str) {
    let message = shorten(message, MESSAGE);
    let _ = writeln!(std::io::stderr(), "{}", printable(&message));
}

/// One line to stdout.
pub fn print_line(line: &str) -> Result<()> {
    writeln!(std::io::stdout().lock(), "{}", printable(line)).map_err(Error::io("write", "standard output"))
}

/// Several lines to stdout; those are its own line breaks.
pub fn print_text(text: &str) -> Result<()> {
    text.trim_end().lines().try_for_each(print_line)
}

/// A JSON value in one line to stdout.
pub fn print_json(value: &Value) -> Result<()> {
    let text = value.to_string();
    // Such characters are inside strings, where JSON writes them as \uXXXX.
    let text =
        escape(&text, |c, out| c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(out, "\\u{unit:04x}")));
    writeln!(std::io::stdout().lock(), "{text}").map_err(Error::io("write", "standard output"))
}

/// Control characters (C0, DEL, C1), line separators and the marks that reorder text, shown as Rust writes them: `\u{1b}`.
pub fn printable(text: &str) -> Cow<'_, str> {
    escape(text, |c, out| write!(out, "{}", c.escape_default()))
}

fn escape(text: &str, show: impl Fn(char, &mut String) -> std::fmt::Result) -> Cow<'_, str> {
    if !text.contains(commands) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        // Writing to a string cannot fail.
        let _ = if commands(c) { show(c, &mut out) } else { out.write_char(c) };
    }
    Cow::Owned(out)
}

/// Whether a terminal may take the character as more than text.
fn commands(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// The text with its middle left out where it is longer than `most` characters.
pub fn shorten(text: &str, most: usize) -> Cow<'_, str> {
    let length = text.chars().count();
    if length <= most {
        return Cow::Borrowed(text);
    }
    let (head, tail) = (most / 2, most - most / 2 - 1);
    let start: String = text.chars().take(head).collect();
    let end: String = text.chars().skip(length - tail).collect();
    Cow::Owned(format!("{start}…{end}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_commands_the_terminal() {
        assert_eq!(printable("a café 星"), "a café 星");
        assert_eq!(printable("\x1b[31m\u{9b}1m\u{202e}\n\t\x7f"), "\\u{1b}[31m\\u{9b}1m\\u{202e}\\n\\t\\u{7f}");
        let value = serde_json::json!({"\u{9b}": "\u{202e}\u{1b}"});
        let text = escape(&value.to_string(), |c, out| write!(out, "\\u{:04x}", c as u32)).into_owned();
        assert!(!text.contains(commands));
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
    }

    #[test]
    fn long_messages_keep_both_ends() {
        assert_eq!(shorten("abcdefg", 7), "abcdefg");
        assert_eq!(shorten("abcdefgh", 7), "abc…fgh");
        assert_eq!(shorten(&"星".repeat(10_000), MESSAGE).chars().count(), MESSAGE);
    }
}
