//! Pages of the KV cache under random operations, against a model that keeps who holds what in plain sets.

use crate::random::Random;
use ponder::batch::{PageCopy, PageEntry};
use ponder::blocks::{Blocks, CacheChange, PageHash};
use std::collections::BTreeSet;

const PAGES: u32 = 24;
const SLOTS: u32 = 7;
const TOKENS: u32 = 4;

/// The first full pages of a family of sequences.
fn names(family: u32) -> Vec<PageHash> {
    let mut last = PageHash::root("");
    let page = |i| {
        last = last.then(&[family, i, 0, 0]);
        last
    };
    (0..8).map(page).collect()
}

#[test]
fn random_operations() {
    let mut blocks = Blocks::new(PAGES, SLOTS, TOKENS);
    let mut random = Random(1);
    let families: Vec<Vec<PageHash>> = (0..4).map(names).collect();
    // Of each slot: its family, and its block table.
    let mut slots: Vec<(usize, Vec<u32>)> = vec![(0, vec![]); SLOTS as usize];
    let (mut found, mut forked, mut evicted) = (0, 0, 0);
    for _ in 0..1_000_000 {
        let slot = 1 + random.below(SLOTS - 1);
        let (mut entries, mut copies) = (Vec::new(), Vec::new());
        let (family, table) = &mut slots[slot as usize];
        let mut taken = 0;
        match random.below(8) {
            0 | 1 => {
                blocks.release(slot);
                table.clear();
            }
            2 if table.is_empty() => {
                *family = random.below(4) as usize;
                let wanted = &families[*family][..random.below(9) as usize];
                let demand = blocks.demand(wanted, wanted.len() as u32 * TOKENS);
                let before = blocks.available();
                let attached = blocks.attach(slot, wanted, &mut entries);
                taken = demand - (wanted.len() as u32 - attached);
                assert_eq!(before - blocks.available(), taken, "what was found and had no holder");
                found += attached;
            }
            3 if table.is_empty() => {
                let parent = 1 + random.below(SLOTS - 1);
                let (family, tokens) = (slots[parent as usize].0, slots[parent as usize].1.len() as u32 * TOKENS);
                if tokens > 0 && blocks.available() > 0 {
                    blocks.fork(parent, slot, tokens - random.below(TOKENS), &mut entries, &mut copies);
                    slots[slot as usize].0 = family;
                    forked += 1;
                    taken = 1;
                }
            }
            4..6 => {
                let tokens = table.len() as u32 * TOKENS + random.below(3 * TOKENS);
                if blocks.pages_for(tokens) - blocks.held(slot) <= blocks.available() {
                    taken = blocks.pages_for(tokens) - blocks.held(slot);
                    blocks.grow(slot, tokens, &mut entries);
                }
            }
            6 if !table.is_empty() => {
                let index = random.below(table.len().min(8) as u32);
                blocks.publish(slot, index, families[*family][index as usize], || None);
            }
            7 if random.below(20) == 0 => blocks.forget(slot),
            _ => {}
        }
        for entry in &entries {
            let PageEntry { slot: of, index, page } = *entry;
            assert_eq!((of, index as usize), (slot, slots[slot as usize].1.len()), "tables grow in order");
            slots[slot as usize].1.push(page);
        }
        for PageCopy { from, to } in copies {
            assert_eq!(slots.iter().filter(|(_, table)| table.contains(&to)).count(), 1, "a copy is for one");
            assert!(from != to && slots.iter().any(|(_, table)| table.contains(&from)));
        }
        blocks.check();
        let held: BTreeSet<u32> = slots.iter().flat_map(|(_, table)| table).copied().collect();
        assert_eq!(blocks.available() as usize, PAGES as usize - 1 - held.len());
        assert_eq!(blocks.held(slot) as usize, slots[slot as usize].1.len());
        evicted += u32::from(taken > 0 && blocks.available() == 0);
    }
    assert!(found > 10_000 && forked > 1000 && evicted > 1000, "{found} found, {forked} forked, {evicted} times full");
}

/// Known pages that nobody holds go in the order in which they were last held, the end of a sequence before its beginning.
#[test]
fn the_longest_unused_goes_first() {
    let mut blocks = Blocks::new(7, 3, TOKENS);
    let (a, b) = (names(0), names(1));
    let mut entries = Vec::new();
    for (names, pages) in [(&a, 3), (&b, 2)] {
        blocks.grow(1, pages * TOKENS, &mut entries);
        (0..pages).for_each(|i| blocks.publish(1, i, names[i as usize], || None));
        blocks.release(1);
        blocks.check();
    }
    assert_eq!(blocks.available(), 6);
    // One was never known, then the end of a.
    blocks.grow(1, 2 * TOKENS, &mut entries);
    blocks.check();
    entries.clear();
    assert_eq!(blocks.attach(2, &a[..3], &mut entries), 2);
    blocks.release(2);
    // Now a has been held last.
    blocks.grow(1, 4 * TOKENS, &mut entries);
    assert_eq!(blocks.attach(2, &b[..2], &mut entries), 0);
    assert_eq!(blocks.attach(2, &a[..2], &mut entries), 2);
    blocks.check();
}

/// Two may compute the same page at the same time: one of them is found later, both are sound.
#[test]
fn a_name_has_one_page() {
    let mut blocks = Blocks::new(7, 4, TOKENS);
    let a = names(0);
    let mut entries = Vec::new();
    for slot in [1, 2] {
        blocks.grow(slot, TOKENS, &mut entries);
        blocks.publish(slot, 0, a[0], || None);
        blocks.check();
    }
    entries.clear();
    assert_eq!(blocks.attach(3, &a[..1], &mut entries), 1);
    assert_eq!(entries, [PageEntry { slot: 3, index: 0, page: 1 }]);
    blocks.release(2);
    blocks.check();
    assert_eq!(blocks.available(), 5);
}

#[test]
fn tenants_share_nothing() {
    let tokens = [1, 2, 3, 4];
    assert_ne!(PageHash::root("a").then(&tokens), PageHash::root("b").then(&tokens));
    assert_ne!(PageHash::root("a").then(&tokens), PageHash::root("a").then(&tokens).then(&tokens));
    assert_eq!(PageHash::root("a").then(&tokens), PageHash::root("a").then(&tokens));
}

#[test]
fn who_watches_hears_what_may_be_found() {
    let mut blocks = Blocks::new(4, 3, TOKENS);
    let (sender, heard) = std::sync::mpsc::channel();
    blocks.watch(Box::new(move |change| sender.send(change).unwrap()));
    let (names, mut entries) = (names(0), Vec::new());
    blocks.grow(1, 3 * TOKENS, &mut entries);
    blocks.publish(1, 0, names[0], || Some((None, vec![1; 4])));
    blocks.publish(1, 1, names[1], || Some((Some(names[0]), vec![2; 4])));
    blocks.publish(1, 2, names[2], || None);
    blocks.publish(1, 0, names[0], || panic!("it is known already"));
    let stored = |i: usize| CacheChange::Stored {
        hash: names[i],
        parent: i.checked_sub(1).map(|before| names[before]),
        tokens: vec![i as u32 + 1; 4],
    };
    assert_eq!(heard.try_iter().collect::<Vec<_>>(), [stored(0), stored(1)]);
    blocks.release(1);
    assert_eq!(heard.try_iter().count(), 0, "they may still be found");
    blocks.grow(2, 2 * TOKENS, &mut entries);
    let removed = |i: usize| CacheChange::Removed { hash: names[i] };
    assert_eq!(heard.try_iter().collect::<Vec<_>>(), [removed(2), removed(1)]);
    blocks.publish(2, 0, names[3], || None);
    blocks.forget(2);
    assert_eq!(heard.try_iter().collect::<Vec<_>>(), [removed(3)]);
}
