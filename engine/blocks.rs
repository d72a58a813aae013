//! Pages of the KV cache: which are free, which sequences hold which, and what those that nobody holds still know.
//!
//! A page may be held by several sequences: whoever computes a full page may publish it under the hash of all tokens up to its
//! end, and a later sequence that begins with the same tokens takes it instead of computing them again. A published page
//! that loses its last holder stays known until its room is needed, the longest unused first. Nobody writes to a page that
//! others hold: it is copied first.
//!
//! Invariant ([`Blocks::check`]): every page but page 0 is in exactly one state: free, unused but known, or held by as many
//! block tables as it counts. Page 0 belongs to slot 0, where padding rows point. Knows no device and no request: a page is a
//! number.

use crate::batch::{PageCopy, PageEntry};
use std::collections::HashMap;

/// Names the tokens of a page and all before it, for one tenant. Collisions cannot be made on purpose (BLAKE3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageHash([u8; 32]);

impl PageHash {
    /// What the first page of a tenant's sequences follows. Tenants share nothing: that a prompt is answered early would tell
    /// one that another has sent it.
    pub fn root(tenant: &str) -> PageHash {
        PageHash(*blake3::hash(tenant.as_bytes()).as_bytes())
    }

    /// A short name, for others.
    pub fn short(&self) -> u64 {
        u64::from_le_bytes(*self.0.first_chunk().expect("32 bytes"))
    }

    /// The page that follows `self` and holds `tokens`.
    pub fn then(&self, tokens: &[u32]) -> PageHash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0).update(bytemuck::cast_slice(tokens));
        PageHash(*hasher.finalize().as_bytes())
    }
}

/// What others may find, or find no more. For those who send requests to where their beginning is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheChange {
    /// `parent`: the page before it, if it is not the first.
    Stored {
        hash: PageHash,
        parent: Option<PageHash>,
        tokens: Vec<u32>,
    },
    Removed {
        hash: PageHash,
    },
}

/// Hears of changes in their order. It must not wait.
pub type CacheWatcher = Box<dyn FnMut(CacheChange) + Send>;

pub struct Blocks {
    /// Tokens that one page holds.
    page_tokens: u32,
    pages: Vec<Page>,
    /// Block table of each slot: entry i holds tokens `i * page_tokens ..`.
    tables: Vec<Vec<u32>>,
    /// The page used last is given out first.
    free: Vec<u32>,
    /// Published pages.
    known: HashMap<PageHash, u32>,
    /// Of them, those that nobody holds: a ring of `Page::older` and `Page::newer` through page 0.
    unused: u32,
    watcher: Option<CacheWatcher>,
}

#[derive(Clone, Default)]
struct Page {
    /// Block tables that it is in.
    holders: u32,
    hash: Option<PageHash>,
    /// Neighbours in the ring of unused pages, while it is in it.
    older: u32,
    newer: u32,
}

impl Blocks {
    /// `pages` and `slots` count the reserved page 0 and slot 0.
    pub fn new(pages: u32, slots: u32, page_tokens: u32) -> Blocks {
        assert!(pages > 1 && slots > 1 && page_tokens > 0, "no page or no slot besides the reserved one");
        Blocks {
            page_tokens,
            pages: vec![Page::default(); pages as usize],
            tables: vec![Vec::new(); slots as usize],
            free: (1..pages).rev().collect(),
            known: HashMap::new(),
            unused: 0,
            watcher: None,
        }
    }

    /// From now on `watcher` is told of what becomes known or unknown.
    pub fn watch(&mut self, watcher: CacheWatcher) {
        self.watcher = Some(watcher);
    }

    /// Pages that so many tokens need.
    pub fn pages_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.page_tokens)
    }

    /// Pages that nobody holds.
    pub fn available(&self) -> u32 {
        self.free.len() as u32 + self.unused
    }

    /// Pages that `slot` holds, alone or with others.
    pub fn held(&self, slot: u32) -> u32 {
        self.tables[slot as usize].len() as u32
    }

    /// Of [`Blocks::available`], how many go to a sequence of `tokens` that begins with the pages `hashes`.
    pub fn demand(&self, hashes: &[PageHash], tokens: u32) -> u32 {
        let taken = self.matching(hashes).filter(|&page| self.pages[page as usize].holders > 0).count();
        self.pages_for(tokens) - taken as u32
    }

    /// The known pages at the beginning of a sequence, in order.
    fn matching(&self, hashes: &[PageHash]) -> impl Iterator<Item = u32> {
        hashes.iter().map_while(|hash| self.known.get(hash).copied())
    }

    /// Gives `slot`, which holds nothing, the known pages at the beginning of its sequence; tells how many.
    pub fn attach(&mut self, slot: u32, hashes: &[PageHash], entries: &mut Vec<PageEntry>) -> u32 {
        assert_eq!(self.held(slot), 0, "slot {slot} has begun already");
        let pages: Vec<u32> = self.matching(hashes).collect();
        self.hold(slot, &pages, entries);
        pages.len() as u32
    }

    /// Gives `slot`, which holds nothing, the first tokens of the sequence in `parent`. The last page, which it will write to,
    /// is copied. The caller has seen to it that a page is available.
    pub fn fork(
        &mut self,
        parent: u32,
        slot: u32,
        tokens: u32,
        entries: &mut Vec<PageEntry>,
        copies: &mut Vec<PageCopy>,
    ) {
        assert_eq!(self.held(slot), 0, "slot {slot} has begun already");
        let shared = self.pages_for(tokens) - 1;
        let pages = self.tables[parent as usize][..shared as usize].to_vec();
        self.hold(slot, &pages, entries);
        self.grow(slot, tokens, entries);
        copies.push(PageCopy {
            from: self.tables[parent as usize][shared as usize],
            to: self.tables[slot as usize][shared as usize],
        });
    }

    fn hold(&mut self, slot: u32, pages: &[u32], entries: &mut Vec<PageEntry>) {
        for (&page, index) in pages.iter().zip(0..) {
            if self.pages[page as usize].holders == 0 {
                self.unlink(page);
            }
            self.pages[page as usize].holders += 1;
            self.tables[slot as usize].push(page);
            entries.push(PageEntry { slot, index, page });
        }
    }

    /// Gives `slot` pages until they hold `tokens`; the new entries of its block table go to `entries`. The caller has seen to
    /// it that enough are available.
    pub fn grow(&mut self, slot: u32, tokens: u32, entries: &mut Vec<PageEntry>) {
        for index in self.held(slot)..self.pages_for(tokens) {
            let page = self.take();
            self.pages[page as usize].holders = 1;
            self.tables[slot as usize].push(page);
            entries.push(PageEntry { slot, index, page });
        }
    }

    /// A page that nobody holds, unknown from now on.
    fn take(&mut self) -> u32 {
        if let Some(page) = self.free.pop() {
            return page;
        }
        let page = self.pages[0].newer;
        assert!(page != 0, "a page was asked for where none is available");
        self.unlink(page);
        self.make_unknown(page);
        page
    }

    fn make_unknown(&mut self, page: u32) {
        let Some(hash) = self.pages[page as usize].hash.take() else { return };
        self.known.remove(&hash);
        if let Some(watcher) = &mut self.watcher {
            watcher(CacheChange::Removed { hash });
        }
    }

    /// Makes a full page of `slot` known, unless another page is by that name. Steps that come later may read it. `contents` are
    /// for the watcher: the page before it and its tokens, if they are to be told.
    pub fn publish(
        &mut self,
        slot: u32,
        index: u32,
        hash: PageHash,
        contents: impl FnOnce() -> Option<(Option<PageHash>, Vec<u32>)>,
    ) {
        let page = self.tables[slot as usize][index as usize];
        if self.pages[page as usize].hash.is_none() && !self.known.contains_key(&hash) {
            self.known.insert(hash, page);
            self.pages[page as usize].hash = Some(hash);
            if let Some(watcher) = &mut self.watcher
                && let Some((parent, tokens)) = contents()
            {
                watcher(CacheChange::Stored { hash, parent, tokens });
            }
        }
    }

    /// Nobody else is to take the pages of `slot`: what is in them is not to be trusted.
    pub fn forget(&mut self, slot: u32) {
        for index in 0..self.tables[slot as usize].len() {
            self.make_unknown(self.tables[slot as usize][index]);
        }
    }

    /// Takes all pages from `slot`. Steps in flight may still write to them, but before anything that a later batch does.
    pub fn release(&mut self, slot: u32) {
        // The end of a sequence is less likely to be met again than its beginning, and useless without it.
        while let Some(page) = self.tables[slot as usize].pop() {
            let state = &mut self.pages[page as usize];
            state.holders -= 1;
            match (state.holders, state.hash) {
                (0, Some(_)) => self.link(page),
                (0, None) => self.free.push(page),
                _ => {}
            }
        }
    }

    /// Puts a page last among the unused.
    fn link(&mut self, page: u32) {
        let newest = self.pages[0].older;
        self.pages[page as usize].older = newest;
        self.pages[page as usize].newer = 0;
        self.pages[newest as usize].newer = page;
        self.pages[0].older = page;
        self.unused += 1;
    }

    fn unlink(&mut self, page: u32) {
        let Page { older, newer, .. } = self.pages[page as usize];
        self.pages[older as usize].newer = newer;
        self.pages[newer as usize].older = older;
        self.unused -= 1;
    }

    /// Panics unless the invariant holds.
    pub fn check(&self) {
        let mut holders = vec![0; self.pages.len()];
        self.tables.iter().flatten().for_each(|&page| holders[page as usize] += 1);
        assert!(self.tables[0].is_empty(), "slot 0 holds pages");
        assert_eq!(holders[0], 0, "page 0 is given away");
        // In how many of the three states a page is.
        let mut states: Vec<u32> = holders.iter().map(|&n| u32::from(n > 0)).collect();
        for &page in &self.free {
            assert!(self.pages[page as usize].hash.is_none(), "free page {page} is known");
            states[page as usize] += 1;
        }
        let (mut page, mut unused) = (self.pages[0].newer, 0);
        while page != 0 {
            assert!(self.pages[page as usize].hash.is_some(), "unused page {page} is not known");
            states[page as usize] += 1;
            unused += 1;
            assert!(unused <= self.unused, "more unused pages than counted");
            assert_eq!(self.pages[self.pages[page as usize].newer as usize].older, page, "the ring is broken");
            page = self.pages[page as usize].newer;
        }
        assert_eq!(unused, self.unused, "fewer unused pages than counted");
        for (page, state) in self.pages.iter().enumerate().skip(1) {
            assert_eq!(states[page], 1, "states of page {page}");
            assert_eq!(state.holders, holders[page], "holders of page {page}");
            assert!(state.hash.is_none_or(|hash| self.known.get(&hash) == Some(&(page as u32))), "name of page {page}");
        }
        assert_eq!(self.known.len(), self.pages.iter().filter(|p| p.hash.is_some()).count(), "a name without a page");
    }
}
