//! Offsets for blocks with known lifetimes: largest first, each at the lowest gap among the blocks it shares time with.
//!
//! Greedy-by-size offset assignment (Pisarchyk & Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020).

use super::ALIGNMENT;

#[derive(Clone, Copy)]
struct Block {
    bytes: usize,
    /// First and last op that touch it, inclusive.
    birth: usize,
    death: usize,
}

#[derive(Default)]
pub struct Arena {
    blocks: Vec<Block>,
}

impl Arena {
    pub fn new() -> Arena {
        Arena::default()
    }

    /// Adds a block that is live from op `birth` to op `death`, inclusive.
    pub fn block(&mut self, bytes: usize, birth: usize, death: usize) -> usize {
        self.blocks.push(Block { bytes: bytes.next_multiple_of(ALIGNMENT), birth, death });
        self.blocks.len() - 1
    }

    pub fn extend(&mut self, block: usize, death: usize) {
        self.blocks[block].death = self.blocks[block].death.max(death);
    }

    pub fn bytes_of(&self, block: usize) -> usize {
        self.blocks[block].bytes
    }

    /// The offset of every block.
    pub fn place(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.blocks.len()).collect();
        // Ties go to the longer-lived, then the older block, so that the result does not depend on the sort.
        order.sort_by_key(|&i| {
            let b = self.blocks[i];
            (std::cmp::Reverse(b.bytes), std::cmp::Reverse(b.death - b.birth), i)
        });
        let mut offsets = vec![0; self.blocks.len()];
        let mut placed: Vec<usize> = Vec::new(); // by offset
        for &i in &order {
            let b = self.blocks[i];
            let mut at = 0;
            for &j in &placed {
                let other = self.blocks[j];
                if other.death < b.birth || b.death < other.birth {
                    continue;
                }
                if offsets[j] >= at + b.bytes {
                    break;
                }
                at = at.max(offsets[j] + other.bytes);
            }
            offsets[i] = at;
            let position = placed.partition_point(|&j| offsets[j] <= at);
            placed.insert(position, i);
        }
        offsets
    }

    /// Bytes up to the end of the last block.
    pub fn extent(&self, offsets: &[usize]) -> usize {
        self.blocks.iter().zip(offsets).map(|(b, &offset)| offset + b.bytes).max().unwrap_or(0)
    }

    /// The op with the largest sum of live bytes, and that sum.
    pub fn live_peak(&self, ops: usize) -> (usize, usize) {
        let mut change = vec![0i64; ops + 2];
        for b in &self.blocks {
            change[b.birth] += b.bytes as i64;
            change[b.death + 1] -= b.bytes as i64;
        }
        let mut live = 0;
        let mut peak = (0, 0);
        for (op, delta) in change.iter().take(ops).enumerate() {
            live += delta;
            if live as usize > peak.1 {
                peak = (op, live as usize);
            }
        }
        peak
    }
}
