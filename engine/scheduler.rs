//! Decides what runs next: which sequences get a slot, whose prompt goes on, who decodes. Fills one [`Batch`] at a time.
//!
//! Pure logic: the same calls give the same batches. It never waits for a token: all it needs to plan the next step is how
//! many tokens each sequence has been given steps for, so any number of steps may be in flight. A sequence is admitted only
//! when the pages that it may need at its longest are free or will not be needed by the others: nothing is ever preempted, and
//! nothing can be stuck half-way. Knows no device and no text.

use crate::batch::{Batch, Finish, PrefillChunk, SlotSetup, TokenEvent, Work};
use crate::blocks::Blocks;
use std::collections::{BTreeMap, VecDeque};

/// What the device has room for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Slot 0 is reserved.
    pub slots: u32,
    /// Page 0 is reserved.
    pub pages: u32,
    pub page_tokens: u32,
    /// Most sequences in one step.
    pub rows: u32,
    /// Most prompt tokens in one step.
    pub prefill_tokens: u32,
}

impl Limits {
    /// Longest sequence that fits when it is alone.
    pub fn context(&self) -> u32 {
        (self.pages - 1) * self.page_tokens
    }
}

pub struct Scheduler {
    limits: Limits,
    blocks: Blocks,
    waiting: VecDeque<SlotSetup>,
    /// By slot.
    running: BTreeMap<u32, Running>,
    free_slots: Vec<u32>,
    /// Slots that the device must be told about: their sequences did not end by themselves.
    releases: Vec<u32>,
    prefilled_last: bool,
    /// The highest slot of the last decode step: where there are more sequences than rows, those after it are next.
    decoded_last: u32,
}

struct Running {
    setup: SlotSetup,
    /// Prompt tokens in the cache, or in a step in flight.
    prefilled: u32,
    /// Tokens generated, or to come from a step in flight.
    launched: u32,
    /// Tokens generated that the host has seen.
    received: u32,
}

/// How many tokens a sequence can generate.
fn most_generated(setup: &SlotSetup) -> u32 {
    setup.max_generated.min(setup.max_length + setup.generated - setup.tokens.len() as u32)
}

impl Running {
    fn prompt(&self) -> u32 {
        self.setup.tokens.len() as u32
    }

    fn is_prefilling(&self) -> bool {
        self.prefilled < self.prompt()
    }

    fn wants_decode(&self) -> bool {
        !self.is_prefilling() && self.launched < most_generated(&self.setup)
    }

    /// Tokens whose K and V are, or will be, in the cache. Those of the last token never are.
    fn cached(&self) -> u32 {
        let new = self.launched - self.setup.generated;
        self.prefilled + new.saturating_sub(1)
    }
}

/// Tokens in the cache when the sequence is at its longest.
fn longest(setup: &SlotSetup) -> u32 {
    setup.tokens.len() as u32 + (most_generated(setup) - setup.generated).saturating_sub(1)
}

impl Scheduler {
    pub fn new(limits: Limits) -> Scheduler {
        assert!(limits.rows > 0 && limits.prefill_tokens > 0, "a step has room for nothing");
        Scheduler {
            limits,
            blocks: Blocks::new(limits.pages, limits.slots, limits.page_tokens),
            waiting: VecDeque::new(),
            running: BTreeMap::new(),
            free_slots: (1..limits.slots).rev().collect(),
            releases: Vec::new(),
            prefilled_last: false,
            decoded_last: 0,
        }
    }

    /// Puts a sequence last in the queue. Its slot is filled in on admission.
    pub fn submit(&mut self, setup: SlotSetup) {
        let prompt = setup.tokens.len() as u32;
        assert!(setup.generated <= prompt && prompt < setup.max_length, "the engine refuses prompts without room");
        assert!(setup.max_length <= self.limits.context(), "the engine knows how long a sequence can be");
        assert!(setup.generated < most_generated(&setup), "nothing to generate");
        self.waiting.push_back(setup);
    }

    /// Ends a sequence before its time. False when it is unknown or has ended.
    pub fn cancel(&mut self, serial: u32) -> bool {
        if let Some(index) = self.waiting.iter().position(|s| s.serial == serial) {
            self.waiting.remove(index);
            return true;
        }
        let Some(slot) = self.running.iter().find(|(_, r)| r.setup.serial == serial).map(|(&slot, _)| slot) else {
            return false;
        };
        self.end(slot);
        self.releases.push(slot);
        true
    }

    /// Takes note of a token. False when it ran past the end: its sequence has ended already.
    pub fn received(&mut self, event: &TokenEvent) -> bool {
        let Some(running) = self.running.get_mut(&event.slot).filter(|r| r.setup.serial == event.serial) else {
            return false;
        };
        if event.finish == Some(Finish::Error) {
            self.end(event.slot);
            return true;
        }
        running.received += 1;
        assert_eq!(running.setup.generated + running.received, event.generated, "a token was lost or repeated");
        assert!(event.generated <= running.launched, "a token without a step");
        if event.finish.is_some() {
            self.end(event.slot);
        }
        true
    }

    fn end(&mut self, slot: u32) {
        self.running.remove(&slot).expect("the slot is in use");
        self.blocks.release(slot);
        self.free_slots.push(slot);
    }

    /// The next step, or none when every sequence waits for tokens in flight or for room.
    pub fn plan(&mut self) -> Option<Batch> {
        let mut batch = Batch::default();
        self.admit(&mut batch);
        let prefilling = self.running.values().any(Running::is_prefilling);
        let decoding = self.running.values().any(Running::wants_decode);
        // In turns, so that neither a long prompt nor a flood of short ones keeps the others waiting.
        if prefilling && !(decoding && self.prefilled_last) {
            self.prefill(&mut batch);
        } else if decoding {
            self.decode(&mut batch);
        }
        self.prefilled_last = matches!(batch.work, Work::Prefill(_));
        // A slot that has a new sequence is no longer the old one's to release.
        batch.releases = std::mem::take(&mut self.releases);
        batch.releases.retain(|slot| !batch.admissions.iter().any(|a| a.slot == *slot));
        let idle = matches!(batch.work, Work::Nothing) && batch.releases.is_empty();
        (!idle).then_some(batch)
    }

    /// First come, first served: who does not fit yet holds up those behind.
    fn admit(&mut self, batch: &mut Batch) {
        while let (Some(next), Some(&slot)) = (self.waiting.front(), self.free_slots.last()) {
            let promised: u32 = self.running.iter().map(|(&slot, r)| self.promised(slot, r)).sum();
            if promised + self.blocks.pages_for(longest(next)) > self.blocks.free() {
                break;
            }
            self.free_slots.pop();
            let setup = SlotSetup { slot, ..self.waiting.pop_front().expect("there is a next one") };
            batch.admissions.push(setup.clone());
            let launched = setup.generated;
            self.running.insert(slot, Running { setup, prefilled: 0, launched, received: 0 });
        }
    }

    /// Pages that a sequence may still ask for.
    fn promised(&self, slot: u32, running: &Running) -> u32 {
        self.blocks.pages_for(longest(&running.setup)) - self.blocks.held(slot)
    }

    fn prefill(&mut self, batch: &mut Batch) {
        let mut room = self.limits.prefill_tokens;
        let mut chunks = Vec::new();
        for (&slot, running) in self.running.iter_mut().filter(|(_, r)| r.is_prefilling()) {
            if room == 0 || chunks.len() as u32 == self.limits.rows {
                break;
            }
            let position = running.prefilled;
            let end = running.prompt().min(position + room);
            let tokens = running.setup.tokens[position as usize..end as usize].to_vec();
            let last = end == running.prompt();
            room -= end - position;
            running.prefilled = end;
            running.launched += u32::from(last);
            self.blocks.grow(slot, running.cached(), &mut batch.pages);
            chunks.push(PrefillChunk { slot, tokens, position, last });
        }
        batch.work = Work::Prefill(chunks);
    }

    fn decode(&mut self, batch: &mut Batch) {
        let ready = || self.running.iter().filter(|(_, r)| r.wants_decode()).map(|(&slot, _)| slot);
        let after = ready().filter(|&slot| slot > self.decoded_last);
        let before = ready().filter(|&slot| slot <= self.decoded_last);
        let slots: Vec<u32> = after.chain(before).take(self.limits.rows as usize).collect();
        self.decoded_last = *slots.last().expect("somebody wants to decode");
        for &slot in &slots {
            let running = self.running.get_mut(&slot).expect("it is ready");
            running.launched += 1;
            self.blocks.grow(slot, running.cached(), &mut batch.pages);
        }
        batch.work = Work::Decode(slots);
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Pages in use, and pages that sequences can use.
    pub fn pages(&self) -> (u32, u32) {
        let usable = self.limits.pages - 1;
        (usable - self.blocks.free(), usable)
    }

    /// Panics unless the books balance.
    pub fn check(&self) {
        self.blocks.check();
        let promised: u32 = self.running.iter().map(|(&slot, r)| self.promised(slot, r)).sum();
        assert!(promised <= self.blocks.free(), "more is promised than there is");
        assert_eq!(self.running.len() + self.free_slots.len(), self.limits.slots as usize - 1, "a slot is lost");
        for &slot in &self.free_slots {
            assert!(!self.running.contains_key(&slot), "slot {slot} is free and in use");
            assert_eq!(self.blocks.held(slot), 0, "free slot {slot} holds pages");
        }
        for (&slot, r) in &self.running {
            assert!(r.prefilled <= r.prompt(), "more prompt than there is");
            assert!(r.setup.generated + r.received <= r.launched, "a token before its step");
            assert!(r.launched <= most_generated(&r.setup), "more steps than tokens wanted");
            assert_eq!(self.blocks.held(slot), self.blocks.pages_for(r.cached()), "pages of slot {slot}");
        }
    }
}
