//! Rewards: differentiable numbers of an image.
