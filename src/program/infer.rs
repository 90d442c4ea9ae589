//! Shape and dtype rules: what every family checks its operands with. Checked once, when an op is appended, and again by `verify`.

use super::*;

/// Shape and dtype of an op's outputs, in order.
pub(super) type Types = Vec<(Shape, DType)>;

macro_rules! ensure {
    ($cond:expr, $($msg:tt)+) => {
        if !$cond {
            return Err(format!($($msg)+));
        }
    };
}
pub(super) use ensure;

/// The output types of `op`, or what is wrong with its inputs.
pub(super) fn infer(program: &Program, op: &Op) -> Result<Types, String> {
    for id in op.inputs() {
        ensure!(id.index() < program.values.len(), "{}: value %{} does not exist", op.family(), id.0);
    }
    let float = op.inputs().iter().map(|id| program.value(*id).dtype).find(|dtype| *dtype != DType::I32);
    let cx = Infer { program, float: float.unwrap_or(program.dtype) };
    op.infer(&cx).map_err(|what| format!("{}: {what}", op.family()))
}

/// Looks at operands; every check names what it found and what is needed.
pub(super) struct Infer<'a> {
    program: &'a Program,
    /// What the op computes in: the type of its first float operand.
    float: DType,
}

impl<'a> Infer<'a> {
    pub fn shape(&self, id: ValueId) -> &'a [usize] {
        self.program.shape(id)
    }

    pub fn type_of(&self, id: ValueId) -> (&'a [usize], DType) {
        let value = self.program.value(id);
        (&value.shape, value.dtype)
    }

    /// An output of the type the op computes in.
    pub fn of(&self, shape: Shape) -> (Shape, DType) {
        (shape, self.float)
    }

    /// An output of the type of sums.
    pub fn accumulator(&self, shape: Shape) -> (Shape, DType) {
        (shape, self.float.accumulator())
    }

    pub fn one(&self, shape: Shape) -> Types {
        vec![self.of(shape)]
    }

    /// The shape of a value of the type the op computes in with at least `rank` dims.
    pub fn float(&self, id: ValueId, rank: usize) -> Result<&'a [usize], String> {
        let (v, float) = (self.program.value(id), self.float);
        ensure!(v.dtype == float, "%{} is {}, the op computes in {float}", id.0, v.dtype);
        ensure!(v.shape.len() >= rank, "%{} {:?} needs at least {rank} dims", id.0, v.shape);
        ensure!(!v.is_empty(), "%{} {:?} is empty", id.0, v.shape);
        Ok(&v.shape)
    }

    pub fn matrix(&self, id: ValueId) -> Result<&'a [usize], String> {
        let s = self.float(id, 2)?;
        ensure!(s.len() == 2, "%{} {s:?} is no matrix", id.0);
        Ok(s)
    }

    pub fn tokens(&self, id: ValueId) -> Result<&'a [usize], String> {
        let s = self.float(id, 3)?;
        ensure!(s.len() == 3, "%{} {s:?} is not [B, T, C]", id.0);
        Ok(s)
    }

    pub fn image(&self, id: ValueId) -> Result<&'a [usize], String> {
        let s = self.float(id, 4)?;
        ensure!(s.len() == 4, "%{} {s:?} is no image [B, H, W, C]", id.0);
        Ok(s)
    }

    pub fn exactly(&self, what: &str, id: ValueId, shape: &[usize]) -> Result<(), String> {
        let s = self.float(id, 0)?;
        ensure!(s == shape, "{what} %{} is {s:?}, needs {shape:?}", id.0);
        Ok(())
    }

    /// The same of a statistic, which has the type of sums.
    pub fn statistic(&self, what: &str, id: ValueId, shape: &[usize]) -> Result<(), String> {
        let ((s, dtype), accumulator) = (self.type_of(id), self.float.accumulator());
        ensure!(dtype == accumulator && s == shape, "{what} %{} is {dtype} {s:?}, needs {accumulator} {shape:?}", id.0);
        Ok(())
    }

    /// The shape of two floats that must have the same.
    pub fn alike(&self, a: ValueId, what: &str, b: ValueId) -> Result<Shape, String> {
        let s = self.float(a, 1)?;
        self.exactly(what, b, s)?;
        Ok(s.to_vec())
    }

    pub fn index(&self, what: &str, id: ValueId, shape: &[usize]) -> Result<(), String> {
        let (s, dtype) = self.type_of(id);
        ensure!(dtype == DType::I32 && s == shape, "{what} %{} is {dtype} {s:?}, needs i32 {shape:?}", id.0);
        Ok(())
    }
}
