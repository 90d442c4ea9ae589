//! Linear combinations with coefficients from memory: guidance and every sampler step.
//!
//! Contract: `out = Σ coefficients[i] · terms[i]`, added in the order of the terms; a term with coefficient 0 is not read, so it
//! may hold anything. `out` may be the first term. Elementwise, cut into chunks.

use super::elementwise::transform;
use super::real::Real;
use super::{Cx, Outputs};
use crate::program::Update;
use pulp::{Simd, WithSimd};

struct AddTerm<'a, T> {
    out: &'a mut [T],
    term: &'a [T],
    coefficient: T,
}

impl<T: Real> WithSimd for AddTerm<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (out, &term) in self.out.iter_mut().zip(self.term) {
            *out = term.fma::<S>(self.coefficient, *out);
        }
    }
}

pub fn run<T: Real>(cx: &Cx<'_, T>, op: &Update, outputs: Outputs<'_, T>) {
    let Outputs { values: [out, ..], in_place, .. } = outputs;
    let Update::Combine { terms, coefficients } = op;
    let coefficients = cx.value(*coefficients);
    transform(out, None, |at, out| {
        if coefficients[0] == T::ZERO {
            out.fill(T::ZERO);
        } else {
            if !in_place {
                out.copy_from_slice(&cx.value(terms[0])[at..][..out.len()]);
            }
            out.iter_mut().for_each(|out| *out *= coefficients[0]);
        }
        for (&term, &coefficient) in terms.iter().zip(coefficients).skip(1) {
            if coefficient != T::ZERO {
                cx.machine.arch.dispatch(AddTerm { out, term: &cx.value(term)[at..], coefficient });
            }
        }
    });
}
