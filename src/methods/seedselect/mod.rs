//! SeedSelect (Samuel et al. 2024, arXiv 2304.14530): the starting noise whose image agrees with a few reference images.

pub mod nao;
