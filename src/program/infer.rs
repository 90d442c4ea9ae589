//! Shape and dtype rules: what each op accepts and what it yields. Checked once, when an op is appended, and again by `verify`.

use super::*;

/// Shape and dtype of an op's outputs, in order.
pub type Types = Vec<(Shape, DType)>;

macro_rules! ensure {
    ($cond:expr, $($msg:tt)+) => {
        if !$cond {
            return Err(format!($($msg)+));
        }
    };
}

/// The output types of `op`, or what is wrong with its inputs.
pub fn infer(program: &Program, op: &Op) -> Result<Types, String> {
    for id in op.inputs() {
        ensure!(id.index() < program.values.len(), "{}: value %{} does not exist", op.family(), id.0);
    }
    let cx = Infer { program, float: program.dtype };
    let types = match op {
        Op::Gemm(g) => cx.gemm(g),
        Op::Conv2d(c) => cx.conv2d(c),
        Op::Attention(a) => cx.attention(a),
        Op::Norm(n) => cx.norm(n),
        Op::Elementwise(e) => cx.elementwise(e),
        Op::Resample(r) => cx.resample(r),
        Op::Embedding(e) => cx.embedding(e),
        Op::Update(Update::Combine { terms, coefficients }) => cx.combine(terms, *coefficients),
    };
    types.map_err(|what| format!("{}: {what}", op.family()))
}

struct Infer<'a> {
    program: &'a Program,
    float: DType,
}

impl<'a> Infer<'a> {
    fn shape(&self, id: ValueId) -> &'a [usize] {
        self.program.shape(id)
    }

    fn one(&self, shape: Shape) -> Types {
        vec![(shape, self.float)]
    }

    /// The shape of a value of the program's float type with at least `rank` dims.
    fn float(&self, id: ValueId, rank: usize) -> Result<&'a [usize], String> {
        let v = self.program.value(id);
        ensure!(v.dtype == self.float, "%{} is {}, the program computes in {}", id.0, v.dtype, self.float);
        ensure!(v.shape.len() >= rank, "%{} {:?} needs at least {rank} dims", id.0, v.shape);
        ensure!(!v.is_empty(), "%{} {:?} is empty", id.0, v.shape);
        Ok(&v.shape)
    }

    fn image(&self, id: ValueId) -> Result<&'a [usize], String> {
        let s = self.float(id, 4)?;
        ensure!(s.len() == 4, "%{} {s:?} is no image [B, H, W, C]", id.0);
        Ok(s)
    }

    fn exactly(&self, what: &str, id: ValueId, shape: &[usize]) -> Result<(), String> {
        let s = self.float(id, 1)?;
        ensure!(s == shape, "{what} %{} is {s:?}, needs {shape:?}", id.0);
        Ok(())
    }

    fn index(&self, what: &str, id: ValueId, shape: &[usize]) -> Result<(), String> {
        let v = self.program.value(id);
        ensure!(
            v.dtype == DType::I32 && v.shape == shape,
            "{what} %{} is {} {:?}, needs i32 {shape:?}",
            id.0,
            v.dtype,
            v.shape
        );
        Ok(())
    }

    fn gemm(&self, g: &Gemm) -> Result<Types, String> {
        let (x, w) = (self.float(g.x, 2)?, self.float(g.w, 2)?);
        ensure!(w.len() == 2, "weight %{} {w:?} is no matrix", g.w.0);
        let (k, mut n) = (w[0], w[1]);
        ensure!(x[x.len() - 1] == k, "x {x:?} does not fit weight [K, N] = {w:?}");
        if let Some(bias) = g.bias {
            self.exactly("bias", bias, &[n])?;
        }
        if g.activation == Activation::Geglu {
            ensure!(n % 2 == 0, "GEGLU needs an even number of columns, weight is {w:?}");
            n /= 2;
        }
        let mut out = x.to_vec();
        out[x.len() - 1] = n;
        if let Some(residual) = g.residual {
            self.exactly("residual", residual, &out)?;
        }
        Ok(self.one(out))
    }

    fn conv2d(&self, c: &Conv2d) -> Result<Types, String> {
        let (x, w) = (self.image(c.x)?, self.image(c.w)?);
        let [top, left, bottom, right] = c.padding;
        ensure!(x[3] == w[2], "x {x:?} does not fit weight [kh, kw, I, O] = {w:?}");
        ensure!(c.stride > 0, "stride 0");
        let (h, wide) = (x[1] + top + bottom, x[2] + left + right);
        ensure!(h >= w[0] && wide >= w[1], "x {x:?} is smaller than the kernel {w:?}");
        let out = vec![x[0], (h - w[0]) / c.stride + 1, (wide - w[1]) / c.stride + 1, w[3]];
        if let Some(bias) = c.bias {
            self.exactly("bias", bias, &[w[3]])?;
        }
        if let Some(shift) = c.shift {
            let s = self.float(shift.value, 2)?;
            ensure!(
                s.len() == 2 && (s[0] == 1 || s[0] == x[0]) && shift.at + w[3] <= s[1],
                "shift {s:?} has no columns {}..{} for batch {}",
                shift.at,
                shift.at + w[3],
                x[0]
            );
        }
        if let Some(residual) = c.residual {
            self.exactly("residual", residual, &out)?;
        }
        Ok(self.one(out))
    }

    fn attention(&self, a: &Attention) -> Result<Types, String> {
        let width = a.heads * a.head_dim;
        ensure!(width > 0, "no heads");
        let rows = |name: &str, cols: Cols| {
            let s = self.float(cols.value, 3)?;
            ensure!(cols.at + width <= s[s.len() - 1], "{name} {s:?} has no columns {}..{}", cols.at, cols.at + width);
            Ok(s)
        };
        let (q, k, v) = (rows("q", a.q)?, rows("k", a.k)?, rows("v", a.v)?);
        let tokens = |s: &[usize]| s[1..s.len() - 1].iter().product::<usize>();
        ensure!(q[0] == k[0] && q[0] == v[0] && tokens(k) == tokens(v), "q {q:?}, k {k:?}, v {v:?} do not fit");
        ensure!(!a.causal || tokens(q) == tokens(k), "causal attention needs as many queries as keys");
        let mut out = q.to_vec();
        out[q.len() - 1] = width;
        Ok(vec![(out, self.float), (vec![q[0], a.heads, tokens(q)], self.float)])
    }

    fn norm(&self, n: &Norm) -> Result<Types, String> {
        match *n {
            Norm::Group { x, gamma, beta, groups, .. } => {
                let s = self.float(x, 3)?;
                let c = s[s.len() - 1];
                ensure!(groups > 0 && c % groups == 0, "{c} channels do not divide into {groups} groups");
                self.exactly("gamma", gamma, &[c])?;
                self.exactly("beta", beta, &[c])?;
                let stats = vec![s[0], groups];
                Ok(vec![(s.to_vec(), self.float), (stats.clone(), self.float), (stats, self.float)])
            }
            Norm::Layer { x, gamma, beta, .. } => {
                let s = self.float(x, 2)?;
                let c = s[s.len() - 1];
                self.exactly("gamma", gamma, &[c])?;
                self.exactly("beta", beta, &[c])?;
                let stats = s[..s.len() - 1].to_vec();
                Ok(vec![(s.to_vec(), self.float), (stats.clone(), self.float), (stats, self.float)])
            }
        }
    }

    fn elementwise(&self, e: &Elementwise) -> Result<Types, String> {
        let shape = match *e {
            Elementwise::Activate { x, activation } => {
                ensure!(activation != Activation::Geglu, "GEGLU is an epilogue of gemm");
                self.float(x, 1)?.to_vec()
            }
            Elementwise::Affine { x, .. } => self.float(x, 1)?.to_vec(),
            Elementwise::Add { a, b } => {
                let s = self.float(a, 1)?;
                self.exactly("b", b, s)?;
                s.to_vec()
            }
            Elementwise::OuterAdd { a, b } => {
                let (a, b) = (self.float(a, 2)?, self.float(b, 2)?);
                ensure!(a.len() == 2 && b.len() == 2 && a[1] == b[1], "a {a:?} and b {b:?} need one width");
                vec![a[0], b[0], a[1]]
            }
            Elementwise::Concat { a, b } => {
                let (a, b) = (self.float(a, 2)?, self.float(b, 2)?);
                let last = a.len() - 1;
                ensure!(a.len() == b.len() && a[..last] == b[..last], "a {a:?} and b {b:?} differ before the last dim");
                let mut s = a.to_vec();
                s[last] += b[last];
                s
            }
            Elementwise::Repeat { x, times } => {
                ensure!(times > 0, "repeat 0 times");
                let mut s = self.float(x, 1)?.to_vec();
                s[0] *= times;
                s
            }
            Elementwise::Slice { x, start, len } => {
                let mut s = self.float(x, 1)?.to_vec();
                ensure!(len > 0 && start + len <= s[0], "rows {start}..{} of {s:?}", start + len);
                s[0] = len;
                s
            }
        };
        Ok(self.one(shape))
    }

    fn resample(&self, r: &Resample) -> Result<Types, String> {
        let Resample::Nearest2x { x, height, width } = *r;
        let s = self.image(x)?;
        let doubles = |to: usize, from: usize| to == 2 * from || to == 2 * from - 1;
        ensure!(doubles(height, s[1]) && doubles(width, s[2]), "{s:?} does not double to {height}x{width}");
        Ok(self.one(vec![s[0], height, width, s[3]]))
    }

    fn embedding(&self, e: &Embedding) -> Result<Types, String> {
        let shape = match *e {
            Embedding::Tokens { ids, table, positions } => {
                let s = self.shape(ids);
                ensure!(s.len() == 2, "ids {s:?} are not [B, T]");
                self.index("ids", ids, s)?;
                let (table, positions) = (self.float(table, 2)?, self.float(positions, 2)?);
                ensure!(
                    table[1] == positions[1] && s[1] <= positions[0],
                    "ids {s:?}, table {table:?}, positions {positions:?} do not fit"
                );
                vec![s[0], s[1], table[1]]
            }
            Embedding::Sinusoidal { x, dim, .. } => {
                let s = self.float(x, 1)?;
                ensure!(
                    s.len() <= 2 && dim >= 2 && dim % 2 == 0,
                    "x {s:?} to {dim} dims (needs [N] or [B, n], an even width)"
                );
                vec![s[0], s[1..].iter().product::<usize>() * dim]
            }
            Embedding::Pool { x, at } => {
                let s = self.float(x, 3)?;
                ensure!(s.len() == 3, "x {s:?} is not [B, T, C]");
                self.index("at", at, &s[..1])?;
                vec![s[0], s[2]]
            }
            Embedding::Select { x, at } => {
                let s = self.float(x, 2)?;
                self.index("at", at, &[1])?;
                ensure!(s.len() <= 3, "x {s:?} is not [S, C] or [S, B, C]");
                if s.len() == 2 { vec![1, s[1]] } else { s[1..].to_vec() }
            }
        };
        Ok(self.one(shape))
    }

    fn combine(&self, terms: &[ValueId], coefficients: ValueId) -> Result<Types, String> {
        let Some(&first) = terms.first() else { return Err("no terms".into()) };
        let s = self.float(first, 1)?;
        for &term in &terms[1..] {
            self.exactly("term", term, s)?;
        }
        let c = self.program.value(coefficients);
        ensure!(
            c.shape == [terms.len()] && matches!(c.dtype, DType::F32 | DType::F64),
            "coefficients are {} {:?} for {} terms",
            c.dtype,
            c.shape,
            terms.len()
        );
        Ok(self.one(s.to_vec()))
    }
}
