//! Rotary position embedding (arXiv 2104.09864) as numbers: the frequencies of each kind of scaling, and the table of angles
//! that the kernels read. Follows the reference implementation (transformers, modeling_rope_utils.py), whose names it uses.
//! Knows no device.

/// How positions become angles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: Scaling,
}

/// How a model reaches beyond the context that its frequencies were made for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    None,
    /// All positions closer together.
    Linear {
        factor: f64,
    },
    /// Low frequencies closer together (Llama 3.1).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original: f64,
    },
    /// Low frequencies closer together, and cos and sin times `attention_factor` (arXiv 2309.00071). `truncate`: the range between
    /// low and high begins and ends at whole frequencies.
    Yarn {
        factor: f64,
        original: f64,
        beta_fast: f64,
        beta_slow: f64,
        attention_factor: f64,
        truncate: bool,
    },
}

impl Rope {
    /// Radians per position, [head_dim / 2].
    pub fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        let plain = |i: usize| self.theta.powf(-2.0 * i as f64 / head_dim as f64);
        (0..head_dim / 2).map(|i| self.scaled(plain(i), i, head_dim) as f32).collect()
    }

    /// The `index`th of the frequencies, which is `plain` without scaling.
    fn scaled(&self, plain: f64, index: usize, head_dim: usize) -> f64 {
        // With `keep` 1 as it was, with 0 closer together.
        let blend = |factor: f64, keep: f64| plain * keep + plain / factor * (1.0 - keep);
        match self.scaling {
            Scaling::None => plain,
            Scaling::Linear { factor } => plain / factor,
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let turns = original * plain / std::f64::consts::TAU;
                let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                blend(factor, keep.clamp(0.0, 1.0))
            }
            Scaling::Yarn { factor, original, beta_fast, beta_slow, truncate, .. } => {
                // Which frequency makes so many turns within the original context.
                let index_of = |turns: f64| {
                    head_dim as f64 * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * self.theta.ln())
                };
                let (low, high) = match truncate {
                    true => (index_of(beta_fast).floor(), index_of(beta_slow).ceil()),
                    false => (index_of(beta_fast), index_of(beta_slow)),
                };
                let (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
                let width = if low == high { 0.001 } else { high - low };
                blend(factor, 1.0 - ((index as f64 - low) / width).clamp(0.0, 1.0))
            }
        }
    }

    /// What cos and sin are multiplied with.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            Scaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }

    /// [positions][head_dim / 2][cos, sin], the angles rounded to fp32 as the reference implementation's are.
    pub fn cos_sin(&self, positions: usize, head_dim: usize) -> Vec<f32> {
        let (frequencies, factor) = (self.frequencies(head_dim), self.attention_factor());
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f32 * f));
        angles.flat_map(|angle| [angle.cos() * factor, angle.sin() * factor]).collect()
    }
}
