//! `ponder bench host`: what the host does for each decode step, and how that grows with the sequences. On a simulated device
//! whose time is counted, so that all that is measured is the host; what the simulation itself takes is left out.

use super::percentile;
use crate::Result;
use crate::engine::{Engine, HostWork};
use crate::frontend::Request;
use crate::sampling::SamplingRequest;
use serde::Serialize;
use std::time::Duration;

/// Steps before those that are measured.
const WARMUP: u32 = 64;

/// Microseconds of one step of so many sequences: medians, which other work on the machine disturbs least.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measurement {
    pub sequences: u32,
    /// Scheduler: who decodes, with which new pages.
    pub plan: f64,
    /// Scheduler: what came back.
    pub receive: f64,
    /// Tokens to text, stop strings, updates.
    pub text: f64,
    /// All of these together.
    pub all: f64,
    /// That of 100 steps only one exceeds.
    pub p99: f64,
}

impl Measurement {
    pub fn heading() -> &'static str {
        " sequences      plan   receive      text       all   p99 of all   (microseconds per step)"
    }

    pub fn line(&self) -> String {
        let Measurement { sequences, plan, receive, text, all, p99 } = self;
        format!("{sequences:10} {plan:9.1} {receive:9.1} {text:9.1} {all:9.1} {p99:12.1}")
    }
}

/// Decodes with `sequences` requests until `steps` steps of all of them have been measured. The engine is idle before and
/// after.
///
/// # Errors
/// An engine without room for them.
pub fn run(engine: &mut Engine, sequences: u32, steps: u32) -> Result<Measurement> {
    let mut open = Vec::new();
    for i in 0..sequences {
        let request = Request {
            // Of different lengths, so that they do not all need their next page in the same step.
            prompt: (0..=i % 64).map(|j| 3 + (i + j) % 200).collect(),
            sampling: SamplingRequest { temperature: Some(0.0), ignore_eos: true, ..Default::default() },
            ..Default::default()
        };
        open.push(engine.submit(&request)?);
    }
    // Prompts first.
    let mut begun = 0;
    while begun < sequences {
        begun += engine.step()?.iter().filter(|u| u.token.as_ref().is_some_and(|t| t.generated == 1)).count() as u32;
    }
    for _ in 0..WARMUP {
        engine.step()?;
    }
    let mut work = Vec::new();
    for _ in 0..steps {
        let before = engine.host_work();
        engine.step()?;
        work.push((before, engine.host_work()));
    }
    for id in open {
        engine.cancel(id);
    }
    while engine.step()?.len() + engine.stats().running > 0 {}
    let sorted = |of: fn(&HostWork) -> Duration| {
        let mut each: Vec<f64> = work.iter().map(|(a, b)| (of(b) - of(a)).as_secs_f64() * 1e6).collect();
        each.sort_by(f64::total_cmp);
        each
    };
    let median = |of| percentile(&sorted(of), 50.0);
    Ok(Measurement {
        sequences,
        plan: median(|w| w.plan),
        receive: median(|w| w.receive),
        text: median(|w| w.text),
        all: median(HostWork::total),
        p99: percentile(&sorted(HostWork::total), 99.0),
    })
}
