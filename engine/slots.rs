//! Running sequences as the sampler knows them, in device memory: written here on admission, advanced by `sample` alone.
//! Must not know requests or text.

use crate::Result;
use crate::batch::{
    Accounting, BudgetParams, Finish, Mask, OnEnd, SamplingParams, SlotSetup, SteeringParams, ThinkingEnd, TokenEvent,
};
use crate::device::ring::Ring;
use crate::device::{Buffer, Device};
use crate::kernels::params::*;
use std::mem::offset_of;

pub struct Slots {
    device: Device,
    /// [slots] of SlotState; slot 0 is never active.
    pub states: Buffer,
    /// [slots][POOL_PER_SLOT] i32.
    pool: Buffer,
    /// [slots][vocab_words] u32, one bit for each token.
    allowed: Buffer,
    prompt_seen: Buffer,
    /// [slots][MAX_LOGIT_BIAS] i32 and f32.
    bias_ids: Buffer,
    bias_values: Buffer,
    /// [slots][vocab] u16.
    output_counts: Buffer,
    /// [slots][vocab_words] u32, one bit for each token.
    avoided: Buffer,
    switches: Buffer,
    /// [slots][2][LOOP_PERIODS] i32.
    loop_history: Buffer,
    /// [vocab] u8.
    traits: Buffer,
    /// [2] u32: steps so far, rows finished in this one.
    counters: Buffer,
    ring: Ring,
    vocab: usize,
}

/// Device memory of so many slots, bytes.
pub fn slot_bytes(slots: u32, vocab: usize) -> u64 {
    let strings = (POOL_PER_SLOT + 2 * LOOP_PERIODS) as usize * 4;
    let per_token = 4 * vocab_words(vocab) * 4 + vocab * 2;
    let per_slot = size_of::<SlotState>() + strings + MAX_LOGIT_BIAS as usize * 8 + per_token;
    slots as u64 * per_slot as u64 + vocab as u64 + 8
}

fn vocab_words(vocab: usize) -> usize {
    vocab.div_ceil(32)
}

impl Slots {
    /// `traits`: [vocab] of TokenTrait bits.
    pub fn new(device: &Device, slots: u32, traits: &[u8]) -> Result<Slots> {
        assert!((2..=MAX_SLOTS).contains(&slots));
        let (slots, vocab) = (slots as usize, traits.len());
        let zeroed = |bytes: usize| -> Result<Buffer> {
            let buffer = device.alloc(bytes)?;
            device.fill(&buffer, 0, bytes, 0)?;
            Ok(buffer)
        };
        let made = Slots {
            device: device.clone(),
            states: zeroed(slots * size_of::<SlotState>())?,
            pool: zeroed(slots * POOL_PER_SLOT as usize * 4)?,
            allowed: zeroed(slots * vocab_words(vocab) * 4)?,
            prompt_seen: zeroed(slots * vocab_words(vocab) * 4)?,
            bias_ids: zeroed(slots * MAX_LOGIT_BIAS as usize * 4)?,
            bias_values: zeroed(slots * MAX_LOGIT_BIAS as usize * 4)?,
            output_counts: zeroed(slots * vocab * 2)?,
            avoided: zeroed(slots * vocab_words(vocab) * 4)?,
            switches: zeroed(slots * vocab_words(vocab) * 4)?,
            loop_history: zeroed(slots * 2 * LOOP_PERIODS as usize * 4)?,
            traits: zeroed(vocab)?,
            counters: zeroed(8)?,
            ring: Ring::new(device)?,
            vocab,
        };
        device.upload(&made.traits, 0, traits)?;
        Ok(made)
    }

    /// All that `ops::sample` needs to know of the slots.
    pub fn sample_params(&self) -> SampleParams {
        SampleParams {
            slots: self.states.pointer(),
            token_traits: self.traits.pointer(),
            pool: self.pool.pointer(),
            allowed: self.allowed.pointer(),
            bias_ids: self.bias_ids.pointer(),
            bias_values: self.bias_values.pointer(),
            output_counts: self.output_counts.pointer(),
            prompt_seen: self.prompt_seen.pointer(),
            avoided: self.avoided.pointer(),
            switches: self.switches.pointer(),
            loop_history: self.loop_history.pointer(),
            ring: self.ring.pointer(),
            step: self.counters.pointer(),
            ticket: self.counters.pointer_at(4),
            vocab: self.vocab as i32,
            ..Default::default()
        }
    }

    /// Seats a sequence, in stream order. It is active from now on.
    pub fn admit(&self, setup: &SlotSetup) -> Result<()> {
        let slot = setup.slot as usize;
        let SamplingParams { logit_bias, allowed, .. } = &setup.sampling;
        let mut pool = Pool { first: setup.slot * POOL_PER_SLOT, ids: Vec::new() };
        let state = slot_state(setup, &mut pool);
        if !pool.ids.is_empty() {
            self.upload(&self.pool, slot * POOL_PER_SLOT as usize, &pool.ids)?;
        }
        if !logit_bias.is_empty() {
            let (ids, values): (Vec<i32>, Vec<f32>) = logit_bias.iter().map(|&(id, x)| (id as i32, x)).unzip();
            self.upload(&self.bias_ids, slot * MAX_LOGIT_BIAS as usize, &ids)?;
            self.upload(&self.bias_values, slot * MAX_LOGIT_BIAS as usize, &values)?;
        }
        if let Some(allowed) = allowed {
            self.upload(&self.allowed, slot * vocab_words(self.vocab), &self.bits(allowed))?;
        }
        if state.flags & SLOT_PENALTIES != 0 {
            self.upload(&self.prompt_seen, slot * vocab_words(self.vocab), &self.bits(&setup.tokens))?;
            self.device.fill(&self.output_counts, slot * self.vocab * 2, self.vocab * 2, 0)?;
        }
        if let Some(SteeringParams { avoid, switch, .. }) = setup.budget.as_ref().map(|budget| &budget.steering) {
            if !avoid.is_empty() {
                self.upload(&self.avoided, slot * vocab_words(self.vocab), &self.bits(avoid))?;
            }
            if let Some(switch) = switch {
                self.upload(&self.switches, slot * vocab_words(self.vocab), &self.bits(&switch.tokens))?;
            }
        }
        self.upload(&self.states, slot, &[state])
    }

    /// Lets a paused slot make its next draw, in stream order.
    pub fn set_mask(&self, mask: &Mask) -> Result<()> {
        let words = vocab_words(self.vocab);
        assert_eq!(mask.allowed.len(), words, "a mask has a bit for each token");
        self.upload(&self.allowed, mask.slot as usize * words, &mask.allowed)?;
        let at = mask.slot as usize * size_of::<SlotState>() + offset_of!(SlotState, mask_for);
        self.device.upload(&self.states, at, bytemuck::bytes_of(&mask.generated))
    }

    /// Makes a slot inactive, in stream order.
    pub fn release(&self, slot: u32) -> Result<()> {
        let at = slot as usize * size_of::<SlotState>() + offset_of!(SlotState, flags);
        self.device.upload(&self.states, at, bytemuck::bytes_of(&0u32))
    }

    /// Lowers the maximum of a sequence's thinking to what it has reached, in stream order.
    pub fn end_thinking(&self, end: &ThinkingEnd) -> Result<()> {
        let field = offset_of!(SlotState, budget) + offset_of!(Budget, max_thinking);
        let at = end.slot as usize * size_of::<SlotState>() + field;
        self.device.upload(&self.states, at, bytemuck::bytes_of(&(end.at as i32)))
    }

    /// Loops on the device end so many steps after those popped ([`Ring::run_for`]).
    pub fn run_for(&self, steps: u32) {
        self.ring.run_for(steps);
    }

    /// The tokens of the next step in order, if it has completed.
    pub fn pop(&mut self) -> Option<Vec<TokenEvent>> {
        let records = self.ring.pop()?;
        Some(records.iter().filter(|r| r.flags & TOKEN_VALID != 0).map(event).collect())
    }

    /// `index`: of the first element, in elements.
    fn upload<T: bytemuck::NoUninit>(&self, buffer: &Buffer, index: usize, data: &[T]) -> Result<()> {
        self.device.upload(buffer, index * size_of::<T>(), bytemuck::cast_slice(data))
    }

    fn bits(&self, ids: &[u32]) -> Vec<u32> {
        let mut words = vec![0u32; vocab_words(self.vocab)];
        for &id in ids {
            words[id as usize / 32] |= 1 << (id % 32);
        }
        words
    }
}

/// What the sampler knows of a budget when its sequence begins, and the strings that it points at.
pub fn budget_state(params: Option<&BudgetParams>) -> (Budget, Vec<i32>) {
    let mut pool = Pool { first: 0, ids: Vec::new() };
    let state = params.map_or_else(Budget::default, |params| budget(params, &mut pool));
    (state, pool.ids)
}

/// A slot's strings.
struct Pool {
    first: u32,
    ids: Vec<i32>,
}

impl Pool {
    fn add(&mut self, string: &[u32]) -> PoolString {
        let offset = self.first + self.ids.len() as u32;
        self.ids.extend(string.iter().map(|&id| id as i32));
        assert!(self.ids.len() <= POOL_PER_SLOT as usize, "budget.rs limits every string");
        PoolString { offset, length: string.len() as u32 }
    }
}

fn slot_state(setup: &SlotSetup, pool: &mut Pool) -> SlotState {
    let s = &setup.sampling;
    let mut flags = SLOT_ACTIVE;
    let penalties = s.repetition_penalty != 1.0 || s.presence_penalty != 0.0 || s.frequency_penalty != 0.0;
    for (flag, wanted) in [
        (SLOT_IGNORE_EOS, s.ignore_eos),
        (SLOT_ALLOWED_MASK, s.allowed.is_some()),
        (SLOT_PENALTIES, penalties),
        (SLOT_GUIDED, setup.guided),
    ] {
        if wanted {
            flags |= flag;
        }
    }
    let mut stop_ids = [0; MAX_STOP_IDS as usize];
    for (to, &id) in stop_ids.iter_mut().zip(setup.eos_ids.iter().chain(&s.stop_ids)) {
        *to = id as i32;
    }
    SlotState {
        serial: setup.serial,
        flags,
        last_token: *setup.tokens.last().expect("a prompt is never empty") as i32,
        length: setup.tokens.len() as i32,
        generated: 0,
        max_generated: setup.max_generated as i32,
        min_generated: s.min_tokens as i32,
        max_length: setup.max_length as i32,
        mask_for: -1,
        finish: FINISH_NONE,
        temperature: s.temperature,
        top_p: s.top_p,
        min_p: s.min_p,
        top_k: s.top_k.min(i32::MAX as u32) as i32,
        repetition_penalty: s.repetition_penalty,
        presence_penalty: s.presence_penalty,
        frequency_penalty: s.frequency_penalty,
        seed_low: s.seed as u32,
        seed_high: (s.seed >> 32) as u32,
        logprobs: s.logprobs.map_or(-1, |n| n as i32),
        bias_count: s.logit_bias.len() as u32,
        stop_count: (setup.eos_ids.len() + s.stop_ids.len()) as u32,
        stop_ids,
        eos_count: setup.eos_ids.len() as u32,
        budget: setup.budget.as_ref().map_or_else(Budget::default, |b| budget(b, pool)),
    }
}

fn budget(b: &BudgetParams, pool: &mut Pool) -> Budget {
    let mut ignore_strings = [PoolString::default(); MAX_IGNORE_STRINGS as usize];
    for (to, string) in ignore_strings.iter_mut().zip(&b.ignore_strings) {
        *to = pool.add(string);
    }
    let harness = b.accounting == Accounting::S1Harness;
    Budget {
        start: pool.add(&b.start),
        end: pool.add(&b.end),
        close: pool.add(&b.close),
        end_string: pool.add(&b.end_string),
        ignore_strings,
        ignore_count: b.ignore_strings.len() as u32,
        newline: b.newline.map_or(-1, |id| id as i32),
        max_thinking: b.max_thinking_tokens.map_or(BUDGET_NO_MAX as i32, |n| n as i32),
        min_thinking: b.min_thinking_tokens as i32,
        n_ignore: b.n_ignore as i32,
        accounting: match b.accounting {
            Accounting::Strict => ACCOUNT_STRICT,
            Accounting::S1Harness => ACCOUNT_S1_HARNESS,
            Accounting::S1Readme => ACCOUNT_S1_README,
        },
        on_end: match b.on_end {
            OnEnd::Replace => ON_END_REPLACE,
            OnEnd::Mask => ON_END_MASK,
        },
        phase: if b.starts_thinking { PHASE_THINKING } else { PHASE_OFF },
        // As budget_begin_thinking in kernels/budget.cuh.
        mask_end_once: (b.starts_thinking && harness && b.n_ignore > 0) as u32,
        inject_first: -1,
        ends_with_newline: b.prompt_ends_with_newline as u32,
        steering: steering(&b.steering),
        ..Default::default()
    }
}

fn steering(s: &SteeringParams) -> Steering {
    let biased = s.end_bias != 0.0 || s.end_bias_ramp != 0.0;
    let techniques = [
        (STEER_AVOID, !s.avoid.is_empty()),
        (STEER_SWITCH, s.switch.is_some()),
        (STEER_BRAKE, s.brake_margin.is_some()),
        (STEER_END_BIAS, biased),
        (STEER_CONFIDENCE, s.stop.is_some()),
        (STEER_LOOP, s.loop_repeats.is_some()),
    ];
    Steering {
        techniques: techniques.iter().filter(|(_, on)| *on).map(|(bit, _)| bit).sum(),
        switch_penalty: s.switch.as_ref().map_or(0.0, |switch| switch.penalty),
        switch_window: s.switch.as_ref().map_or(0, |switch| switch.window as i32),
        brake_margin: s.brake_margin.unwrap_or(0.0),
        end_bias: s.end_bias,
        end_bias_ramp: s.end_bias_ramp,
        confidence: s.stop.map_or(0.0, |stop| stop.confidence),
        streak_needed: s.stop.map_or(0, |stop| stop.streak as i32),
        stop_after: s.stop.map_or(0, |stop| stop.after as i32),
        loop_repeats: s.loop_repeats.unwrap_or(0) as i32,
        ..Default::default()
    }
}

fn event(record: &TokenRecord) -> TokenEvent {
    let flag = |bit| record.flags & bit != 0;
    let top = record.top_count as usize;
    TokenEvent {
        serial: record.serial,
        slot: record.slot,
        token: record.token as u32,
        injected: flag(TOKEN_INJECTED),
        reasoning: flag(TOKEN_REASONING),
        delimiter: flag(TOKEN_DELIMITER),
        max_hit: flag(TOKEN_MAX_HIT),
        stopped: flag(TOKEN_STOPPED),
        awaits_mask: flag(TOKEN_AWAITS_MASK),
        finish: match record.finish {
            FINISH_NONE => None,
            FINISH_STOP => Some(Finish::Stop),
            FINISH_LENGTH => Some(Finish::Length),
            FINISH_ERROR => Some(Finish::Error),
            other => unreachable!("the sampler knows no finish {other}"),
        },
        generated: record.generated as u32,
        ignores_used: record.ignores_used as u32,
        reasoning_tokens: record.reasoning_tokens as u32,
        found_tokens: 0,
        logprob: record.logprob,
        top: record.top_ids[..top].iter().map(|&id| id as u32).zip(record.top_logprobs).collect(),
        prompt: Vec::new(),
    }
}
