//! What flags accept as numbers.

/// A number of things: 1 to a million.
pub fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if (1..=1_000_000).contains(&count) => Ok(count),
        Ok(_) | Err(_) => Err("write a number from 1 to 1000000".to_string()),
    }
}

/// A number of things, perhaps none: 0 to a million.
pub fn number_of(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if count <= 1_000_000 => Ok(count),
        Ok(_) | Err(_) => Err("write a number from 0 to 1000000".to_string()),
    }
}

/// A finite number.
pub fn number(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|x: &f64| x.is_finite()).ok_or_else(|| "write a number".to_string())
}

/// A finite number from 0.
pub fn amount(text: &str) -> Result<f64, String> {
    number(text).ok().filter(|x| *x >= 0.0).ok_or_else(|| "write a number, 0 or more".to_string())
}

/// A number from 0 to 1.
pub fn fraction(text: &str) -> Result<f64, String> {
    number(text).ok().filter(|x| (0.0..=1.0).contains(x)).ok_or_else(|| "write a number from 0 to 1".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert!(number("-1e3").is_ok() && number("nan").is_err() && number("inf").is_err() && number("x").is_err());
        assert!(amount("0").is_ok() && amount("-1").is_err() && fraction("1").is_ok() && fraction("1.1").is_err());
        assert!(count("1").is_ok() && count("0").is_err() && count("1000001").is_err());
    }
}
