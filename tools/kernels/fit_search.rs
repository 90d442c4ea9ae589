//! Least squares for `fit`.

/// Moves of the free numbers that make the sum of squared residuals least. The model has corners: a wait that is short against the
/// products shows nowhere, and so does not say that it should be longer; from where the slopes lead each number is tried farther off.
pub fn search(start: &[f64], is_free: &[bool], residuals: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    const JUMPS: [f64; 10] = [0.1, -0.1, 0.2, -0.2, 0.35, -0.35, 0.5, -0.5, 0.7, -0.7];
    let mut best = descend(start, is_free, &residuals);
    loop {
        let mut at = best.clone();
        for (i, by) in (0..at.len()).filter(|i| is_free[*i]).flat_map(|i| JUMPS.map(|by| (i, by))) {
            let mut other = at.clone();
            other[i] += by;
            if squares(&residuals(&other)) < squares(&residuals(&at)) {
                at = other;
            }
        }
        let found = descend(&at, is_free, &residuals);
        if squares(&residuals(&found)) >= squares(&residuals(&best)) * (1.0 - 1e-6) {
            return best;
        }
        best = found;
    }
}

fn squares(residuals: &[f64]) -> f64 {
    residuals.iter().map(|x| x * x).sum()
}

/// Levenberg and Marquardt: steps of Gauss and Newton, the shorter the worse they serve.
fn descend(start: &[f64], is_free: &[bool], residuals: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    const APART: f64 = 1e-4;
    const LONGEST: f64 = 0.5;
    let free: Vec<usize> = (0..start.len()).filter(|i| is_free[*i]).collect();
    let (mut at, mut damping) = (start.to_vec(), 1e-3);
    let mut here = residuals(&at);
    while damping < 1e9 {
        let slope = |i: &usize| -> Vec<f64> {
            let beside = |by: f64| {
                let mut other = at.clone();
                other[*i] += by;
                residuals(&other)
            };
            beside(APART).iter().zip(beside(-APART)).map(|(after, before)| (after - before) / (2.0 * APART)).collect()
        };
        let slopes: Vec<Vec<f64>> = free.iter().map(slope).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        // Shorter steps until one serves.
        let mut served = false;
        while !served && damping < 1e9 {
            let row = |(i, a): (usize, &Vec<f64>)| -> Vec<f64> {
                let mut row: Vec<f64> = slopes.iter().map(|b| dot(a, b)).collect();
                row[i] = row[i] * (1.0 + damping) + 1e-12;
                row.push(-dot(a, &here));
                row
            };
            let steps = solve(slopes.iter().enumerate().map(row).collect());
            let mut other = at.clone();
            free.iter().zip(steps).for_each(|(i, step)| other[*i] += step.clamp(-LONGEST, LONGEST));
            let there = residuals(&other);
            served = squares(&there) < squares(&here) * (1.0 - 1e-9);
            if served {
                (at, here) = (other, there);
            }
            damping = if served { (damping / 3.0).max(1e-9) } else { damping * 4.0 };
        }
    }
    at
}

/// The solution of equations, each its factors and then its right side; the matrix is positive definite.
fn solve(mut rows: Vec<Vec<f64>>) -> Vec<f64> {
    let n = rows.len();
    for i in 0..n {
        let pivot = rows[i].clone();
        for row in &mut rows[i + 1..] {
            let factor = row[i] / pivot[i];
            row.iter_mut().zip(&pivot).for_each(|(x, y)| *x -= factor * y);
        }
    }
    let mut found = vec![0.0; n];
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|j| rows[i][j] * found[j]).sum();
        found[i] = (rows[i][n] - known) / rows[i][i];
    }
    found
}
