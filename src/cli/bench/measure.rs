//! Times, their percentiles, and what was computed in them.

use crate::Result;
use crate::exec::{Executor, ProgramId};
use crate::program::Program;
use serde_json::{Value, json};
use std::time::Instant;

/// Milliseconds of one call each, in the order they were taken.
#[derive(Clone, Debug)]
pub struct Times {
    pub ms: Vec<f64>,
}

impl Times {
    /// The time below which this fraction of the calls lies, by nearest rank.
    pub fn percentile(&self, fraction: f64) -> f64 {
        let mut sorted = self.ms.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (fraction * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    }

    pub fn median(&self) -> f64 {
        self.percentile(0.5)
    }

    pub fn json(&self) -> Value {
        let n = self.ms.len() as f64;
        let mean = self.ms.iter().sum::<f64>() / n;
        let variance = self.ms.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        json!({
            "min": self.percentile(0.0), "p50": self.median(), "p90": self.percentile(0.9), "p95": self.percentile(0.95),
            "p99": self.percentile(0.99), "max": self.percentile(1.0), "mean": mean, "std": variance.sqrt(),
            // Half the width, by the normal distribution.
            "ci95": 1.96 * (variance / n).sqrt(),
        })
    }
}

/// What was timed.
#[derive(Clone, Debug)]
pub struct Row {
    pub name: String,
    /// Per image, or per run of what the case is about.
    pub calls: usize,
    /// Of one call.
    pub times: Times,
    /// Of one call; 0 where it is not known.
    pub flops: u64,
    /// Read and written by the ops of one call, each value once per op.
    pub bytes: usize,
    /// Of its plan, where it is one program.
    pub arena_bytes: Option<usize>,
}

impl Row {
    /// Of a program, called `calls` times.
    pub fn of(name: impl Into<String>, calls: usize, program: &Program, times: Times) -> Row {
        let bytes = program.nodes.iter().map(|node| program.bytes_of(node)).sum();
        Row { name: name.into(), calls, times, flops: program.flops(), bytes, arena_bytes: None }
    }

    pub fn teraflops(&self) -> f64 {
        self.flops as f64 / (1e9 * self.times.median())
    }

    pub fn gigabytes(&self) -> f64 {
        self.bytes as f64 / (1e6 * self.times.median())
    }
}

/// How often things are done.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub runs: usize,
    /// Before that, untimed.
    pub warmup: usize,
}

impl Plan {
    /// Times `work`, which returns when its work is done.
    pub fn time(&self, mut work: impl FnMut() -> Result<()>) -> Result<Times> {
        (0..self.warmup).try_for_each(|_| work())?;
        let once = |_| {
            let started = Instant::now();
            work()?;
            Ok(1e3 * started.elapsed().as_secs_f64())
        };
        Ok(Times { ms: (0..self.runs).map(once).collect::<Result<_>>()? })
    }

    /// Times a loaded program. What is short is run several times between two readings of the clock.
    pub fn time_program(&self, executor: &mut dyn Executor, program: ProgramId) -> Result<Times> {
        /// Between two readings of the clock, in milliseconds.
        const STRETCH: f64 = 2.0;
        let mut calls = |times: usize| {
            (0..times).try_for_each(|_| executor.run(program))?;
            executor.wait()
        };
        // The first runs load and record.
        calls(3)?;
        let started = Instant::now();
        calls(1)?;
        let once = 1e3 * started.elapsed().as_secs_f64();
        let repeats = (STRETCH / once.max(1e-6)).ceil().clamp(1.0, 1000.0) as usize;
        let times = self.time(|| calls(repeats))?;
        Ok(Times { ms: times.ms.into_iter().map(|ms| ms / repeats as f64).collect() })
    }
}

/// Numbers of real scale: zeros run faster on a GPU.
pub fn wave(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let times = Times { ms: (1..=100).rev().map(f64::from).collect() };
        let found = [0.0, 0.5, 0.9, 0.99, 1.0].map(|fraction| times.percentile(fraction));
        assert_eq!(found, [1.0, 50.0, 90.0, 99.0, 100.0]);
        assert_eq!(Times { ms: vec![7.0] }.percentile(0.99), 7.0);
        assert_eq!(times.json()["mean"], 50.5);
    }
}
