//! What every executor refuses of a named buffer, in the same words.

use crate::program::{DType, Program, Value};
use crate::{Error, Result};

/// Fails unless a buffer that a program needs is of the type it was made with.
pub fn agrees(program: &Program, name: &str, value: &Value, shape: &[usize], dtype: DType) -> Result<()> {
    if shape == value.shape && dtype == value.dtype {
        return Ok(());
    }
    let what = format!(
        "buffer '{name}' is {} {:?} here and {dtype} {shape:?} in a program loaded before",
        value.dtype, value.shape
    );
    Err(Error::Program { program: program.name.clone(), what, at: "load".into() })
}

/// Fails unless a buffer of this shape is given, or asked for, so many values.
pub fn holds(name: &str, shape: &[usize], len: usize) -> Result<()> {
    if len == shape.iter().product::<usize>() {
        return Ok(());
    }
    Err(Error::Usage(format!("buffer '{name}' is {shape:?} and was given {len} values")))
}

/// Fails unless `len` elements can be copied between two float buffers.
pub fn copies(from: (&str, usize, &[usize], DType), to: (&str, usize, &[usize], DType), len: usize) -> Result<()> {
    for (name, at, shape, dtype) in [from, to] {
        if dtype == DType::I32 {
            return Err(Error::Usage(format!("buffer '{name}' holds i32, of which no part is copied")));
        }
        if at + len > shape.iter().product() {
            return Err(Error::Usage(format!("buffer '{name}' is {shape:?} and holds no {len} values from {at} on")));
        }
    }
    if from.3 != to.3 {
        return Err(Error::Usage(format!("buffer '{}' is {}, '{}' is {}", from.0, from.3, to.0, to.3)));
    }
    if from.0 == to.0 && from.1.abs_diff(to.1) < len {
        return Err(Error::Usage(format!("{len} values of buffer '{}' are copied over themselves", from.0)));
    }
    Ok(())
}

/// There is no buffer of that name.
pub fn unknown(name: &str) -> Error {
    Error::Usage(format!("no loaded program has a buffer '{name}'"))
}

/// Floats for a buffer of indices.
pub fn of_indices(name: &str) -> Error {
    Error::Usage(format!("buffer '{name}' holds i32 and was given floats"))
}
