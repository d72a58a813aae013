//! Truth: what each operator computes, as plain loops in float64, rounded to bf16 where the reference implementation rounds.
//! Kernels are compared with these; nothing here is fast, shared with a kernel, or clever.

use half::bf16;

/// The nearest bf16, as float64.
pub fn round(x: f64) -> f64 {
    bf16::from_f64(x).to_f64()
}

/// What follows a matrix product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    Plain,
    Bias,
    Residual,
    Silu,
    Logits,
}

/// x [rows][k] times w [n][k] transposed: [rows][n], not rounded.
pub fn product(x: &[bf16], w: &[bf16], k: usize) -> Vec<f64> {
    let wide = |v: &[bf16]| v.iter().map(|a| a.to_f64()).collect::<Vec<_>>();
    let (x, w) = (wide(x), wide(w));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    x.chunks(k).flat_map(|row| w.chunks(k).map(move |column| dot(row, column))).collect()
}

/// A linear layer [rows][n], or [rows][n / 2] for silu, whose gate and up rows alternate in blocks of 8. `extra` is the bias
/// [n] or the residual [rows][n].
pub fn linear(x: &[bf16], w: &[bf16], k: usize, epilogue: Epilogue, extra: &[bf16]) -> Vec<f64> {
    let n = w.len() / k;
    let sums = product(x, w, k);
    let each = |f: &dyn Fn(usize, f64) -> f64| sums.iter().enumerate().map(|(i, &sum)| f(i, sum)).collect();
    match epilogue {
        Epilogue::Logits => sums,
        Epilogue::Plain => each(&|_, sum| round(sum)),
        Epilogue::Bias => each(&|i, sum| round(sum + extra[i % n].to_f64())),
        Epilogue::Residual => each(&|i, sum| round(round(sum) + extra[i].to_f64())),
        Epilogue::Silu => {
            let pairs = sums.chunks(16).flat_map(|block| block[..8].iter().zip(&block[8..]));
            pairs.map(|(&gate, &up)| silu_times(gate, up)).collect()
        }
    }
}

fn silu_times(gate: f64, up: f64) -> f64 {
    round(gate / (1.0 + (-gate).exp()) * up)
}

/// RMS norm of one row.
pub fn rms_norm(x: &[f64], weight: &[bf16], eps: f32) -> Vec<f64> {
    let mean_square = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean_square + f64::from(eps)).sqrt();
    x.iter().zip(weight).map(|(v, w)| round(round(v * scale) * w.to_f64())).collect()
}

/// A number of e4m3: 4 bits of exponent, 3 of fraction.
pub fn e4m3_to_f64(byte: u8) -> f64 {
    let (exponent, fraction) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f64::NAN,
        (0, _) => fraction / 512.0,
        _ => (1.0 + fraction / 8.0) * 2f64.powi(exponent - 7),
    };
    if byte >= 128 { -magnitude } else { magnitude }
}

/// The nearest number of e4m3, ties to even, no larger than 448.
pub fn round_e4m3(x: f64) -> f64 {
    let magnitude = x.abs().min(448.0);
    let step = 2f64.powi((magnitude.max(2f64.powi(-6)).log2().floor() as i32) - 3);
    ((magnitude / step).round_ties_even() * step).min(448.0).copysign(x)
}

/// Activations [rows][k] as a product of fp8 weights sees them: the numbers in e4m3, and the scale of each.
pub fn quantise(x: &[bf16], k: usize) -> Vec<(f64, f64)> {
    let group = |group: &[bf16]| {
        let most = group.iter().fold(0f32, |most, x| most.max(x.to_f32().abs()));
        let factor = if most > 0.0 { 448.0 / most } else { 0.0 };
        let number = move |x: &bf16| (round_e4m3(f64::from(x.to_f32() * factor)), f64::from(most) / 448.0);
        group.iter().map(number).collect::<Vec<_>>()
    };
    x.chunks(k).flat_map(|row| row.chunks(128).flat_map(group)).collect()
}
