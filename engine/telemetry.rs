//! What the driver's management library tells about a GPU: driver, clocks, energy. Absence (no driver, no permission, an old
//! GPU) is `None`, never an error. Knows nothing of what the GPU computes.

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use std::ffi::OsStr;

pub struct Telemetry {
    nvml: Nvml,
    index: u32,
}

impl Telemetry {
    /// The GPU that CUDA calls `ordinal`. None as well where the two libraries may number GPUs differently.
    pub fn open(ordinal: u32) -> Option<Telemetry> {
        // The name that drivers install; the one without a version comes only with development files.
        let nvml = Nvml::builder().lib_path(OsStr::new("libnvidia-ml.so.1")).init().ok()?;
        let same_order = nvml.device_count().ok()? == 1 || std::env::var_os("CUDA_VISIBLE_DEVICES").is_none();
        same_order.then_some(Telemetry { nvml, index: ordinal })
    }

    /// Energy used since the driver was loaded.
    pub fn joules(&self) -> Option<f64> {
        let device = self.nvml.device_by_index(self.index).ok()?;
        Some(device.total_energy_consumption().ok()? as f64 / 1000.0)
    }

    /// For people: driver version, power limit, clocks, temperature, as far as they are known.
    pub fn describe(&self) -> String {
        let device = self.nvml.device_by_index(self.index).ok();
        let device = device.as_ref();
        let facts = [
            self.nvml.sys_driver_version().ok().map(|v| format!("driver {v}")),
            device.and_then(|d| d.enforced_power_limit().ok()).map(|mw| format!("power limit {} W", mw / 1000)),
            device.and_then(|d| d.clock_info(Clock::SM).ok()).map(|mhz| format!("SM clock {mhz} MHz")),
            device.and_then(|d| d.clock_info(Clock::Memory).ok()).map(|mhz| format!("memory clock {mhz} MHz")),
            device.and_then(|d| d.temperature(TemperatureSensor::Gpu).ok()).map(|t| format!("{t} °C")),
        ];
        facts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}
