//! What the driver's management library tells about a GPU: driver, clocks, energy. Absence (no driver, no permission, an old
//! GPU) is `None`, never an error. Knows nothing of what the GPU computes.

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use std::ffi::OsStr;

pub struct Telemetry {
    nvml: Nvml,
    index: u32,
}

/// What a GPU says of itself at a moment, as far as it does.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reading {
    /// Energy used since the driver was loaded.
    pub joules: Option<f64>,
    pub watts: Option<f64>,
    /// Bytes.
    pub memory_used: Option<u64>,
    pub memory: Option<u64>,
    pub sm_hertz: Option<u64>,
    pub memory_hertz: Option<u64>,
    pub celsius: Option<u64>,
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

    pub fn read(&self) -> Reading {
        let Ok(device) = self.nvml.device_by_index(self.index) else { return Reading::default() };
        let memory = device.memory_info().ok();
        let hertz = |clock| device.clock_info(clock).ok().map(|megahertz| u64::from(megahertz) * 1_000_000);
        Reading {
            joules: self.joules(),
            watts: device.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1000.0),
            memory_used: memory.as_ref().map(|memory| memory.used),
            memory: memory.as_ref().map(|memory| memory.total),
            sm_hertz: hertz(Clock::SM),
            memory_hertz: hertz(Clock::Memory),
            celsius: device.temperature(TemperatureSensor::Gpu).ok().map(u64::from),
        }
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
