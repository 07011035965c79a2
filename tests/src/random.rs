//! Random numbers that a seed repeats.

use std::env;
use std::process;

use anyhow::{Context, Result};

/// The seed of this run: the environment variable `SKYFERRY_SEED`, else another in each process. It
/// is printed, so that a failure can be repeated.
///
/// # Errors
/// When the variable is no number.
pub fn seed() -> Result<u64> {
    let seed = match env::var("SKYFERRY_SEED") {
        Ok(seed) => seed.parse().context("SKYFERRY_SEED")?,
        Err(_) => u64::from(process::id()),
    };
    eprintln!("SKYFERRY_SEED={seed}");
    Ok(seed)
}

/// Numbers that look random and follow from the seed alone (splitmix64).
#[derive(Debug, Clone)]
pub struct Random {
    state: u64,
}

impl Random {
    /// A sequence of its own for each seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next number.
    #[must_use]
    pub fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let value = (self.state ^ self.state >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let value = (value ^ value >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        value ^ value >> 31
    }

    /// A number below `limit`, which is at least 1.
    #[must_use]
    pub fn below(&mut self, limit: usize) -> usize {
        let value = self.draw() % (limit.max(1) as u64);
        usize::try_from(value).unwrap_or(0)
    }

    /// A number from 0 to below 1.
    #[must_use]
    pub fn unit(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1u64 << 53) as f64
    }
}
