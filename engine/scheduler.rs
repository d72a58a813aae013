//! Decides what runs next: which sequences get a seat, whose prompt goes on, who decodes. Fills one [`Batch`] at a time.
//!
//! Pure logic: the same calls give the same batches. It never waits for a token: all it needs to plan the next step is how
//! many tokens each sequence has been given steps for, so any number of steps may be in flight.
//!
//! A guided sequence pauses itself on the device after each token whose successor needs a mask, and says so with that token:
//! steps in flight beyond it have done nothing for the sequence and are taken back. It gets one more step when its mask has
//! come ([`Scheduler::set_mask`]); the others do not notice.
//!
//! Sequences are served by rank: first come, first served, but for priorities. Where pages run out, the last by rank loses its
//! own: it is *preempted*. It keeps its seat, and so on the device all that the sampler knows of it (budget, penalties, random
//! numbers); what it has streamed stays, tokens in flight still arrive, and when there is room again its keys and values are
//! computed anew from its tokens. The first by rank is never preempted, so it ends; then another is first: nobody starves.
//!
//! Invariant ([`Scheduler::check`]): whoever is preempted is behind all that hold pages. Knows no device and no text.

use crate::batch::{Accounting, Batch, Finish, Mask, PrefillChunk, Scoring, SlotSetup, ThinkingEnd, TokenEvent, Work};
use crate::blocks::{Blocks, CacheWatcher, PageHash};
use std::collections::{BTreeMap, HashMap};

/// What the device has room for, and how to use it.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Slot 0 is reserved.
    pub slots: u32,
    /// Page 0 is reserved.
    pub pages: u32,
    pub page_tokens: u32,
    /// Most sequences in one step.
    pub rows: u32,
    /// Most prompt tokens in one step, and most while others wait to decode: the pause between their tokens.
    pub prefill_tokens: u32,
    pub prefill_beside_decode: u32,
    /// Most decode steps in one batch.
    pub decode_steps: u32,
    /// A sequence's tokens depend on nothing but itself. Decoding rounds otherwise than prefill, so nothing is preempted (a
    /// sequence begins when its longest form fits beside the others'), and pages are shared only where prefill made them.
    pub deterministic: bool,
}

impl Limits {
    /// Longest sequence that fits when it is alone.
    pub fn context(&self) -> u32 {
        (self.pages - 1) * self.page_tokens
    }
}

/// A sequence to be served.
#[derive(Clone, Debug)]
pub struct Submission {
    /// Its slot is filled in on admission. Serials rise.
    pub setup: SlotSetup,
    /// How many sequences that came earlier it goes before; so it delays nobody for ever.
    pub priority: u32,
    /// Whose sequences it may share pages with ([`PageHash::root`]).
    pub tenant: PageHash,
    /// Serial of an earlier sequence with the same prompt: where that one has just computed it, nothing is computed twice.
    pub fork_of: Option<u32>,
}

/// What has happened since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub preemptions: u64,
    /// Tokens whose keys and values were computed from known tokens, and those that were found.
    pub prefilled_tokens: u64,
    pub found_tokens: u64,
}

/// Smaller goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    place: i64,
    serial: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Waiting(Rank),
    Seated(u32),
}

struct Sequence {
    rank: Rank,
    setup: SlotSetup,
    /// Prompt, and what was generated as far as the host has seen it.
    tokens: Vec<u32>,
    /// Names of the full pages of `tokens`.
    hashes: Vec<PageHash>,
    tenant: PageHash,
    fork_of: Option<u32>,
    stage: Stage,
    /// Tokens of the prompt.
    prompt: u32,
    /// Of those, found computed when it was first admitted.
    found: Option<u32>,
    /// Most tokens to generate.
    most: u32,
    /// Tokens generated, or to come from a step in flight unless the sequence pauses before.
    launched: u32,
    /// Of those generated, the thinking ones that the host has seen.
    thought: u32,
    next_draw: Draw,
}

/// What the draw after the last token that the host has seen waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Draw {
    Free,
    AwaitsMask,
    /// The mask is here, and so far nowhere else.
    Masked(Vec<u32>),
    /// The device has it.
    Ready,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// So many of its tokens are in the cache, or in a step in flight; pages are there for all of them.
    Prefill(u32),
    Decode,
    /// No pages. Also before admission.
    Out,
}

impl Sequence {
    /// Tokens generated that the host has seen.
    fn received(&self) -> u32 {
        self.tokens.len() as u32 - self.prompt
    }

    fn wants_decode(&self) -> bool {
        let may_draw = match self.next_draw {
            Draw::Free => true,
            Draw::AwaitsMask => false,
            Draw::Masked(_) | Draw::Ready => self.launched == self.received(),
        };
        self.stage == Stage::Decode && may_draw && self.launched < self.most
    }

    /// How many may follow the steps that it has been given.
    fn more_steps(&self) -> u32 {
        if self.next_draw == Draw::Free { self.most - self.launched } else { 0 }
    }

    /// Tokens that are in the cache before a decode step can follow. A draw with a mask is always that of a decode step, so
    /// that it does not matter when the mask comes.
    fn prefilled(&self) -> u32 {
        self.tokens.len() as u32 - u32::from(self.next_draw != Draw::Free)
    }

    /// Tokens whose K and V are, or will be, in the cache after the steps launched. Those of the last token never are.
    fn cached(&self) -> u32 {
        self.prompt + self.launched.max(1) - 1
    }

    /// Tokens in the cache when it is at its longest.
    fn longest(&self) -> u32 {
        self.prompt + self.most - 1
    }

    /// Names of the pages that it may find computed: the last token is computed in any case, because its logits are needed; all
    /// are where those of all are asked for.
    fn findable(&self, page_tokens: u32) -> &[PageHash] {
        if self.setup.sampling.prompt_logprobs.is_some() {
            return &[];
        }
        &self.hashes[..(self.tokens.len() - 1) / page_tokens as usize]
    }

    /// Others may take page `index`, which has been computed. What is in it is told to nobody if tenants keep it to themselves.
    fn publish(&self, blocks: &mut Blocks, slot: u32, index: u32, page_tokens: u32) {
        let at = index as usize;
        let contents = || {
            let (begin, end) = (index * page_tokens, (index + 1) * page_tokens);
            let parent = at.checked_sub(1).map(|before| self.hashes[before]);
            let is_public = self.tenant == PageHash::root("");
            is_public.then(|| (parent, self.tokens[begin as usize..end as usize].to_vec()))
        };
        blocks.publish(slot, index, self.hashes[at], contents);
    }

    /// Names the pages that have become full.
    fn name_pages(&mut self, page_tokens: u32) {
        let full = self.tokens.chunks_exact(page_tokens as usize);
        for page in full.skip(self.hashes.len()) {
            let before = self.hashes.last().unwrap_or(&self.tenant);
            self.hashes.push(before.then(page));
        }
    }
}

pub struct Scheduler {
    limits: Limits,
    blocks: Blocks,
    waiting: BTreeMap<Rank, Sequence>,
    /// By slot.
    seats: Vec<Option<Sequence>>,
    /// Who is seated, by rank; the first `holders` hold pages, the others are preempted.
    order: Vec<(Rank, u32)>,
    holders: usize,
    places: HashMap<u32, Place>,
    free_slots: Vec<u32>,
    /// Slots that the device must be told about: their sequences did not end by themselves.
    releases: Vec<u32>,
    /// Slots that a batch has yet to tell so.
    thinking_ends: Vec<ThinkingEnd>,
    prefilled_last: bool,
    /// The last of the last decode step: where there are more sequences than rows, those after it are next.
    decoded_last: Option<Rank>,
    counters: Counters,
}

impl Scheduler {
    pub fn new(limits: Limits) -> Scheduler {
        assert!(
            limits.rows > 0 && limits.prefill_tokens > 0 && limits.prefill_beside_decode > 0,
            "a step has room for nothing"
        );
        Scheduler {
            limits,
            blocks: Blocks::new(limits.pages, limits.slots, limits.page_tokens),
            waiting: BTreeMap::new(),
            seats: (0..limits.slots).map(|_| None).collect(),
            order: Vec::new(),
            holders: 0,
            places: HashMap::new(),
            free_slots: (1..limits.slots).rev().collect(),
            releases: Vec::new(),
            thinking_ends: Vec::new(),
            prefilled_last: false,
            decoded_last: None,
            counters: Counters::default(),
        }
    }

    /// From now on `watcher` is told what a later prompt would find computed.
    pub fn watch_cache(&mut self, watcher: CacheWatcher) {
        self.blocks.watch(watcher);
    }

    pub fn submit(&mut self, submission: Submission) {
        let Submission { mut setup, priority, tenant, fork_of } = submission;
        let prompt = setup.tokens.len() as u32;
        assert!(0 < prompt && prompt < setup.max_length, "the engine refuses prompts without room");
        assert!(setup.max_length <= self.limits.context(), "the engine knows how long a sequence can be");
        assert!(setup.max_generated > 0, "nothing to generate");
        let rank = Rank { place: i64::from(setup.serial) - i64::from(priority), serial: setup.serial };
        let most = setup.max_generated.min(setup.max_length - prompt);
        let next_draw = if setup.begins_guided() { Draw::AwaitsMask } else { Draw::Free };
        let tokens = std::mem::take(&mut setup.tokens);
        let mut sequence = Sequence {
            rank,
            setup,
            tokens,
            hashes: Vec::new(),
            tenant,
            fork_of,
            stage: Stage::Out,
            prompt,
            found: None,
            most,
            launched: 0,
            thought: 0,
            next_draw,
        };
        sequence.name_pages(self.limits.page_tokens);
        let before = self.places.insert(rank.serial, Place::Waiting(rank));
        assert!(before.is_none(), "serial {} is taken", rank.serial);
        self.waiting.insert(rank, sequence);
    }

    /// Ends a sequence before its time. False when it is unknown or has ended.
    pub fn cancel(&mut self, serial: u32) -> bool {
        match self.places.get(&serial) {
            None => return false,
            Some(Place::Waiting(rank)) => {
                self.waiting.remove(rank).expect("it waits");
                self.places.remove(&serial);
            }
            Some(&Place::Seated(slot)) => {
                self.end(slot);
                self.releases.push(slot);
            }
        }
        true
    }

    /// Makes a sequence end its thinking as if it had reached its maximum; nothing happens where no budget is kept.
    pub fn end_thinking(&mut self, serial: u32) {
        match self.places.get(&serial) {
            None => {}
            Some(Place::Waiting(rank)) => {
                let sequence = self.waiting.get_mut(rank).expect("it waits");
                if let Some(budget) = &mut sequence.setup.budget {
                    budget.max_thinking_tokens = Some(0);
                }
            }
            Some(&Place::Seated(slot)) => {
                let sequence = self.seated(slot);
                if let Some(budget) = &sequence.setup.budget {
                    // Other accountings count less than what is reported, which only serves to end with a whole character.
                    let at = if budget.accounting == Accounting::Strict { sequence.thought } else { 0 };
                    self.thinking_ends.push(ThinkingEnd { slot, at });
                }
            }
        }
    }

    /// The mask for the next draw of a sequence that awaits one; of no use to one that has been cancelled.
    pub fn set_mask(&mut self, serial: u32, allowed: Vec<u32>) {
        let sequence = match self.places.get(&serial) {
            None => return,
            Some(Place::Waiting(rank)) => self.waiting.get_mut(rank),
            Some(&Place::Seated(slot)) => self.seats[slot as usize].as_mut(),
        };
        let sequence = sequence.expect("it is where its place is");
        assert_eq!(sequence.next_draw, Draw::AwaitsMask, "a mask that nobody waits for");
        sequence.next_draw = Draw::Masked(allowed);
    }

    /// Takes note of a token, and tells it what only the scheduler knows. False when it ran past the end: its sequence has ended
    /// already.
    pub fn received(&mut self, event: &mut TokenEvent) -> bool {
        let seat = self.seats[event.slot as usize].as_mut();
        let Some(sequence) = seat.filter(|s| s.rank.serial == event.serial) else {
            return false;
        };
        if event.finish == Some(Finish::Error) {
            // Its keys and values may be what is wrong.
            self.blocks.forget(event.slot);
            self.end(event.slot);
            return true;
        }
        event.found_tokens = sequence.found.unwrap_or(0);
        // The step that made this token has put those before it into the cache.
        let cached = sequence.tokens.len() as u32;
        sequence.tokens.push(event.token);
        sequence.thought = event.reasoning_tokens;
        assert_eq!(sequence.received(), event.generated, "a token was lost or repeated");
        assert!(event.generated <= sequence.launched, "a token without a step");
        sequence.next_draw = Draw::Free;
        if event.awaits_mask {
            sequence.next_draw = Draw::AwaitsMask;
            sequence.launched = event.generated;
        }
        let page_tokens = self.limits.page_tokens;
        if (cached + 1).is_multiple_of(page_tokens) {
            sequence.name_pages(page_tokens);
        }
        if cached.is_multiple_of(page_tokens) && sequence.stage == Stage::Decode && !self.limits.deterministic {
            let index = cached / page_tokens - 1;
            sequence.publish(&mut self.blocks, event.slot, index, page_tokens);
        }
        if event.finish.is_some() {
            self.end(event.slot);
        }
        true
    }

    fn end(&mut self, slot: u32) {
        let sequence = self.seats[slot as usize].take().expect("the slot is in use");
        let at = self.order.binary_search(&(sequence.rank, slot)).expect("who is seated is in order");
        self.order.remove(at);
        self.holders -= usize::from(at < self.holders);
        self.places.remove(&sequence.rank.serial);
        self.blocks.release(slot);
        self.free_slots.push(slot);
    }

    fn seated(&self, slot: u32) -> &Sequence {
        self.seats[slot as usize].as_ref().expect("who is in order is seated")
    }

    /// The next step, or none when every sequence waits for tokens in flight or for room.
    pub fn plan(&mut self) -> Option<Batch> {
        let mut batch = Batch::default();
        let decoding = self.order[..self.holders].iter().any(|&(_, slot)| self.seated(slot).wants_decode());
        // In turns, so that neither a long prompt nor a flood of short ones keeps the others waiting.
        let prefill_first = !(decoding && self.prefilled_last);
        if prefill_first {
            self.prefill(&mut batch, decoding);
        }
        if decoding && matches!(batch.work, Work::Nothing) {
            self.decode(&mut batch);
        }
        // Where all that decode wait for pages, whose room they wait for may still be at its prompt.
        if !prefill_first && matches!(batch.work, Work::Nothing) {
            self.prefill(&mut batch, decoding);
        }
        self.prefilled_last = matches!(batch.work, Work::Prefill(_));
        // A slot that has a new sequence is no longer the old one's to release.
        batch.releases = std::mem::take(&mut self.releases);
        batch.releases.retain(|slot| !batch.admissions.iter().any(|a| a.slot == *slot));
        // One that has ended meanwhile has its slot no longer.
        batch.thinking_ends = std::mem::take(&mut self.thinking_ends);
        batch.thinking_ends.retain(|end| {
            self.seats[end.slot as usize].is_some() && !batch.admissions.iter().any(|a| a.slot == end.slot)
        });
        let changes = !batch.releases.is_empty() || !batch.thinking_ends.is_empty() || !batch.pages.is_empty();
        let idle = matches!(batch.work, Work::Nothing) && !changes;
        (!idle).then_some(batch)
    }

    /// Prompts that have begun go on; while the step has room for more, the next begin.
    fn prefill(&mut self, batch: &mut Batch, decoding: bool) {
        let beside = self.limits.prefill_beside_decode;
        let mut room = if decoding { beside } else { self.limits.prefill_tokens };
        let rows = self.limits.rows as usize;
        let mut chunks = Vec::new();
        for i in 0..self.holders {
            let slot = self.order[i].1;
            if room > 0 && chunks.len() < rows && matches!(self.seated(slot).stage, Stage::Prefill(_)) {
                chunks.push(self.chunk(slot, &mut room));
            }
        }
        while room > 0 && chunks.len() < rows {
            let Some(slot) = self.admit(batch, &chunks) else { break };
            if matches!(self.seated(slot).stage, Stage::Prefill(_)) {
                chunks.push(self.chunk(slot, &mut room));
            }
        }
        if !chunks.is_empty() {
            batch.work = Work::Prefill(chunks);
        }
    }

    /// The next tokens of a prompt, as many as there is room for.
    fn chunk(&mut self, slot: u32, room: &mut u32) -> PrefillChunk {
        let page_tokens = self.limits.page_tokens;
        let sequence = self.seats[slot as usize].as_mut().expect("who is in order is seated");
        let Stage::Prefill(position) = sequence.stage else { panic!("slot {slot} has no prompt to go on with") };
        let end = sequence.prefilled().min(position + *room);
        sequence.stage = if end == sequence.prefilled() { Stage::Decode } else { Stage::Prefill(end) };
        let all = sequence.tokens.len() as u32;
        let last = end == all;
        sequence.launched += u32::from(last);
        for index in position / page_tokens..end / page_tokens {
            sequence.publish(&mut self.blocks, slot, index, page_tokens);
        }
        *room -= end - position;
        self.counters.prefilled_tokens += u64::from(end - position);
        let tokens = sequence.tokens[position as usize..end as usize].to_vec();
        // What has been reported is not reported again after a preemption.
        let asked = sequence.setup.sampling.prompt_logprobs.filter(|_| sequence.received() == 0);
        let after = &sequence.tokens[position as usize + 1..all.min(end + 1) as usize];
        let scoring = asked.map(|top| Scoring { next: after.to_vec(), top });
        PrefillChunk { slot, tokens, position, last, scoring }
    }

    /// Gives the next sequence in order pages for all its tokens, and a seat if it has none. Who does not fit yet holds up
    /// those behind.
    fn admit(&mut self, batch: &mut Batch, chunks: &[PrefillChunk]) -> Option<u32> {
        let preempted = self.order.get(self.holders).copied();
        let waiting = self.waiting.first_key_value().map(|(&rank, _)| rank);
        let resumed = preempted.filter(|&(rank, _)| waiting.is_none_or(|w| rank < w));
        let (slot, parent) = match (resumed, waiting) {
            (Some((_, slot)), _) => {
                let sequence = self.seated(slot);
                // Tokens in flight belong to what must be computed anew.
                if sequence.received() < sequence.launched || !self.fits(sequence, None) {
                    return None;
                }
                (slot, None)
            }
            (None, Some(rank)) => {
                let sequence = &self.waiting[&rank];
                let parent = self.parent(sequence);
                // What it is to take over must have been computed by a step before this one.
                let early = |slot| self.seated(slot).stage != Stage::Decode || chunks.iter().any(|c| c.slot == slot);
                if parent.is_some_and(early) || !self.fits(sequence, parent) {
                    return None;
                }
                (self.seat(rank, batch)?, parent)
            }
            (None, None) => return None,
        };
        let sequence = self.seats[slot as usize].as_mut().expect("it has a seat now");
        let all = sequence.tokens.len() as u32;
        let done = match parent {
            Some(parent) => {
                self.blocks.fork(parent, slot, all, &mut batch.pages, &mut batch.copies);
                all - 1
            }
            None => {
                let findable = sequence.findable(self.limits.page_tokens);
                let found = self.blocks.attach(slot, findable, &mut batch.pages);
                self.blocks.grow(slot, all, &mut batch.pages);
                found * self.limits.page_tokens
            }
        };
        sequence.stage = if done == sequence.prefilled() { Stage::Decode } else { Stage::Prefill(done) };
        self.holders += 1;
        sequence.found.get_or_insert(done);
        self.counters.found_tokens += u64::from(done);
        Some(slot)
    }

    /// The slot of the sequence that this one is a fork of, if its prompt is, or is about to be, in the cache.
    fn parent(&self, sequence: &Sequence) -> Option<u32> {
        let Some(Place::Seated(slot)) = self.places.get(&sequence.fork_of?) else { return None };
        let parent = self.seated(*slot);
        let same = parent.tokens[..parent.prompt as usize] == sequence.tokens && parent.tenant == sequence.tenant;
        (parent.stage != Stage::Out && same).then_some(*slot)
    }

    fn fits(&self, sequence: &Sequence, parent: Option<u32>) -> bool {
        let deterministic = self.limits.deterministic;
        let tokens = if deterministic { sequence.longest() } else { sequence.tokens.len() as u32 };
        let demand = match parent {
            Some(_) => self.blocks.pages_for(tokens) + 1 - self.blocks.pages_for(sequence.prompt),
            None => self.blocks.demand(sequence.findable(self.limits.page_tokens), tokens),
        };
        // A page for everybody who runs and may need one, so that the next steps need not take back at once what is given now.
        let grows =
            |&&(_, slot): &&(Rank, u32)| self.blocks.pages_for(self.seated(slot).longest()) > self.blocks.held(slot);
        let growing = || self.order[..self.holders].iter().filter(grows).count() as u32;
        let reserved = if deterministic { self.promised() } else { growing() };
        demand + reserved <= self.blocks.available()
    }

    /// Pages that those who hold some may still ask for.
    fn promised(&self) -> u32 {
        let promised =
            |&(_, slot): &(Rank, u32)| self.blocks.pages_for(self.seated(slot).longest()) - self.blocks.held(slot);
        self.order[..self.holders].iter().map(promised).sum()
    }

    /// Seats the first that waits, if a slot is free.
    fn seat(&mut self, rank: Rank, batch: &mut Batch) -> Option<u32> {
        let slot = self.free_slots.pop()?;
        let sequence = self.waiting.remove(&rank).expect("it is the first");
        batch.admissions.push(SlotSetup { slot, tokens: sequence.tokens.clone(), ..sequence.setup.clone() });
        let at = self.order.binary_search(&(rank, slot)).expect_err("it has not been seated yet");
        self.order.insert(at, (rank, slot));
        self.places.insert(rank.serial, Place::Seated(slot));
        self.seats[slot as usize] = Some(sequence);
        Some(slot)
    }

    /// One token for each that wants one, as far as there are rows and pages; more where nothing can change in between.
    fn decode(&mut self, batch: &mut Batch) {
        let wants = |&&(_, slot): &&(Rank, u32)| self.seated(slot).wants_decode();
        let mut ready: Vec<(Rank, u32)> = self.order[..self.holders].iter().filter(wants).copied().collect();
        let (rows, wanting) = (self.limits.rows as usize, ready.len());
        if wanting > rows {
            let served = ready.partition_point(|&(rank, _)| Some(rank) <= self.decoded_last);
            ready.rotate_left(served);
            ready.truncate(rows);
            self.decoded_last = ready.last().map(|&(rank, _)| rank);
            ready.sort_unstable();
        }
        let mut slots = Vec::with_capacity(ready.len());
        for (_, slot) in ready {
            if self.find_page(slot) {
                let sequence = self.seats[slot as usize].as_mut().expect("it is ready");
                if let Draw::Masked(allowed) = &mut sequence.next_draw {
                    let allowed = std::mem::take(allowed);
                    batch.masks.push(Mask { slot, generated: sequence.launched, allowed });
                    sequence.next_draw = Draw::Ready;
                }
                sequence.launched += 1;
                self.blocks.grow(slot, sequence.cached(), &mut batch.pages);
                slots.push(slot);
            }
        }
        if !slots.is_empty() {
            let steps = if slots.len() == wanting { self.prolong(&slots, batch) } else { 1 };
            batch.work = Work::Decode { slots, steps };
        }
    }

    /// Adds steps to a decode step, if nobody waits for anything and there are pages for all of them; tells how many it makes.
    fn prolong(&mut self, slots: &[u32], batch: &mut Batch) -> u32 {
        let busy = |&(_, slot): &(Rank, u32)| self.seated(slot).stage == Stage::Decode;
        if self.limits.decode_steps == 1 || !self.waiting.is_empty() || !self.order.iter().all(busy) {
            return 1;
        }
        let left = |&slot: &u32| self.seated(slot).more_steps();
        let more = slots.iter().map(left).max().unwrap_or(0).min(self.limits.decode_steps - 1);
        let tokens = |slot| self.seated(slot).cached() + more.min(left(&slot));
        let demand: u32 =
            slots.iter().map(|&s| self.blocks.pages_for(tokens(s)).saturating_sub(self.blocks.held(s))).sum();
        if demand > self.blocks.available() {
            return 1;
        }
        for &slot in slots {
            let sequence = self.seats[slot as usize].as_mut().expect("it is in this step");
            sequence.launched += more.min(sequence.more_steps());
            self.blocks.grow(slot, sequence.cached(), &mut batch.pages);
        }
        1 + more
    }

    /// Whether steps in flight keep something waiting that could go on without them.
    pub fn has_news(&self) -> bool {
        let masked = |&(_, slot): &(Rank, u32)| matches!(self.seated(slot).next_draw, Draw::Masked(_));
        let changes = !self.releases.is_empty() || !self.thinking_ends.is_empty();
        changes || !self.waiting.is_empty() || self.order.iter().any(masked)
    }

    /// Takes note that no step is in flight: those whose tokens have not come were left out.
    pub fn settle(&mut self) {
        for &(_, slot) in &self.order {
            let sequence = self.seats[slot as usize].as_mut().expect("who is in order is seated");
            sequence.launched = sequence.received();
        }
    }

    /// Whether there is a page for the next token; preempts those behind until there is. The last of all waits for one.
    fn find_page(&mut self, slot: u32) -> bool {
        let sequence = self.seated(slot);
        if sequence.stage != Stage::Decode {
            // Preempted by somebody in this very step.
            return false;
        }
        if self.blocks.pages_for(sequence.prompt + sequence.launched) <= self.blocks.held(slot) {
            return true;
        }
        while self.blocks.available() == 0 {
            let (_, last) = self.order[self.holders - 1];
            if last == slot {
                return false;
            }
            assert!(!self.limits.deterministic, "more was promised than there is");
            self.blocks.release(last);
            self.seats[last as usize].as_mut().expect("who is in order is seated").stage = Stage::Out;
            self.holders -= 1;
            self.counters.preemptions += 1;
        }
        true
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences with a seat, and how many of them are preempted.
    pub fn running(&self) -> usize {
        self.order.len()
    }

    pub fn preempted(&self) -> usize {
        self.order.len() - self.holders
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Pages that sequences hold, and pages that they could.
    pub fn pages(&self) -> (u32, u32) {
        let usable = self.limits.pages - 1;
        (usable - self.blocks.available(), usable)
    }

    /// Panics unless the books balance.
    pub fn check(&self) {
        self.blocks.check();
        assert!(self.order.is_sorted(), "out of order");
        assert_eq!(self.order.len() + self.free_slots.len(), self.limits.slots as usize - 1, "a slot is lost");
        assert_eq!(self.seats.iter().flatten().count(), self.order.len(), "a seat out of order");
        assert_eq!(self.places.len(), self.order.len() + self.waiting.len(), "a place without a sequence");
        for &slot in &self.free_slots {
            assert!(self.seats[slot as usize].is_none(), "slot {slot} is free and in use");
            assert_eq!(self.blocks.held(slot), 0, "free slot {slot} holds pages");
        }
        for (&rank, s) in &self.waiting {
            assert_eq!((s.rank, s.stage, s.launched), (rank, Stage::Out, 0), "it has not begun");
            assert_eq!(self.places.get(&rank.serial), Some(&Place::Waiting(rank)));
        }
        for (i, &(rank, slot)) in self.order.iter().enumerate() {
            let s = self.seated(slot);
            assert_eq!(self.places.get(&rank.serial), Some(&Place::Seated(slot)));
            assert_eq!(s.rank, rank);
            assert!(s.received() <= s.launched, "a token before its step");
            assert!(s.launched <= s.most, "more steps than tokens wanted");
            let paused = matches!(s.next_draw, Draw::AwaitsMask | Draw::Masked(_));
            assert!(!paused || s.launched == s.received(), "a step without a mask");
            assert!(s.next_draw != Draw::Ready || s.launched <= s.received() + 1, "steps beyond the mask");
            assert_eq!(s.hashes.len(), s.tokens.len() / self.limits.page_tokens as usize, "names of pages");
            assert_eq!(i < self.holders, s.stage != Stage::Out, "slot {slot} is preempted before another");
            let held = self.blocks.held(slot);
            let tokens = match s.stage {
                Stage::Prefill(done) => {
                    assert!((done as usize) < s.tokens.len(), "more prompt than there is");
                    assert_eq!(s.received(), s.launched, "tokens in flight would be missing");
                    s.tokens.len() as u32
                }
                Stage::Decode => s.cached(),
                Stage::Out => 0,
            };
            // More where steps that were left out would have needed them.
            let left_out = s.stage == Stage::Decode && held <= self.blocks.pages_for(s.longest());
            let needed = self.blocks.pages_for(tokens);
            assert!(held == needed || held > needed && left_out, "pages of slot {slot}");
        }
        if self.limits.deterministic {
            assert!(self.promised() <= self.blocks.available(), "more is promised than there is");
            assert_eq!(self.preempted(), 0, "preempted");
        }
    }
}
