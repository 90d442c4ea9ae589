//! Names of the buffers that a token's programs read.

/// Names of what depends on how many tokens stand before the first learnable one.
pub struct Names {
    prefix: usize,
}

impl Names {
    pub fn of(prefix: usize) -> Names {
        Names { prefix }
    }

    fn name(&self, what: &str) -> String {
        format!("token.{what}.{}", self.prefix)
    }

    /// Ids of the first tokens, `[B, P]`, and of the others, `[B, T − P]`.
    pub fn ids(&self, tower: usize) -> [String; 2] {
        [self.name(&format!("first_ids_{tower}")), self.name(&format!("ids_{tower}"))]
    }

    /// Index among the tokens after the first ones, `[B]`.
    pub fn pool_at(&self) -> String {
        self.name("pool_at")
    }

    pub(super) fn kv(&self, tower: usize, layer: usize) -> String {
        self.name(&format!("kv_{tower}_{layer}"))
    }

    pub(super) fn context(&self) -> String {
        self.name("context")
    }
}
