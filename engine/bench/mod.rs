//! Benches: what is measured, how it is summed up, and how reports look as JSON. Decides nothing about what is fast; prints
//! nothing.

pub mod budget;
pub mod host;
pub mod kernels;
pub mod load;
pub mod loading;
pub mod perplexity;
pub mod serve;

use crate::device::Device;
use crate::device::simulated::SimulatedGpu;
use crate::{Error, Result};
use serde::Serialize;
use std::path::Path;

/// Everything about one run, as `--json` writes it.
#[derive(Clone, Debug, Serialize)]
pub struct Report<Results> {
    pub schema: &'static str,
    /// RFC 3339.
    pub date: String,
    /// Of the sources, as the environment variable PONDER_COMMIT says.
    pub commit: String,
    pub device: String,
    /// None on the host target.
    pub roofline: Option<Roofline>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub args: Option<serde_json::Value>,
    pub results: Results,
}

impl<Results: Serialize> Report<Results> {
    pub fn new(schema: &'static str, device: &Device, results: Results) -> Self {
        Report {
            schema,
            date: chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
            commit: std::env::var("PONDER_COMMIT").unwrap_or_else(|_| "unknown".into()),
            device: device.describe(),
            roofline: Roofline::of(device),
            args: None,
            results,
        }
    }

    /// # Errors
    /// A file that cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        save(path, self)
    }
}

/// # Errors
/// A file that cannot be written.
pub fn save(path: &Path, results: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(results).expect("numbers and strings alone");
    text.push('\n');
    std::fs::write(path, text).map_err(|e| Error::Usage(format!("--json: cannot write {}: {e}", path.display())))
}

/// What the hardware can do at the most.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Roofline {
    pub bytes_per_second: f64,
    /// bf16 without sparsity.
    pub flops_per_second: f64,
    /// Of a weight, a key or a value.
    pub element_bytes: u64,
}

impl Roofline {
    /// None for the host target.
    pub fn of(device: &Device) -> Option<Roofline> {
        let (bytes_per_second, flops_per_second) = device.roofline()?;
        let element_bytes = device.simulated().map_or(2, SimulatedGpu::element_bytes);
        Some(Roofline { bytes_per_second, flops_per_second, element_bytes })
    }

    /// The time that memory or the tensor cores need at the least, of the time it took.
    pub fn percent(&self, bytes: u64, flops: u64, seconds: f64) -> f64 {
        let least = (bytes as f64 / self.bytes_per_second).max(flops as f64 / self.flops_per_second);
        least / seconds * 100.0
    }
}

/// The value that so many percent of the sorted values do not exceed (nearest rank).
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let rank = (sorted.len() as f64 * percent / 100.0).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}
