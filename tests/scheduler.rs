//! Scheduler and block tables under random submissions, cancellations, ends and run-ahead: after every operation the books
//! balance, and an independent model of the device finds nothing amiss in any batch.

use crate::random::Random;
use ponder::batch::{Batch, Finish, SamplingParams, SlotSetup, TokenEvent, Work};
use ponder::blocks::Blocks;
use ponder::scheduler::{Limits, Scheduler};
use std::collections::{BTreeMap, VecDeque};

const LIMITS: Limits = Limits { slots: 9, pages: 40, page_tokens: 8, rows: 4, prefill_tokens: 24 };

fn setup(serial: u32, prompt: u32, max_generated: u32) -> SlotSetup {
    let tokens = (0..prompt).map(|i| serial * 1000 + i).collect();
    let max_length = LIMITS.context();
    SlotSetup {
        slot: 0,
        serial,
        tokens,
        generated: 0,
        max_generated,
        max_length,
        eos_ids: vec![],
        sampling: sampling(),
        budget: None,
    }
}

fn sampling() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        seed: 0,
        logprobs: None,
        logit_bias: vec![],
        allowed: None,
        stop_ids: vec![],
        ignore_eos: false,
        min_tokens: 0,
    }
}

/// What a device keeps of a slot.
struct Seat {
    setup: SlotSetup,
    prefilled: u32,
    generated: u32,
    active: bool,
    table: Vec<u32>,
}

/// A device that checks what it is told to do, with no arithmetic. Tokens come back a random number of steps later.
struct Device {
    seats: BTreeMap<u32, Seat>,
    /// Which (serial, index) each page belongs to.
    pages: BTreeMap<u32, (u32, u32)>,
    in_flight: VecDeque<Vec<TokenEvent>>,
    random: Random,
}

impl Device {
    fn run(&mut self, batch: &Batch) {
        for setup in &batch.admissions {
            assert!(setup.slot > 0 && setup.slot < LIMITS.slots);
            assert!(!batch.releases.contains(&setup.slot), "a new sequence would be released");
            let seat = Seat { setup: setup.clone(), prefilled: 0, generated: 0, active: true, table: vec![] };
            self.seats.insert(setup.slot, seat);
        }
        for slot in &batch.releases {
            self.seats.get_mut(slot).expect("a released slot was in use").active = false;
        }
        for entry in &batch.pages {
            let seat = self.seats.get_mut(&entry.slot).expect("pages for a slot in use");
            assert_eq!(seat.table.len() as u32, entry.index, "block tables grow in order");
            assert!(entry.page > 0 && entry.page < LIMITS.pages);
            seat.table.push(entry.page);
            self.pages.insert(entry.page, (seat.setup.serial, entry.index));
        }
        let mut events = Vec::new();
        match &batch.work {
            Work::Nothing => assert!(!batch.releases.is_empty(), "a batch without a purpose"),
            Work::Prefill(chunks) => {
                assert!(chunks.len() as u32 <= LIMITS.rows);
                assert!(chunks.iter().map(|c| c.tokens.len() as u32).sum::<u32>() <= LIMITS.prefill_tokens);
                for chunk in chunks {
                    let seat = self.seats.get_mut(&chunk.slot).unwrap();
                    let end = chunk.position as usize + chunk.tokens.len();
                    assert_eq!(chunk.position, seat.prefilled, "chunks follow each other");
                    assert_eq!(chunk.tokens, seat.setup.tokens[chunk.position as usize..end]);
                    assert_eq!(chunk.last, end == seat.setup.tokens.len());
                    assert!(!chunk.tokens.is_empty());
                    seat.prefilled = end as u32;
                    self.sees_own_pages(chunk.slot, end as u32);
                    if chunk.last {
                        events.extend(self.sample(chunk.slot));
                    }
                }
            }
            Work::Decode(slots) => {
                assert!(!slots.is_empty() && slots.len() as u32 <= LIMITS.rows);
                for (i, &slot) in slots.iter().enumerate() {
                    assert!(!slots[..i].contains(&slot), "slot {slot} twice in a step");
                    let seat = &self.seats[&slot];
                    assert_eq!(seat.prefilled as usize, seat.setup.tokens.len(), "decode before the prompt is in");
                    if seat.active {
                        self.sees_own_pages(slot, seat.prefilled + seat.generated);
                        events.extend(self.sample(slot));
                    }
                }
            }
        }
        self.in_flight.push_back(events);
    }

    /// The cache of a sequence up to `tokens` lies in pages that nobody has written to since.
    fn sees_own_pages(&self, slot: u32, tokens: u32) {
        let seat = &self.seats[&slot];
        for index in 0..tokens.div_ceil(LIMITS.page_tokens) {
            let page = seat.table.get(index as usize).expect("no page for a token");
            assert_eq!(self.pages[page], (seat.setup.serial, index), "page {page} was given away");
        }
    }

    fn sample(&mut self, slot: u32) -> Option<TokenEvent> {
        let seat = self.seats.get_mut(&slot).unwrap();
        seat.generated += 1;
        let full = seat.generated == seat.setup.max_generated
            || seat.setup.tokens.len() as u32 + seat.generated == seat.setup.max_length;
        let stop = self.random.below(20) == 0;
        let finish = if stop { Some(Finish::Stop) } else { full.then_some(Finish::Length) };
        seat.active = finish.is_none();
        Some(TokenEvent {
            serial: seat.setup.serial,
            slot,
            token: 7,
            injected: false,
            reasoning: false,
            delimiter: false,
            max_hit: false,
            finish,
            generated: seat.generated,
            ignores_used: 0,
            reasoning_tokens: 0,
            logprob: 0.0,
            top: vec![],
        })
    }
}

#[test]
fn random_operations_keep_the_books() {
    let mut scheduler = Scheduler::new(LIMITS);
    let mut device =
        Device { seats: BTreeMap::new(), pages: BTreeMap::new(), in_flight: VecDeque::new(), random: Random(1) };
    let mut random = Random(2);
    let mut open: BTreeMap<u32, u32> = BTreeMap::new();
    let (mut serial, mut ended, mut cancelled, mut late) = (0, 0, 0, 0);
    for _ in 0..200_000 {
        match random.below(10) {
            0 if open.len() < 20 => {
                serial += 1;
                let prompt = 1 + random.below(100);
                scheduler.submit(setup(serial, prompt, 1 + random.below(60)));
                open.insert(serial, 0);
            }
            1 if random.below(4) == 0 && !open.is_empty() => {
                let victim = *open.keys().nth(random.below(open.len() as u32) as usize).unwrap();
                assert!(scheduler.cancel(victim) && !scheduler.cancel(victim));
                open.remove(&victim);
                cancelled += 1;
            }
            2..6 if device.in_flight.len() < 4 => {
                if let Some(batch) = scheduler.plan() {
                    device.run(&batch);
                }
            }
            _ => {
                for event in device.in_flight.pop_front().into_iter().flatten() {
                    let live = open.get_mut(&event.serial);
                    assert_eq!(scheduler.received(&event), live.is_some(), "tokens of ended sequences are late");
                    let Some(received) = live else {
                        late += 1;
                        continue;
                    };
                    *received += 1;
                    assert_eq!(*received, event.generated);
                    if event.finish.is_some() {
                        open.remove(&event.serial);
                        ended += 1;
                    }
                }
            }
        }
        scheduler.check();
        assert_eq!(scheduler.waiting() + scheduler.running(), open.len());
    }
    assert!(ended > 2000 && cancelled > 200 && late > 100, "{ended} ended, {cancelled} cancelled, {late} late tokens");

    // Whatever is open comes to its end: nothing is stuck.
    while !open.is_empty() {
        let Some(batch) = scheduler.plan() else { break };
        device.run(&batch);
        for event in device.in_flight.drain(..).flatten() {
            if scheduler.received(&event) && event.finish.is_some() {
                open.remove(&event.serial);
            }
        }
    }
    assert!(open.is_empty(), "stuck: {open:?}");
    assert_eq!(scheduler.pages().0, 0, "pages left over");
}

/// The same calls give the same batches.
#[test]
fn plans_are_deterministic() {
    let plans = || {
        let mut scheduler = Scheduler::new(LIMITS);
        (1..=12).for_each(|s| scheduler.submit(setup(s, 10 * s, 5)));
        let batches: Vec<String> = (0..40).map(|_| format!("{:?}", scheduler.plan())).collect();
        batches
    };
    assert_eq!(plans(), plans());
}

/// With more sequences than rows everybody decodes, in turns, and prompts are not starved by decoding nor the reverse.
#[test]
fn everybody_has_a_turn() {
    let mut scheduler = Scheduler::new(Limits { rows: 2, ..LIMITS });
    (1..=5).for_each(|s| scheduler.submit(setup(s, 4, 8)));
    let mut steps = BTreeMap::new();
    let mut kinds = String::new();
    while let Some(batch) = scheduler.plan() {
        match batch.work {
            Work::Prefill(_) => kinds.push('p'),
            Work::Decode(slots) => {
                kinds.push('d');
                slots.iter().for_each(|s| *steps.entry(*s).or_insert(0) += 1);
            }
            Work::Nothing => unreachable!(),
        }
    }
    assert_eq!(steps, (1..=5).map(|s| (s, 7)).collect(), "the first of 8 tokens comes from the prompt");
    assert!(kinds.starts_with("pdpdp"), "{kinds}");
}

/// The whole context: a prompt one token short of it gives exactly one token, and its cache is full to the last page.
#[test]
fn a_sequence_may_fill_the_cache() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(setup(1, LIMITS.context() - 1, 100));
    scheduler.submit(setup(2, 1, 1));
    let mut batches = 0;
    while let Some(batch) = scheduler.plan() {
        assert!(matches!(batch.work, Work::Prefill(_)), "one token needs no decode step");
        assert!(batches == 0 || batch.admissions.is_empty(), "the second must wait for pages");
        scheduler.check();
        batches += 1;
    }
    assert_eq!(batches, (LIMITS.context() - 1).div_ceil(LIMITS.prefill_tokens));
    assert_eq!(scheduler.pages(), (39, 39));
    assert_eq!((scheduler.running(), scheduler.waiting()), (1, 1));
    assert!(scheduler.cancel(1));
    let batch = scheduler.plan().unwrap();
    assert_eq!(batch.admissions.len(), 1);
    scheduler.check();
}

#[test]
fn pages_are_counted() {
    let mut blocks = Blocks::new(5, 3, 8);
    let mut entries = Vec::new();
    blocks.grow(1, 9, &mut entries);
    blocks.grow(1, 16, &mut entries);
    blocks.grow(2, 1, &mut entries);
    assert_eq!(
        entries.iter().map(|e| (e.slot, e.index, e.page)).collect::<Vec<_>>(),
        [(1, 0, 1), (1, 1, 2), (2, 0, 3)]
    );
    assert_eq!((blocks.free(), blocks.held(1), blocks.held(2)), (1, 2, 1));
    blocks.check();
    blocks.release(1);
    assert_eq!((blocks.free(), blocks.held(1)), (3, 0));
    blocks.check();
}
