//! Pages of the KV cache: which are free and which sequence holds which, in the order of its tokens.
//!
//! Invariant ([`Blocks::check`]): every page but page 0 is either free or in exactly one block table, once. Page 0 belongs to
//! slot 0, where padding rows point. Knows no device and no request: a page is a number.

use crate::batch::PageEntry;

pub struct Blocks {
    /// Tokens that one page holds.
    page_tokens: u32,
    /// All pages, page 0 included.
    pages: u32,
    /// The page used last is given out first.
    free: Vec<u32>,
    /// Block table of each slot: entry i holds tokens `i * page_tokens ..`.
    tables: Vec<Vec<u32>>,
}

impl Blocks {
    /// `pages` and `slots` count the reserved page 0 and slot 0.
    pub fn new(pages: u32, slots: u32, page_tokens: u32) -> Blocks {
        assert!(pages > 1 && slots > 1 && page_tokens > 0, "no page or no slot besides the reserved one");
        let free = (1..pages).rev().collect();
        Blocks { page_tokens, pages, free, tables: vec![Vec::new(); slots as usize] }
    }

    /// Pages that so many tokens need.
    pub fn pages_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.page_tokens)
    }

    pub fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Pages that `slot` holds.
    pub fn held(&self, slot: u32) -> u32 {
        self.tables[slot as usize].len() as u32
    }

    /// Gives `slot` pages until they hold `tokens`; the new entries of its block table go to `entries`. The caller has seen to
    /// it that enough are free.
    pub fn grow(&mut self, slot: u32, tokens: u32, entries: &mut Vec<PageEntry>) {
        for index in self.held(slot)..self.pages_for(tokens) {
            let page = self.free.pop().expect("admission reserves what a sequence may need");
            self.tables[slot as usize].push(page);
            entries.push(PageEntry { slot, index, page });
        }
    }

    /// Takes all pages from `slot`. Steps in flight may still write to them, but before anything that a later batch does.
    pub fn release(&mut self, slot: u32) {
        self.free.extend(self.tables[slot as usize].drain(..).rev());
    }

    /// Panics unless the invariant holds.
    pub fn check(&self) {
        let mut seen = vec![false; self.pages as usize];
        seen[0] = true;
        for &page in self.free.iter().chain(self.tables.iter().flatten()) {
            assert!(!std::mem::replace(&mut seen[page as usize], true), "page {page} is in two places");
        }
        assert!(seen.iter().all(|&s| s), "a page is lost");
        assert!(self.tables[0].is_empty(), "slot 0 holds pages");
    }
}
