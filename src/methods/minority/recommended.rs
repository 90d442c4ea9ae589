//! Settings that a model recommends for MinorityPrompt: `recommended.json` beside `model_index.json`, flags' names and values under
//! `"minority"`. They are for the variable that is the default, a token.

use super::Settings;
use crate::optimize::variable::Variable;
use crate::optimize::variable::token::Init;
use crate::pipeline::{Pipeline, generate};
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// What a model recommends; `None`: nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recommended {
    pub tokens: Option<usize>,
    pub init: Option<Init>,
    pub iterations: Option<usize>,
    pub lr: Option<f64>,
    pub lr_decay: Option<f64>,
    pub t_lo: Option<f64>,
    pub t_hi: Option<f64>,
    pub every: Option<usize>,
}

impl Recommended {
    /// What the model's folder holds; nothing where there is no such file. An unknown name or a wrong value is an error that names
    /// file and key.
    pub fn of(pipeline: &Pipeline) -> Result<Recommended> {
        let (model, name) = (&pipeline.model, "recommended");
        match (model.config(name), model.config_path(name)) {
            (Some(json), Some(path)) => parse(json, path),
            (_, _) => Ok(Recommended::default()),
        }
    }
}

fn parse(json: &Value, path: &Path) -> Result<Recommended> {
    let object = |value: &Value, name: &str| match value {
        Value::Object(map) => Ok(map.clone()),
        _ => Err(Error::file(path, format!("{name} must be an object"))),
    };
    let mut found = Recommended::default();
    for (method, settings) in object(json, "the file")? {
        if method != "minority" {
            return Err(Error::file(path, format!("'{method}' is no method with recommended settings; minority is")));
        }
        for (key, value) in object(&settings, "minority")? {
            found.set(&key, &value).map_err(|what| Error::file(path, format!("minority.{key}: {what}")))?;
        }
    }
    Ok(found)
}

impl Recommended {
    fn set(&mut self, key: &str, value: &Value) -> Result<(), String> {
        let whole = |least: u64| match value.as_u64() {
            Some(n) if (least..=1_000_000).contains(&n) => Ok(Some(n as usize)),
            Some(_) | None => Err(format!("{value}: must be a whole number from {least} to 1000000")),
        };
        let number = |least: f64| match value.as_f64() {
            Some(x) if x >= least => Ok(Some(x)),
            Some(_) => Err(format!("{value}: must be a number, {least} or more")),
            None => Err(format!("{value}: must be a number")),
        };
        match key {
            "tokens" => self.tokens = whole(1)?,
            "iterations" => self.iterations = whole(0)?,
            "every" => self.every = whole(1)?,
            "lr" => self.lr = number(0.0)?,
            "lr_decay" => self.lr_decay = number(f64::NEG_INFINITY)?,
            "t_lo" => self.t_lo = number(f64::NEG_INFINITY)?,
            "t_hi" => self.t_hi = number(f64::NEG_INFINITY)?,
            "init" => {
                let init = value.as_str().map_or_else(|| Err("must be a string".to_string()), parse_init);
                self.init = Some(init.map_err(|what| format!("{value}: {what}"))?);
            }
            _ => {
                return Err(
                    "no such setting; there are tokens, init, iterations, lr, lr_decay, t_lo, t_hi, every".into()
                );
            }
        }
        Ok(())
    }
}

impl Settings {
    /// [`Settings::of`] a model, with what its folder recommends.
    pub fn recommended(pipeline: &Pipeline, images: generate::Settings) -> Result<Settings> {
        let (mut settings, found) = (Settings::of(pipeline, images)?, Recommended::of(pipeline)?);
        let schedule = &mut settings.schedule;
        schedule.iterations = found.iterations.unwrap_or(schedule.iterations);
        schedule.lr = found.lr.unwrap_or(schedule.lr);
        schedule.lr_decay = found.lr_decay.unwrap_or(schedule.lr_decay);
        schedule.t_lo = found.t_lo.unwrap_or(schedule.t_lo);
        schedule.t_hi = found.t_hi.unwrap_or(schedule.t_hi);
        schedule.every = found.every.unwrap_or(schedule.every);
        if let Variable::Token(token) = &mut settings.variable {
            token.rows = found.tokens.unwrap_or(token.rows);
            token.init = found.init.unwrap_or(token.init.clone());
        }
        Ok(settings)
    }
}

/// `word:WORD`, `random`, `gaussian[:SCALE]`, `white[:SCALE]` or `unit`.
pub fn parse_init(text: &str) -> Result<Init, String> {
    let scale = |text: Option<&str>| match text.map(str::parse::<f64>) {
        None => Ok(1.0),
        Some(Ok(scale)) if scale.is_finite() && scale >= 0.0 => Ok(scale),
        Some(Ok(_) | Err(_)) => Err("the scale must be a number, 0 or more".to_string()),
    };
    match text.split_once(':').map_or((text, None), |(kind, rest)| (kind, Some(rest))) {
        ("word", Some(word)) if !word.trim().is_empty() => Ok(Init::Word(word.trim().to_string())),
        ("random", None) => Ok(Init::RandomWord),
        ("gaussian", rest) => Ok(Init::Gaussian { scale: scale(rest)? }),
        ("white", rest) => Ok(Init::White { scale: scale(rest)? }),
        ("unit", None) => Ok(Init::Unit),
        _ => Err("write word:WORD, random, gaussian[:SCALE], white[:SCALE] or unit".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn recommendations() {
        let read = |minority: Value| parse(&json!({ "minority": minority }), Path::new("m/recommended.json"));
        let found = read(json!({"tokens": 16, "lr": 5e-4, "t_hi": 1, "init": "word:a"})).unwrap();
        let init = Some(Init::Word("a".into()));
        let expected =
            Recommended { tokens: Some(16), lr: Some(5e-4), t_hi: Some(1.0), init, ..Recommended::default() };
        assert_eq!(found, expected);
        assert_eq!(parse(&json!({}), Path::new("x")).unwrap(), Recommended::default());
        for (wrong, words) in [
            (json!({"token": 16}), ["minority.token", "no such setting"]),
            (json!({"tokens": "16"}), ["minority.tokens", "whole number from 1"]),
            (json!({"tokens": 0}), ["minority.tokens", "whole number from 1"]),
            (json!({"tokens": 1.5}), ["minority.tokens", "whole number from 1"]),
            (json!({"iterations": -1}), ["minority.iterations", "from 0"]),
            (json!({"lr": -1.0}), ["minority.lr", "0 or more"]),
            (json!({"lr": null}), ["minority.lr", "must be a number"]),
            (json!({"init": "a"}), ["minority.init", "word:WORD"]),
            (json!({"init": 3}), ["minority.init", "a string"]),
            (json!([]), ["minority", "an object"]),
        ] {
            let message = read(wrong).unwrap_err().to_string();
            assert!(message.contains("recommended.json") && words.iter().all(|w| message.contains(w)), "{message}");
        }
        let message = parse(&json!({"sampling": {}}), Path::new("m/recommended.json")).unwrap_err().to_string();
        assert!(message.contains("'sampling'"), "{message}");
    }

    #[test]
    fn first_embeddings() {
        assert_eq!(parse_init("word:cool"), Ok(Init::Word("cool".into())));
        assert_eq!(parse_init("gaussian:0.5"), Ok(Init::Gaussian { scale: 0.5 }));
        assert_eq!(parse_init("white"), Ok(Init::White { scale: 1.0 }));
        assert_eq!(parse_init("unit"), Ok(Init::Unit));
        for wrong in ["word", "word: ", "gaussian:x", "white:-1", "unit:2", "cool"] {
            assert!(parse_init(wrong).is_err(), "{wrong}");
        }
    }
}
