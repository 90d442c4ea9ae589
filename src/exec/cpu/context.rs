//! An op at its place: what every kernel reads, writes and may use of the machine.

use super::pack::{Aligned, Tiling};
use super::real::Float;
use super::store::{Buffer, Store};
use crate::Result;
use crate::plan::Planned;
use crate::program::{Program, ValueId};
use pulp::Arch;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// The processor at hand.
#[derive(Clone, Copy)]
pub struct Machine {
    pub arch: Arch,
    pub tiling: Tiling,
    /// Threads that cuts of work are made for; any other number runs them too, with the same bits.
    pub threads: usize,
}

/// A program with everything looked up.
pub struct Loaded {
    pub planned: Planned,
    /// Per value.
    pub places: Vec<Place>,
    /// Buffer and value of each output.
    pub outputs: Vec<(usize, ValueId)>,
}

/// Where a value lies.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    Arena(usize, usize),
    Weight(usize),
    Buffer(usize),
}

/// What an op writes: its outputs (empty where it has fewer) and its workspace.
pub struct Outputs<'a, T> {
    pub values: [&'a mut [T]; MOST_RANGES - 1],
    pub workspace: &'a mut [T],
    /// Output 0 holds the value the op may overwrite.
    pub in_place: bool,
}

/// What an op reads.
pub struct Cx<'a, T> {
    pub program: &'a Program,
    pub places: &'a [Place],
    pub store: &'a Store<T>,
    pub arena: Rest<'a, T>,
    pub machine: Machine,
    pub scratch: &'a Scratch<T>,
}

impl<'a, T: Float> Cx<'a, T> {
    pub fn shape(&self, id: ValueId) -> &'a [usize] {
        self.program.shape(id)
    }

    /// A float value, row by row; of a weight in panels what is held.
    pub fn value(&self, id: ValueId) -> &'a [T] {
        match self.places[id.index()] {
            Place::Arena(offset, len) => self.arena.get(offset, len),
            Place::Weight(index) => self.store.weights[index].as_slice(),
            Place::Buffer(index) => match &self.store.buffers[index].values {
                Buffer::Float(values) => values,
                Buffer::Int(_) => unreachable!("the program's types are checked"),
            },
        }
    }

    pub fn ints(&self, id: ValueId) -> &'a [i32] {
        match self.places[id.index()] {
            Place::Buffer(index) => match &self.store.buffers[index].values {
                Buffer::Int(values) => values,
                Buffer::Float(_) => unreachable!("the program's types are checked"),
            },
            Place::Arena(..) | Place::Weight(_) => unreachable!("ops make no integers"),
        }
    }
}

/// Outputs and workspace of an op.
pub const MOST_RANGES: usize = 4;

/// The arena around an op's own ranges, to be read: at most one piece more than there are ranges.
pub struct Rest<'a, T> {
    pub pieces: [(usize, &'a [T]); MOST_RANGES + 1],
}

impl<'a, T> Rest<'a, T> {
    pub fn get(&self, offset: usize, len: usize) -> &'a [T] {
        let (start, piece) = self
            .pieces
            .iter()
            .find(|(start, piece)| *start <= offset && offset + len <= start + piece.len())
            .expect("the plan keeps an op's inputs apart from what it writes");
        &piece[offset - start..][..len]
    }
}

/// Cuts `ranges` out of the arena to be written and leaves the rest to be read.
pub fn carve<'a, T>(
    mut arena: &'a mut [T],
    ranges: &[Range<usize>; MOST_RANGES],
) -> ([&'a mut [T]; MOST_RANGES], Rest<'a, T>) {
    let mut order = [0, 1, 2, 3];
    order.sort_unstable_by_key(|&i| ranges[i].start);
    let mut cut: [&mut [T]; MOST_RANGES] = Default::default();
    let mut pieces: [(usize, &[T]); MOST_RANGES + 1] = Default::default();
    let mut at = 0;
    for (piece, i) in order.into_iter().enumerate().filter(|&(_, i)| !ranges[i].is_empty()) {
        let (before, rest) = arena.split_at_mut(ranges[i].start - at);
        let (own, rest) = rest.split_at_mut(ranges[i].len());
        pieces[piece] = (at, before);
        cut[i] = own;
        at = ranges[i].end;
        arena = rest;
    }
    pieces[MOST_RANGES] = (at, arena);
    (cut, Rest { pieces })
}

/// One stretch of memory per thread, for gathered rows, scores and tiles.
pub struct Scratch<T> {
    pub slots: Vec<Mutex<Aligned<T>>>,
    pub len: usize,
}

impl<T: Float> Scratch<T> {
    pub fn new(threads: usize) -> Scratch<T> {
        Scratch { slots: (0..threads).map(|_| Mutex::new(Aligned::empty())).collect(), len: 0 }
    }

    pub fn grow(&mut self, len: usize) -> Result<()> {
        if len > self.len {
            for slot in &mut self.slots {
                *slot = Mutex::new(Aligned::zeroed(len)?);
            }
            self.len = len;
        }
        Ok(())
    }

    /// Lends this thread's stretch; its content is whatever was left there. `f` must not wait for other threads.
    pub fn with<R>(&self, f: impl FnOnce(&mut [T]) -> R) -> R {
        // More threads than slots (a larger pool than the one at `new`) take turns.
        let slot = rayon::current_thread_index().unwrap_or(0) % self.slots.len();
        let mut slot = self.slots[slot].lock().unwrap_or_else(PoisonError::into_inner);
        f(slot.as_mut_slice())
    }
}
