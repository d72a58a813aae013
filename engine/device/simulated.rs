//! A GPU that is not there: its numbers, for `simulator.rs` to compute how long steps would take. Nothing can be allocated on
//! it, so no kernel ever runs there.

use crate::{Error, Result};

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SimulatedGpu {
    pub name: &'static str,
    /// Device memory, bytes.
    pub memory: u64,
    pub bytes_per_second: f64,
    /// Of the tensor cores, bf16 without sparsity.
    pub flops_per_second: f64,
    pub processors: u32,
    /// Weights, keys and values take one byte instead of two, and are multiplied twice as fast.
    pub fp8: bool,
    /// Time does not pass but is counted.
    pub instant: bool,
}

/// By the data sheet of the SXM module.
const H100: SimulatedGpu = SimulatedGpu {
    name: "H100",
    memory: 80 << 30,
    bytes_per_second: 3.35e12,
    flops_per_second: 989e12,
    processors: 132,
    fp8: false,
    instant: false,
};

impl SimulatedGpu {
    /// What stands after `sim:` in --device.
    ///
    /// # Errors
    /// A GPU or a word that is not known.
    pub fn parse(text: &str) -> Result<SimulatedGpu> {
        let mut words = text.split(',');
        let mut gpu = match words.next() {
            Some("h100") => H100,
            _ => return Err(Error::Usage(format!("--device sim:{text}: only sim:h100 is known"))),
        };
        for word in words {
            match word {
                "fp8" => gpu.fp8 = true,
                "instant" => gpu.instant = true,
                _ => return Err(Error::Usage(format!("--device sim:{text}: after sim:h100 come ,fp8 or ,instant"))),
            }
        }
        Ok(gpu)
    }

    pub fn describe(&self) -> String {
        let precision = if self.fp8 { "fp8" } else { "bf16" };
        let time = if self.instant { "time is counted" } else { "time passes" };
        format!("simulated {}, {precision}, {time}: tokens are made up, steps take what its roofline says", self.name)
    }

    /// Bytes of a weight.
    pub fn element_bytes(&self) -> u64 {
        if self.fp8 { 1 } else { 2 }
    }

    /// The time of so many bytes and operations, seconds: whatever takes longer.
    pub fn seconds(&self, bytes: u64, flops: u64) -> f64 {
        let peak = self.flops_per_second * if self.fp8 { 2.0 } else { 1.0 };
        (bytes as f64 / self.bytes_per_second).max(flops as f64 / peak)
    }
}
