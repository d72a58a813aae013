//! The kernel table that `--profile` prints.

use crate::executor::KernelCost;

/// One line per kernel, the most expensive first. `roofline`: bytes/s and FLOP/s that the hardware can do, if it is known.
pub fn table(costs: impl Iterator<Item = (&'static str, KernelCost)>, roofline: Option<(f64, f64)>) -> String {
    let mut costs: Vec<_> = costs.collect();
    costs.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
    let all: f64 = costs.iter().map(|(_, c)| c.seconds).sum();
    let mut text = format!(
        "\n{:<20} {:>8} {:>10} {:>7} {:>10} {:>10} {:>10}\n",
        "kernel", "launches", "us each", "share", "GB/s", "TFLOP/s", "% roofline"
    );
    for (name, c) in costs {
        let (bytes, flops) = (c.bytes as f64, c.flops as f64);
        // The time that memory or the tensor cores need at the least.
        let bound = roofline.map(|(bandwidth, peak)| (bytes / bandwidth).max(flops / peak) / c.seconds);
        text += &format!(
            "{name:<20} {:>8} {:>10.1} {:>6.1}% {:>10.3} {:>10.4} {:>10}\n",
            c.launches,
            c.seconds / c.launches as f64 * 1e6,
            c.seconds / all * 100.0,
            bytes / c.seconds / 1e9,
            flops / c.seconds / 1e12,
            bound.map_or("-".into(), |b| format!("{:.1}", b * 100.0)),
        );
    }
    text + "each kernel alone, one after the other: without overlap, and with the time of launching it\n"
}
