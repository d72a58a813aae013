//! `ponder bench load`: how long a model's weights take from their files to the device, and how much memory that needs. Reads a
//! checkpoint as any start does; whether its files come from the disk or the system has kept them is up to whoever runs it.

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::device::Device;
use crate::model::{Model, Weights};
use serde::Serialize;
use std::path::Path;
use std::time::Instant;

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measurement {
    /// Of all tensors in the files.
    pub bytes: u64,
    /// From opening the files until everything is on the device.
    pub seconds: f64,
    pub bytes_per_second: f64,
    /// The most memory that the process has had, with the weights where they are on the host target. None where the system
    /// does not say.
    pub peak_resident_bytes: Option<u64>,
}

/// # Errors
/// Those of [`Checkpoint::open`] and [`Model::load`].
pub fn run(
    folder: &Path,
    config: &ModelConfig,
    device: &Device,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Measurement> {
    let start = Instant::now();
    let checkpoint = Checkpoint::open(folder)?;
    let positions = config.max_position_embeddings as u32;
    let weights = Weights::from(&checkpoint);
    let config = ModelConfig { weight_types: weights.types(config, false)?, ..config.clone() };
    let model = Model::load(device, &config, weights, positions, progress)?;
    device.synchronize()?;
    let (bytes, seconds) = (checkpoint.bytes(), start.elapsed().as_secs_f64());
    let peak_resident_bytes = peak_resident_bytes();
    drop(model);
    Ok(Measurement { bytes, seconds, bytes_per_second: bytes as f64 / seconds, peak_resident_bytes })
}

fn peak_resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib * 1024)
}
