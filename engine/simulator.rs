//! A model on a GPU, neither of which is there: takes the same batches as `executor.rs`, makes up the tokens and takes, or
//! counts, the time that the GPU's roofline allows for each step. So scheduler, engine and whatever stands before them can be
//! tested with thousands of requests on any machine.
//!
//! The tokens of a sequence are a function of its own tokens and seed, by way of the pages: each position of a page holds a hash
//! of the tokens up to there, computed from the position before it as the block table says. A page given to the wrong sequence
//! therefore changes its tokens. Thinking and budgets are real: the sampler's own state machine decides (kernels/budget.cuh).
//! Must not know requests or text.

use crate::batch::{Batch, Finish, Mask, Score, Scoring, SlotSetup, TokenEvent, Work};
use crate::config::ModelConfig;
use crate::device::simulated::SimulatedGpu;
use crate::executor::MemoryPlan;
use crate::kernels::budget::Machine;
use crate::kernels::params::{
    MAX_SLOTS, PAGE_TOKENS, PHASE_INJECTING, PHASE_THINKING, TOKEN_DELIMITER, TOKEN_INJECTED, TOKEN_MAX_HIT,
    TOKEN_REASONING,
};
use crate::{model, slots};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A natural end, of thinking or of an answer, is drawn once in so many tokens.
const END_EVERY: u64 = 100;

pub struct Simulator {
    gpu: SimulatedGpu,
    config: ModelConfig,
    plan: MemoryPlan,
    /// How often decode reads each key and value.
    key_reads: u64,
    /// [vocab], from the tokenizer.
    traits: Vec<u8>,
    /// By slot; None where nobody has been admitted yet.
    seats: Vec<Option<Seat>>,
    /// By slot: block tables.
    tables: Vec<Vec<u32>>,
    /// [pages][PAGE_TOKENS]: what stands for keys and values.
    pages: Vec<u64>,
    /// Of each step, when it ends and what it gives.
    steps: VecDeque<(Duration, Vec<TokenEvent>)>,
    start: Instant,
    /// The time, where it does not pass by itself: when the last step that was waited for ended.
    clock: Duration,
    /// When the last step launched ends.
    busy_until: Duration,
}

/// A sequence as the sampler knows it.
struct Seat {
    setup: SlotSetup,
    machine: Machine,
    active: bool,
    /// The last that was given.
    mask: Option<Mask>,
    last_token: u32,
    /// Tokens of the sequence.
    length: u32,
    generated: u32,
    /// Of the prompt, if asked for, until the first token.
    scores: Vec<Score>,
}

impl Simulator {
    /// `packed_gqa`: query heads of a KV head read keys and values together.
    pub fn new(
        gpu: SimulatedGpu,
        config: &ModelConfig,
        plan: MemoryPlan,
        traits: Vec<u8>,
        packed_gqa: bool,
    ) -> Simulator {
        assert!(plan.slots <= MAX_SLOTS);
        Simulator {
            gpu,
            config: config.clone(),
            key_reads: if packed_gqa { 1 } else { u64::from(model::heads(config).group()) },
            traits,
            seats: (0..plan.slots).map(|_| None).collect(),
            tables: vec![Vec::new(); plan.slots as usize],
            pages: vec![0; (plan.pages * PAGE_TOKENS) as usize],
            plan,
            steps: VecDeque::new(),
            start: Instant::now(),
            clock: Duration::ZERO,
            busy_until: Duration::ZERO,
        }
    }

    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// Steps whose tokens have not been read yet.
    pub fn in_flight(&self) -> u32 {
        self.steps.len() as u32
    }

    /// Since the start.
    pub fn now(&self) -> Duration {
        if self.gpu.instant { self.clock } else { self.start.elapsed() }
    }

    /// Enqueues a step.
    pub fn submit(&mut self, batch: &Batch) {
        for &slot in &batch.releases {
            self.seat(slot).active = false;
        }
        for setup in &batch.admissions {
            self.seats[setup.slot as usize] = Some(Seat::new(setup));
        }
        for entry in &batch.pages {
            let table = &mut self.tables[entry.slot as usize];
            table.truncate(entry.index as usize);
            assert_eq!(table.len() as u32, entry.index, "block tables grow in order");
            table.push(entry.page);
        }
        for end in &batch.thinking_ends {
            self.seat(end.slot).machine.set_max_thinking(end.at as i32);
        }
        let size = PAGE_TOKENS as usize;
        for copy in &batch.copies {
            self.pages.copy_within(copy.from as usize * size..(copy.from as usize + 1) * size, copy.to as usize * size);
        }
        for mask in &batch.masks {
            self.seat(mask.slot).mask = Some(mask.clone());
        }
        let (mut events, mut keys, mut pairs, mut key_reads) = (Vec::new(), 0, 0, 1);
        let (rows, sampled) = match &batch.work {
            Work::Nothing => return,
            Work::Prefill(chunks) => {
                for chunk in chunks {
                    for (&token, position) in chunk.tokens.iter().zip(chunk.position..) {
                        self.append(chunk.slot, position, token);
                    }
                    if let Some(Scoring { next, .. }) = &chunk.scoring {
                        let certain = |&token| Score { token, logprob: 0.0, rank: 1, top: Vec::new() };
                        let scores = &mut self.seat(chunk.slot).scores;
                        scores.truncate(chunk.position as usize);
                        scores.extend(next.iter().map(certain));
                    }
                    if chunk.last {
                        events.extend(self.sample(chunk.slot));
                    }
                    let (before, new) = (u64::from(chunk.position), chunk.tokens.len() as u64);
                    keys += before + new;
                    pairs += before * new + new * (new + 1) / 2;
                }
                (chunks.iter().map(|c| c.tokens.len() as u64).sum(), chunks.iter().filter(|c| c.last).count() as u64)
            }
            Work::Decode { slots, steps } => {
                assert_eq!(*steps, 1, "steps are simulated one by one");
                for &slot in slots {
                    let seat = self.seat(slot);
                    if seat.runs() {
                        let (position, token) = (seat.length - 1, seat.last_token);
                        self.append(slot, position, token);
                        keys += u64::from(position) + 1;
                        events.extend(self.sample(slot));
                    }
                }
                (pairs, key_reads) = (keys, self.key_reads);
                (slots.len() as u64, slots.len() as u64)
            }
        };
        let key_bytes = model::key_bytes(&self.config, self.plan.kv_type, keys * key_reads);
        let seconds = step_seconds(&self.gpu, &self.config, rows, sampled, key_bytes, pairs);
        self.busy_until = self.busy_until.max(self.now()) + Duration::from_secs_f64(seconds);
        // Where nothing is sampled, nothing is published.
        if sampled > 0 {
            self.steps.push_back((self.busy_until, events));
        }
    }

    /// The tokens of the oldest step in flight; waits for it.
    pub fn wait(&mut self) -> Vec<TokenEvent> {
        let (end, events) = self.steps.pop_front().expect("something to wait for");
        if self.gpu.instant {
            self.clock = end;
        } else {
            std::thread::sleep(end.saturating_sub(self.start.elapsed()));
        }
        events
    }

    fn seat(&mut self, slot: u32) -> &mut Seat {
        self.seats[slot as usize].as_mut().expect("the slot is in use")
    }

    /// Where keys and values of a position lie.
    fn at(&self, slot: u32, position: u32) -> usize {
        let page = self.tables[slot as usize][(position / PAGE_TOKENS) as usize];
        (page * PAGE_TOKENS + position % PAGE_TOKENS) as usize
    }

    fn append(&mut self, slot: u32, position: u32, token: u32) {
        let before = if position == 0 { 0 } else { self.pages[self.at(slot, position - 1)] };
        let at = self.at(slot, position);
        self.pages[at] = mix(before ^ u64::from(token));
    }

    fn sample(&mut self, slot: u32) -> Option<TokenEvent> {
        let position = self.seats[slot as usize].as_ref()?.length - 1;
        let history = self.pages[self.at(slot, position)];
        let seat = self.seats[slot as usize].as_mut()?;
        seat.runs().then(|| seat.sample(slot, history, &self.traits))
    }
}

/// How long a step of so many rows takes. `key_bytes`: of K and V that are read; `pairs`: products of a query and a key.
pub fn step_seconds(gpu: &SimulatedGpu, c: &ModelConfig, rows: u64, sampled: u64, key_bytes: u64, pairs: u64) -> f64 {
    let (layers, head) = (model::layer_elements(c), (c.vocab_size * c.hidden_size) as u64);
    let layer_bytes = if gpu.fp8 { layers } else { model::layer_bytes(c) };
    let bytes = layer_bytes + if sampled > 0 { gpu.element_bytes() * head } else { 0 } + key_bytes;
    let attention = 4 * pairs * (c.num_heads * c.head_dim * c.num_layers) as u64;
    gpu.seconds(bytes, 2 * (rows * layers + sampled * head) + attention)
}

/// splitmix64.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Seat {
    fn new(setup: &SlotSetup) -> Seat {
        let (budget, strings) = slots::budget_state(setup.budget.as_ref());
        Seat {
            setup: setup.clone(),
            machine: Machine::new(budget, strings),
            active: true,
            mask: None,
            last_token: *setup.tokens.last().expect("a prompt is never empty"),
            length: setup.tokens.len() as u32,
            generated: 0,
            scores: Vec::new(),
        }
    }

    /// As slot_is_guided in kernels/kernel.cuh.
    fn is_guided(&self) -> bool {
        self.setup.guided && ![PHASE_THINKING, PHASE_INJECTING].contains(&self.machine.state().phase)
    }

    /// As slot_runs there.
    fn runs(&self) -> bool {
        let masked = self.mask.as_ref().is_some_and(|mask| mask.generated == self.generated);
        self.active && (masked || !self.is_guided())
    }

    /// One step of the sampler.
    fn sample(&mut self, slot: u32, history: u64, traits: &[u8]) -> TokenEvent {
        let step = self.machine.before();
        let token = match step.forced {
            Some(token) => Some(token as u32),
            None => self.choose(mix(history ^ self.setup.sampling.seed), step.mask_end, step.mask_eos, traits),
        };
        let (flags, finish) = match token {
            None => (0, Some(Finish::Error)),
            Some(token) => {
                let flags = self.machine.emit(token as i32, traits[token as usize]);
                self.last_token = token;
                self.length += 1;
                self.generated += 1;
                let may_stop = flags & TOKEN_INJECTED == 0 && self.generated >= self.setup.sampling.min_tokens;
                let full = self.generated >= self.setup.max_generated || self.length >= self.setup.max_length;
                let finish =
                    if may_stop && self.stops(token) { Some(Finish::Stop) } else { full.then_some(Finish::Length) };
                (flags, finish)
            }
        };
        self.active = finish.is_none();
        TokenEvent {
            serial: self.setup.serial,
            slot,
            token: self.last_token,
            injected: flags & TOKEN_INJECTED != 0,
            reasoning: flags & TOKEN_REASONING != 0,
            delimiter: flags & TOKEN_DELIMITER != 0,
            max_hit: flags & TOKEN_MAX_HIT != 0,
            stopped: false,
            awaits_mask: self.active && !self.runs(),
            finish,
            generated: self.generated,
            ignores_used: self.machine.state().ignores_used as u32,
            reasoning_tokens: self.machine.state().reasoning_tokens as u32,
            found_tokens: 0,
            logprob: 0.0,
            top: Vec::new(),
            prompt: std::mem::take(&mut self.scores),
        }
    }

    /// What is emitted where nothing is forced, if anything is left to draw.
    fn choose(&mut self, bits: u64, mask_end: bool, mask_eos: bool, traits: &[u8]) -> Option<u32> {
        let drawn = self.draw(bits, mask_end, mask_eos, traits)?;
        if let Some(token) = self.machine.after(drawn as i32, self.is_eos(drawn)) {
            return Some(token as u32);
        }
        let drawn = self.draw(bits, true, true, traits)?;
        let emitted = self.machine.after(drawn as i32, self.is_eos(drawn));
        Some(emitted.map_or(drawn, |token| token as u32))
    }

    fn is_eos(&self, token: u32) -> bool {
        self.setup.eos_ids.contains(&token)
    }

    /// Whether a token ends the answer.
    fn stops(&self, token: u32) -> bool {
        let sampling = &self.setup.sampling;
        sampling.stop_ids.contains(&token) || !sampling.ignore_eos && self.is_eos(token)
    }

    /// Any token that may be drawn, if there is one; now and then the one that goes on towards an end.
    fn draw(&self, bits: u64, mask_end: bool, mask_eos: bool, traits: &[u8]) -> Option<u32> {
        let state = self.machine.state();
        let completing = self.machine.completing().map(|token| token as u32);
        let too_early = self.generated < self.setup.sampling.min_tokens;
        let allowed = self.setup.sampling.allowed.as_deref();
        let mask = self.mask.as_ref().filter(|_| self.is_guided());
        let is_masked = |token: u32| {
            traits[token as usize] == 0
                || allowed.is_some_and(|allowed| !allowed.contains(&token))
                || mask.is_some_and(|mask| mask.allowed[token as usize / 32] >> (token % 32) & 1 == 0)
                || mask_end && completing == Some(token)
                || mask_eos && self.is_eos(token)
                || too_early && (self.is_eos(token) || self.setup.sampling.stop_ids.contains(&token))
        };
        let end = self.setup.budget.as_ref().and_then(|b| b.end.get(state.end_match as usize).copied());
        let thinking = state.phase == PHASE_THINKING;
        // An end that has begun goes on as often as not.
        let begun = thinking && state.end_match > 0 && bits >> 63 == 1;
        if begun || (bits >> 8).is_multiple_of(END_EVERY) {
            let end = if thinking { end } else { self.setup.eos_ids.first().copied() };
            if let Some(end) = end.filter(|&end| !is_masked(end)) {
                return Some(end);
            }
        }
        let any = (0..64).map(|i| (mix(bits ^ i) % traits.len() as u64) as u32);
        let ordinary = any.filter(|&token| !self.stops(token) && !self.is_eos(token)).find(|&token| !is_masked(token));
        // Where little is allowed, the first of it.
        let first = || (0..traits.len() as u32).find(|&token| !is_masked(token));
        ordinary.or_else(first)
    }
}
