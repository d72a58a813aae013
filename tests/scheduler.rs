//! Scheduler and pages under random submissions, forks, priorities, cancellations, ends, preemptions and run-ahead: after every
//! operation the books balance, a device that remembers what is in every page finds nothing amiss in any batch, and every
//! sequence gets the tokens that it gets alone.

use crate::random::Random;
use ponder::batch::{Batch, BudgetParams, Finish, Mask, PrefillChunk, SamplingParams, SlotSetup, TokenEvent, Work};
use ponder::blocks::PageHash;
use ponder::scheduler::{Counters, Limits, Scheduler, Submission};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};

const LIMITS: Limits = Limits {
    slots: 9,
    pages: 40,
    page_tokens: 8,
    rows: 4,
    prefill_tokens: 24,
    prefill_beside_decode: 13,
    decode_steps: 1,
    deterministic: false,
};

fn setup(serial: u32, tokens: Vec<u32>, max_generated: u32, limits: &Limits) -> SlotSetup {
    let max_length = limits.context();
    SlotSetup {
        slot: 0,
        serial,
        tokens,
        max_generated,
        max_length,
        eos_ids: vec![],
        sampling: sampling(),
        budget: None,
        guided: false,
    }
}

/// A prompt that shares nothing with others.
fn own(serial: u32, prompt: u32, max_generated: u32) -> Submission {
    let tokens = (0..prompt).map(|i| serial * 1000 + i).collect();
    submission(setup(serial, tokens, max_generated, &LIMITS))
}

fn submission(setup: SlotSetup) -> Submission {
    Submission { setup, priority: 0, tenant: PageHash::root(""), fork_of: None }
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
        prompt_logprobs: None,
        logit_bias: vec![],
        allowed: None,
        stop_ids: vec![],
        ignore_eos: false,
        min_tokens: 0,
    }
}

/// Of a token and all before it.
fn follow(before: u64, token: u32) -> u64 {
    Random(before ^ u64::from(token) << 20).next()
}

/// The token that comes after those that `history` stands for, and whether it ends the sequence.
fn next_token(serial: u32, history: u64) -> (u32, bool) {
    let bits = Random(history ^ u64::from(serial)).next();
    ((bits >> 8) as u32 % 1000, bits.is_multiple_of(40))
}

/// What a sequence comes to when it is alone.
fn alone(setup: &SlotSetup) -> Vec<u32> {
    let mut history = setup.tokens.iter().fold(0, |h, &t| follow(h, t));
    let most = setup.max_generated.min(setup.max_length - setup.tokens.len() as u32);
    let mut tokens = Vec::new();
    while (tokens.len() as u32) < most {
        let (token, stop) = next_token(setup.serial, history);
        tokens.push(token);
        history = follow(history, token);
        if stop {
            break;
        }
    }
    tokens
}

/// What a device keeps of a slot.
struct Seat {
    setup: SlotSetup,
    tokens: Vec<u32>,
    active: bool,
    /// No draw needs a mask until it is over.
    thinking: bool,
    /// The last that came.
    mask: Option<Mask>,
    table: Vec<u32>,
}

impl Seat {
    fn generated(&self) -> u32 {
        (self.tokens.len() - self.setup.tokens.len()) as u32
    }

    fn runs(&self) -> bool {
        let masked = self.mask.as_ref().is_some_and(|mask| mask.generated == self.generated());
        self.active && (!self.setup.guided || self.thinking || masked)
    }
}

/// What stands for the mask of a draw.
fn mask(serial: u32, generated: u32) -> Vec<u32> {
    vec![serial, generated]
}

/// A device that checks what it is told to do, with hashes for keys and values: what is in a page says which tokens stand
/// before it. Tokens come back a random number of steps later.
struct Device {
    limits: Limits,
    seats: BTreeMap<u32, Seat>,
    /// Of each page.
    pages: Vec<Vec<u64>>,
    in_flight: VecDeque<Vec<TokenEvent>>,
}

impl Device {
    fn new(limits: Limits) -> Device {
        let pages = vec![vec![0; limits.page_tokens as usize]; limits.pages as usize];
        Device { limits, seats: BTreeMap::new(), pages, in_flight: VecDeque::new() }
    }

    fn run(&mut self, batch: &Batch) {
        self.run_steps(batch, u32::MAX);
    }

    /// Of several decode steps the first so many.
    fn run_steps(&mut self, batch: &Batch, most: u32) {
        let limits = self.limits;
        for setup in &batch.admissions {
            assert!(setup.slot > 0 && setup.slot < limits.slots);
            assert!(!batch.releases.contains(&setup.slot), "a new sequence would be released");
            let seat = Seat {
                setup: setup.clone(),
                tokens: setup.tokens.clone(),
                active: true,
                thinking: !setup.begins_guided(),
                mask: None,
                table: vec![],
            };
            self.seats.insert(setup.slot, seat);
        }
        for slot in &batch.releases {
            self.seats.get_mut(slot).expect("a released slot was in use").active = false;
        }
        for entry in &batch.pages {
            assert!(entry.page > 0 && entry.page < limits.pages);
            let table = &mut self.seats.get_mut(&entry.slot).expect("pages for a slot in use").table;
            table.truncate(entry.index as usize);
            assert_eq!(table.len() as u32, entry.index, "block tables grow in order");
            table.push(entry.page);
        }
        for copy in &batch.copies {
            self.pages[copy.to as usize] = self.pages[copy.from as usize].clone();
        }
        for mask in &batch.masks {
            assert!(
                matches!(&batch.work, Work::Decode { slots, .. } if slots.contains(&mask.slot)),
                "a mask too early"
            );
            let seat = self.seats.get_mut(&mask.slot).expect("masks are for slots in use");
            assert!(seat.active && !seat.runs(), "a mask that nobody waits for");
            assert_eq!(mask.allowed, self::mask(seat.setup.serial, seat.generated()));
            seat.mask = Some(mask.clone());
        }
        match &batch.work {
            Work::Nothing => {
                assert!(!batch.releases.is_empty() || !batch.pages.is_empty(), "a batch without a purpose");
            }
            Work::Prefill(chunks) => {
                assert!(chunks.len() as u32 <= limits.rows);
                assert!(chunks.iter().map(|c| c.tokens.len() as u32).sum::<u32>() <= limits.prefill_tokens);
                // As the kernels do: what all rows append, then what they read.
                chunks.iter().for_each(|chunk| self.append(chunk));
                let mut events = Vec::new();
                for chunk in chunks {
                    let end = chunk.position + chunk.tokens.len() as u32;
                    let history = self.read(chunk.slot, end);
                    assert_eq!(chunk.last, end == self.seats[&chunk.slot].tokens.len() as u32);
                    events.extend(chunk.last.then(|| self.sample(chunk.slot, history)).flatten());
                }
                self.in_flight.push_back(events);
            }
            Work::Decode { slots, steps } => {
                assert!(!slots.is_empty() && slots.len() as u32 <= limits.rows);
                assert!(*steps > 0 && *steps <= limits.decode_steps);
                for _ in 0..most.min(*steps) {
                    let events = self.decode(slots);
                    self.in_flight.push_back(events);
                }
            }
        }
    }

    fn decode(&mut self, slots: &[u32]) -> Vec<TokenEvent> {
        let mut events = Vec::new();
        for (i, &slot) in slots.iter().enumerate() {
            assert!(!slots[..i].contains(&slot), "slot {slot} twice in a step");
            let seat = &self.seats[&slot];
            if seat.runs() {
                let (position, token) = (seat.tokens.len() as u32 - 1, *seat.tokens.last().unwrap());
                self.append(&PrefillChunk { slot, tokens: vec![token], position, last: true, scoring: None });
                let history = self.read(slot, position + 1);
                events.extend(self.sample(slot, history));
            }
        }
        events
    }

    fn append(&mut self, chunk: &PrefillChunk) {
        let seat = &self.seats[&chunk.slot];
        assert!(!chunk.tokens.is_empty());
        for (&token, position) in chunk.tokens.iter().zip(chunk.position..) {
            assert_eq!(seat.tokens[position as usize], token, "another sequence's token");
            let before = if position == 0 { 0 } else { self.at(seat, position - 1) };
            let size = self.limits.page_tokens;
            self.pages[seat.table[(position / size) as usize] as usize][(position % size) as usize] =
                follow(before, token);
        }
    }

    fn at(&self, seat: &Seat, position: u32) -> u64 {
        let size = self.limits.page_tokens;
        self.pages[seat.table[(position / size) as usize] as usize][(position % size) as usize]
    }

    /// Attention: everything up to there is what this sequence's tokens make it.
    fn read(&self, slot: u32, tokens: u32) -> u64 {
        let seat = &self.seats[&slot];
        let mut history = 0;
        for (&token, position) in seat.tokens.iter().zip(0..tokens) {
            history = follow(history, token);
            assert_eq!(self.at(seat, position), history, "position {position} of serial {}", seat.setup.serial);
        }
        history
    }

    fn sample(&mut self, slot: u32, history: u64) -> Option<TokenEvent> {
        let seat = self.seats.get_mut(&slot).unwrap();
        if !seat.active {
            return None;
        }
        assert!(seat.runs(), "a prompt whose first draw has no mask");
        let (token, stop) = next_token(seat.setup.serial, history);
        seat.tokens.push(token);
        seat.thinking &= !token.is_multiple_of(8);
        let generated = seat.generated();
        let full = generated == seat.setup.max_generated || seat.tokens.len() as u32 == seat.setup.max_length;
        let finish = if stop { Some(Finish::Stop) } else { full.then_some(Finish::Length) };
        seat.active = finish.is_none();
        Some(TokenEvent {
            serial: seat.setup.serial,
            slot,
            token,
            injected: false,
            reasoning: false,
            delimiter: false,
            max_hit: false,
            stopped: false,
            awaits_mask: seat.active && !seat.runs(),
            finish,
            generated,
            ignores_used: 0,
            reasoning_tokens: 0,
            found_tokens: 0,
            logprob: 0.0,
            top: vec![],
            prompt: vec![],
        })
    }
}

/// What random operations came to.
#[derive(Debug, Default)]
struct Outcome {
    ended: u32,
    cancelled: u32,
    late: u32,
    copies: u32,
    /// Decode steps beyond the first of a batch, and those that were left out.
    more_steps: u32,
    left_out: u32,
    /// Masks given.
    masks: u32,
    counters: Counters,
}

/// `loops`: of several decode steps in one batch some may be left out, as where the host breaks in. `guided`: one sequence in
/// so many needs masks, which come after any number of operations.
fn random_operations(limits: Limits, loops: bool, guided: Option<u32>, operations: u32, seed: u64) -> Outcome {
    let mut scheduler = Scheduler::new(limits);
    let mut device = Device::new(limits);
    let mut random = Random(seed);
    // What is expected of open sequences, and what has come of it.
    let mut open: BTreeMap<u32, (SlotSetup, Vec<u32>)> = BTreeMap::new();
    let mut outcome = Outcome::default();
    let (mut serial, mut looping) = (0, false);
    // The tokens of one that has ended.
    let ended: RefCell<Vec<u32>> = RefCell::default();
    // Masks that are due: for which draw of which sequence.
    let due: RefCell<Vec<(u32, u32)>> = RefCell::default();
    let receive = |scheduler: &mut Scheduler, open: &mut BTreeMap<u32, (SlotSetup, Vec<u32>)>, event: &TokenEvent| {
        let live = open.get_mut(&event.serial);
        assert_eq!(scheduler.received(&mut event.clone()), live.is_some(), "tokens of ended sequences are late");
        let (setup, tokens) = live?;
        tokens.push(event.token);
        assert_eq!(tokens.len() as u32, event.generated);
        if event.awaits_mask {
            due.borrow_mut().push((event.serial, event.generated));
        }
        if event.finish.is_some() {
            assert_eq!(*tokens, alone(setup), "serial {}", event.serial);
            ended.replace(setup.tokens.iter().chain(&*tokens).copied().collect());
            open.remove(&event.serial);
        }
        Some(event.finish.is_some())
    };
    for _ in 0..operations {
        let many = due.borrow().len() as u32;
        match random.below(if guided.is_some() { 12 } else { 10 }) {
            10.. if many > 0 => {
                // Also of those that have been cancelled.
                let (serial, generated) = due.borrow_mut().swap_remove(random.below(many) as usize);
                scheduler.set_mask(serial, mask(serial, generated));
                outcome.masks += 1;
            }
            0 if open.len() < 20 => {
                serial += 1;
                // One of three beginnings, then something else; or the prompt of another; or what another has come to.
                let fork_of = (random.below(4) == 0).then(|| open.keys().last().copied()).flatten();
                let family = random.below(3) * 1_000_000;
                let shared = random.below(60);
                let own = (0..=random.below(50)).map(|i| serial * 1000 + i);
                let tokens = match fork_of {
                    Some(parent) => open[&parent].0.tokens.clone(),
                    None if random.below(3) == 0 && ended.borrow().len() < 150 => {
                        ended.borrow().iter().copied().chain(own).collect()
                    }
                    None => (0..shared).map(|i| family + i).chain(own).collect(),
                };
                let tenant = PageHash::root(["", "another"][usize::from(fork_of.is_none() && random.below(5) == 0)]);
                let mut setup = setup(serial, tokens, 1 + random.below(100), &limits);
                if guided.is_some_and(|one_in| random.below(one_in) == 0) {
                    setup.guided = true;
                    let starts_thinking = random.below(2) == 0;
                    setup.budget = Some(BudgetParams { starts_thinking, ..Default::default() });
                    due.borrow_mut().extend((!starts_thinking).then_some((serial, 0)));
                }
                let priority = if random.below(5) == 0 { random.below(10) } else { 0 };
                scheduler.submit(Submission { setup: setup.clone(), priority, tenant, fork_of });
                open.insert(serial, (setup, vec![]));
            }
            1 if random.below(8) == 0 && !open.is_empty() => {
                let victim = *open.keys().nth(random.below(open.len() as u32) as usize).unwrap();
                assert!(scheduler.cancel(victim) && !scheduler.cancel(victim));
                open.remove(&victim);
                outcome.cancelled += 1;
            }
            2..6 if device.in_flight.len() < 4 && !looping => {
                if let Some(batch) = scheduler.plan() {
                    outcome.copies += batch.copies.len() as u32;
                    let steps = if let Work::Decode { steps, .. } = batch.work { steps } else { 1 };
                    looping = loops && steps > 1;
                    let made = if looping { 1 + random.below(steps) } else { steps };
                    outcome.more_steps += steps - 1;
                    outcome.left_out += steps - made;
                    device.run_steps(&batch, made);
                }
            }
            _ => {
                for event in device.in_flight.pop_front().into_iter().flatten() {
                    match receive(&mut scheduler, &mut open, &event) {
                        Some(ended) => outcome.ended += u32::from(ended),
                        None => outcome.late += 1,
                    }
                }
                if looping && device.in_flight.is_empty() {
                    scheduler.settle();
                    looping = false;
                }
            }
        }
        scheduler.check();
        assert_eq!(scheduler.waiting() + scheduler.running(), open.len());
    }

    // Whatever is open comes to its end: nothing is stuck.
    for event in device.in_flight.drain(..).flatten() {
        receive(&mut scheduler, &mut open, &event);
    }
    scheduler.settle();
    while !open.is_empty() {
        due.borrow_mut().drain(..).for_each(|(serial, generated)| scheduler.set_mask(serial, mask(serial, generated)));
        let batch = scheduler.plan();
        assert!(batch.is_some() || !device.in_flight.is_empty(), "stuck: {:?}", open.keys());
        batch.iter().for_each(|batch| device.run(batch));
        for event in device.in_flight.drain(..).flatten() {
            receive(&mut scheduler, &mut open, &event);
        }
    }
    scheduler.check();
    assert_eq!((scheduler.pages().0, scheduler.running()), (0, 0), "something is left over");
    outcome.counters = scheduler.counters();
    outcome
}

/// With too few pages for all who have a seat.
#[test]
fn random_operations_keep_the_books() {
    let outcome = random_operations(LIMITS, false, None, 1_000_000, 1);
    let Outcome { ended, cancelled, late, copies, counters, .. } = outcome;
    assert!(ended > 5000 && cancelled > 1000 && late > 1000 && copies > 300, "{outcome:?}");
    assert!(counters.preemptions > 1000 && counters.found_tokens * 10 > counters.prefilled_tokens, "{outcome:?}");
}

/// With a row for everybody.
#[test]
fn random_operations_with_many_rows() {
    let limits = Limits { slots: 33, pages: 70, rows: 32, prefill_tokens: 64, prefill_beside_decode: 64, ..LIMITS };
    let outcome = random_operations(limits, false, None, 150_000, 2);
    assert!(outcome.counters.preemptions > 300, "{outcome:?}");
}

/// Nothing is preempted where a sequence's tokens are to depend on nothing but itself.
#[test]
fn random_operations_deterministic() {
    let outcome = random_operations(Limits { deterministic: true, ..LIMITS }, false, None, 150_000, 3);
    assert!(outcome.ended > 1000 && outcome.counters.preemptions == 0 && outcome.copies > 50, "{outcome:?}");
    assert!(outcome.counters.found_tokens > 10_000, "{outcome:?}");
}

/// Several steps at a time, and loops that end early.
#[test]
fn random_operations_with_many_steps() {
    // A seat and a row for everybody, or somebody would always wait; pages are short now and then.
    let limits = Limits {
        slots: 25,
        pages: 85,
        rows: 24,
        prefill_tokens: 200,
        prefill_beside_decode: 200,
        decode_steps: 13,
        ..LIMITS
    };
    for (limits, loops, seed) in
        [(limits, false, 5), (limits, true, 6), (Limits { deterministic: true, pages: 250, ..limits }, true, 7)]
    {
        let outcome = random_operations(limits, loops, None, 150_000, seed);
        assert!(outcome.ended > 1000 && outcome.cancelled > 100, "{outcome:?}");
        assert!(outcome.more_steps > 2000 && loops == (outcome.left_out > 500), "{outcome:?}");
        assert!(limits.deterministic || outcome.counters.preemptions > 50, "{outcome:?}");
    }
}

/// Some pause for their masks, many steps or none at all.
#[test]
fn random_operations_with_masks() {
    let many = Limits { slots: 25, pages: 85, rows: 24, prefill_tokens: 200, prefill_beside_decode: 200, ..LIMITS };
    let steps = Limits { decode_steps: 13, ..many };
    let deterministic = Limits { deterministic: true, pages: 250, ..steps };
    let cases =
        [(LIMITS, false, 8), (many, false, 9), (steps, false, 10), (steps, true, 11), (deterministic, true, 12)];
    for (limits, loops, seed) in cases {
        let outcome = random_operations(limits, loops, Some(2), 150_000, seed);
        assert!(outcome.ended > 500 && outcome.cancelled > 100 && outcome.masks > 5000, "{outcome:?}");
        assert!(limits.deterministic || outcome.counters.preemptions > 50, "{outcome:?}");
    }
}

/// A sequence without its mask costs the others no step, and one with its mask gets one step for it.
#[test]
fn who_waits_for_a_mask_holds_up_nobody() {
    let (mut scheduler, mut device) = (Scheduler::new(LIMITS), Device::new(LIMITS));
    let long = |&serial: &u32| alone(&own(serial, 8, 60).setup).len() > 30;
    let serials: Vec<u32> = (1..).filter(long).take(3).collect();
    for &serial in &serials {
        let Submission { mut setup, .. } = own(serial, 8, 60);
        setup.guided = serial == serials[1];
        scheduler.submit(submission(setup));
    }
    let mut rows = Vec::new();
    for step in 0..20 {
        let batch = scheduler.plan().unwrap();
        if let Work::Decode { slots, .. } = &batch.work {
            rows.push(slots.len());
        }
        device.run(&batch);
        assert!(device.in_flight.drain(..).flatten().all(|mut event| scheduler.received(&mut event)));
        scheduler.check();
        if step == 10 {
            scheduler.set_mask(serials[1], mask(serials[1], 0));
        }
    }
    let mut expected = vec![2; 19];
    expected[10] = 3;
    assert_eq!(rows, expected);
}

/// Steps come in numbers only while nothing else could be done in between, and where all their pages are there.
#[test]
fn several_steps_only_where_nothing_waits() {
    let mut scheduler = Scheduler::new(Limits { decode_steps: 5, ..LIMITS });
    let next = |scheduler: &mut Scheduler| {
        let batch = scheduler.plan()?;
        scheduler.check();
        Some(if let Work::Decode { slots, steps } = batch.work { (slots.len(), steps) } else { (0, 0) })
    };
    (1..=2).for_each(|s| scheduler.submit(own(s, 5, 7 * s)));
    // The first token comes from the prompt; the shorter one ends within the second batch.
    assert_eq!([(); 4].map(|()| next(&mut scheduler)), [(0, 0), (2, 5), (2, 5), (1, 3)].map(Some));
    assert_eq!(next(&mut scheduler), None, "all is launched");
    // More prompts than there are seats for: from now on somebody always waits.
    (3..=9).for_each(|s| scheduler.submit(own(s, 2, 20)));
    assert_eq!([(); 4].map(|()| next(&mut scheduler)), [(0, 0), (4, 1), (0, 0), (4, 1)].map(Some));
}

#[test]
fn steps_that_were_left_out_are_made_up_for() {
    let limits = Limits { decode_steps: 20, ..LIMITS };
    let (mut scheduler, mut device) = (Scheduler::new(limits), Device::new(limits));
    scheduler.submit(own(1, 5, 12));
    let mut steps = Vec::new();
    while let Some(batch) = scheduler.plan() {
        if let Work::Decode { steps: planned, .. } = batch.work {
            steps.push(planned);
        }
        device.run_steps(&batch, 3);
        assert!(device.in_flight.drain(..).flatten().all(|mut event| scheduler.received(&mut event)));
        scheduler.settle();
        scheduler.check();
    }
    assert_eq!(steps, [11, 8, 5, 2], "the first of 12 tokens comes from the prompt");
    assert_eq!(scheduler.running(), 0);
}

/// The same calls give the same batches.
#[test]
fn plans_are_deterministic() {
    let plans = || {
        let mut scheduler = Scheduler::new(LIMITS);
        (1..=12).for_each(|s| scheduler.submit(own(s, 10 * s, 5)));
        let batches: Vec<String> = (0..40).map(|_| format!("{:?}", scheduler.plan())).collect();
        batches
    };
    assert_eq!(plans(), plans());
}

/// With more sequences than rows everybody decodes, in turns, and prompts are not starved by decoding nor the reverse.
#[test]
fn everybody_has_a_turn() {
    let mut scheduler = Scheduler::new(Limits { rows: 2, ..LIMITS });
    (1..=5).for_each(|s| scheduler.submit(own(s, 4, 8)));
    let mut steps = BTreeMap::new();
    let mut kinds = String::new();
    while let Some(batch) = scheduler.plan() {
        match batch.work {
            Work::Prefill(_) => kinds.push('p'),
            Work::Decode { slots, .. } => {
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
    scheduler.submit(own(1, LIMITS.context() - 1, 100));
    scheduler.submit(own(2, 1, 1));
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

/// The first by rank always goes on, whatever comes after it and however much of that there is; so everybody ends.
#[test]
fn nobody_starves() {
    let mut scheduler = Scheduler::new(LIMITS);
    let mut device = Device::new(LIMITS);
    let mut random = Random(4);
    let (mut submitted, mut ended): (BTreeMap<u32, u32>, BTreeMap<u32, u32>) = Default::default();
    let mut serial = 0;
    for step in 0..40_000 {
        // Always more than there is room for; every other one pushes ahead.
        while scheduler.waiting() < 12 {
            serial += 1;
            let new = own(serial, 1 + random.below(150), 1 + random.below(150));
            scheduler.submit(Submission { priority: serial % 2 * 8, ..new });
            submitted.insert(serial, step);
        }
        scheduler.plan().iter().for_each(|batch| device.run(batch));
        for mut event in device.in_flight.pop_front().into_iter().flatten() {
            scheduler.received(&mut event);
            if event.finish.is_some() {
                ended.insert(event.serial, step);
            }
        }
        scheduler.check();
    }
    assert!(scheduler.counters().preemptions > 100 && ended.len() > 1000);
    // 20 ahead of it, 8 that may push ahead, each of at most 300 tokens.
    let longest = submitted.iter().map(|(s, from)| ended.get(s).unwrap_or(&40_000) - from).max().unwrap();
    assert!(longest < 28 * 300, "{longest} steps");
    let oldest = submitted.keys().find(|s| !ended.contains_key(s)).unwrap();
    assert!(serial - oldest < 40, "{oldest} of {serial}");
}

/// What has been computed once is found again: by the same prompt, by one that goes on where an answer ended, and by forks; not
/// by another tenant.
#[test]
fn computed_pages_are_found() {
    let limits = Limits { prefill_tokens: 1000, ..LIMITS };
    let mut scheduler = Scheduler::new(limits);
    let mut device = Device::new(limits);
    let mut found = |submissions: Vec<Submission>| {
        let before = scheduler.counters().found_tokens;
        submissions.into_iter().for_each(|s| scheduler.submit(s));
        let mut answers: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        while let Some(batch) = scheduler.plan() {
            device.run(&batch);
            for mut event in device.in_flight.pop_front().unwrap() {
                scheduler.received(&mut event);
                answers.entry(event.serial).or_default().push(event.token);
            }
            scheduler.check();
        }
        (scheduler.counters().found_tokens - before, answers)
    };
    let prompt: Vec<u32> = (0..50).collect();
    let ask = |serial, tokens: &[u32], n| submission(setup(serial, tokens.to_vec(), n, &limits));
    assert_eq!(found(vec![ask(1, &prompt, 1)]).0, 0);
    assert_eq!(found(vec![ask(2, &prompt, 1)]).0, 48, "full pages");
    let other = Submission { tenant: PageHash::root("another"), ..ask(3, &prompt, 1) };
    assert_eq!(found(vec![other]).0, 0);
    // In one step with the one that computes them.
    let new: Vec<u32> = (100..164).collect();
    assert_eq!(found(vec![ask(4, &new, 1), ask(5, &new, 1)]).0, 56, "the last page's logits are needed");

    // The last token of an answer is in no page, wherever it ends.
    for n in 20..29 {
        let long: Vec<u32> = (0..16).map(|i| 100 * n + i).collect();
        let (_, answers) = found(vec![ask(n, &long, n)]);
        let conversation: Vec<u32> = long.iter().chain(&answers[&n]).copied().chain([1, 2, 3]).collect();
        let expected = (long.len() + answers[&n].len() - 1) as u64 / 8 * 8;
        assert_eq!(found(vec![ask(100 + n, &conversation, 1)]).0, expected);
    }

    let parent: Vec<u32> = (300..331).collect();
    let fork = |serial| Submission { fork_of: Some(10), ..ask(serial, &parent, 9) };
    assert_eq!(
        found(vec![ask(10, &parent, 9), fork(11), fork(12)]).0,
        2 * 30,
        "all but the token whose logits are needed"
    );
}

/// A sequence whose logits were not finite leaves nothing that others would find.
#[test]
fn bad_pages_are_forgotten() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.submit(own(1, 20, 5));
    let chunk = scheduler.plan().unwrap();
    let Work::Prefill(chunks) = &chunk.work else { panic!("a prompt comes first") };
    let mut event = TokenEvent {
        serial: 1,
        slot: chunks[0].slot,
        token: 0,
        injected: false,
        reasoning: false,
        delimiter: false,
        max_hit: false,
        stopped: false,
        awaits_mask: false,
        finish: Some(Finish::Error),
        generated: 0,
        ignores_used: 0,
        reasoning_tokens: 0,
        found_tokens: 0,
        logprob: 0.0,
        top: vec![],
        prompt: vec![],
    };
    assert!(scheduler.received(&mut event));
    event.finish = None;
    assert!(!scheduler.received(&mut event), "it has ended");
    scheduler.check();
    let Submission { setup, .. } = own(1, 20, 5);
    scheduler.submit(submission(SlotSetup { serial: 2, ..setup }));
    scheduler.plan().unwrap();
    assert_eq!(scheduler.counters().found_tokens, 0);
    scheduler.check();
}
