//! RoPE with the append to the paged cache, and attention over it, against float64 truth: page edges, groups, ragged
//! batches, chunks that start anywhere, padding; prefill against decode; the same bits under every order of the threads.

use crate::devices::{devices, download, upload};
use crate::random::Random;
use half::bf16;
use ponder::device::{Buffer, Device, Launch, TensorMapSpec};
use ponder::kernels::params::{
    ATTN_DECODE_SHARED_D64, ATTN_DECODE_SHARED_D128, ATTN_PREFILL_SHARED_D64, ATTN_PREFILL_SHARED_D128,
    AttnDecodeParams, AttnPrefillParams, NO_WINDOW, PAGE_TOKENS, Prefetch, ROPE_THREADS, Rope, RopeParams, TensorMap,
};
use ponder::kernels::{
    ATTN_DECODE_D64, ATTN_DECODE_D128, ATTN_PREFILL_D64, ATTN_PREFILL_D128, ROPE_APPEND_D64, ROPE_APPEND_D128,
};
use ponder::tiles::{ChunkRows, prefill_tile_tokens, prefill_tiles};

const PAGE: usize = PAGE_TOKENS as usize;

/// Mean 0, standard deviation `scale`, roughly normal.
fn value(random: &mut Random, scale: f32) -> bf16 {
    let sum: f32 = (0..4).map(|_| (random.next() >> 40) as f32 / (1u64 << 24) as f32 - 0.5).sum();
    bf16::from_f32(sum * 3f32.sqrt() * scale)
}

fn values(random: &mut Random, count: usize, scale: f32) -> Vec<bf16> {
    (0..count).map(|_| value(random, scale)).collect()
}

#[derive(Clone, Copy, Debug)]
struct Heads {
    head_dim: usize,
    kv: usize,
    /// Query heads per KV head.
    group: usize,
}

impl Heads {
    fn q(self) -> usize {
        self.kv * self.group
    }

    fn scale(self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// A paged cache of slots 0.. with pages in random order. Slot 0 is the reserved one.
struct Cache {
    heads: Heads,
    /// How many tokens a token attends to.
    window: usize,
    /// In decode the query heads of a group read K and V together.
    packed: bool,
    max_pages: usize,
    table: Vec<i32>,
    k: Vec<bf16>,
    v: Vec<bf16>,
}

impl Cache {
    /// Slot `i + 1` holds `lengths[i]` tokens. What lies behind a sequence's end is what may lie there: NaN in K, and in V
    /// the finite values of a page's former owner.
    fn new(heads: Heads, lengths: &[usize], random: &mut Random) -> Cache {
        let max_pages = lengths.iter().map(|n| n.div_ceil(PAGE)).max().unwrap() + 1;
        let pages = 1 + lengths.iter().map(|n| n.div_ceil(PAGE)).sum::<usize>();
        let mut free: Vec<usize> = (1..pages).collect();
        let tokens = pages * heads.kv * PAGE;
        let mut cache = Cache {
            heads,
            window: NO_WINDOW as usize,
            packed: true,
            max_pages,
            table: vec![0; (1 + lengths.len()) * max_pages],
            k: vec![bf16::NAN; tokens * heads.head_dim],
            v: vec![bf16::from_f32(-1e4); tokens * heads.head_dim],
        };
        for (i, &length) in lengths.iter().enumerate() {
            for index in 0..length.div_ceil(PAGE) {
                let page = free.swap_remove(random.below(free.len() as u32) as usize);
                cache.table[(i + 1) * max_pages + index] = page as i32;
            }
            for position in 0..length {
                for head in 0..heads.kv {
                    let at = cache.at(i + 1, position, head);
                    cache.k[at..at + heads.head_dim].copy_from_slice(&values(random, heads.head_dim, 1.5));
                    cache.v[at..at + heads.head_dim].copy_from_slice(&values(random, heads.head_dim, 1.0));
                }
            }
        }
        cache
    }

    /// Index of the first element of a token's head in `k` and `v`.
    fn at(&self, slot: usize, position: usize, head: usize) -> usize {
        let page = self.table[slot * self.max_pages + position / PAGE] as usize;
        ((page * self.heads.kv + head) * PAGE + position % PAGE) * self.heads.head_dim
    }

    fn map(&self, device: &Device, pages: &Buffer) -> TensorMap {
        let (d, kv) = (self.heads.head_dim as u64, self.heads.kv as u64);
        let page = PAGE as u64;
        let spec = TensorMapSpec {
            address: pages.address(),
            dims: [d, page, kv, self.k.len() as u64 / (d * page * kv)],
            strides: [2, d * 2, page * d * 2, kv * page * d * 2],
            r#box: [64, PAGE as u32, 1, 1],
            swizzle: true,
        };
        device.tensor_map(&spec).unwrap()
    }

    /// The same with a sliding window, and what lies before the windows of all of these rows spoilt.
    fn with_window(mut self, window: usize, rows: &[(usize, i32)]) -> Cache {
        self.window = window;
        let slots = self.table.len() / self.max_pages;
        for slot in 1..slots {
            let positions = rows.iter().filter(|r| r.0 == slot && r.1 >= 0).map(|r| r.1 as usize);
            let first = positions.min().map_or(0, |oldest| (oldest + 1).saturating_sub(window));
            for (position, head) in (0..first).flat_map(|p| (0..self.heads.kv).map(move |h| (p, h))) {
                let at = self.at(slot, position, head);
                self.k[at..at + self.heads.head_dim].fill(bf16::NAN);
                self.v[at..at + self.heads.head_dim].fill(bf16::from_f32(-1e4));
            }
        }
        self
    }

    /// Attention of one query head over the window that ends at `position`: output, and the same sum over |v|, which bounds what
    /// rounding may do.
    fn truth(&self, q: &[bf16], slot: usize, position: usize, kv_head: usize) -> (Vec<f64>, Vec<f64>) {
        let d = self.heads.head_dim;
        let row = |pool: &[bf16], p| -> Vec<f64> {
            let at = self.at(slot, p, kv_head);
            pool[at..at + d].iter().map(|x| x.to_f64()).collect()
        };
        let q: Vec<f64> = q.iter().map(|x| x.to_f64()).collect();
        let first = (position + 1).saturating_sub(self.window);
        let scores: Vec<f64> = (first..=position)
            .map(|p| row(&self.k, p).iter().zip(&q).map(|(k, q)| k * q).sum::<f64>() / (d as f64).sqrt())
            .collect();
        let max = scores.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let (mut out, mut bound) = (vec![0.0; d], vec![0.0; d]);
        for (p, s) in (first..).zip(&scores) {
            let weight = (s - max).exp() / sum;
            for (i, v) in row(&self.v, p).iter().enumerate() {
                out[i] += weight * v;
                bound[i] += weight * v.abs();
            }
        }
        (out, bound)
    }

    /// Rows of (slot, position) and their output. Probabilities and the result are rounded to bf16, each by 2^-8 of itself at
    /// most; the rest is fp32.
    fn check(&self, q: &[bf16], rows: &[(usize, i32)], out: &[bf16], what: &str) {
        let (d, heads) = (self.heads.head_dim, self.heads.q());
        for (row, &(slot, position)) in rows.iter().enumerate() {
            for head in 0..heads {
                let at = (row * heads + head) * d;
                let got = &out[at..at + d];
                if position < 0 {
                    assert!(got.iter().all(|x| x.to_bits() == 0), "{what}: padding row {row} is not zero");
                    continue;
                }
                let (want, bound) = self.truth(&q[at..at + d], slot, position as usize, head / self.heads.group);
                for i in 0..d {
                    let error = (got[i].to_f64() - want[i]).abs();
                    let tolerance = (bound[i] + want[i].abs()) / 256.0 + 1e-5;
                    assert!(
                        error <= tolerance,
                        "{what}: row {row} (slot {slot}, position {position}), head {head}, column {i}: {} but {} is right",
                        got[i],
                        want[i]
                    );
                }
            }
        }
    }

    /// One decode step of these (slot, position) rows on a grid of so many blocks.
    /// `split_pages`: 0 for even shares.
    fn decode(&self, device: &Device, q: &[bf16], rows: &[(usize, i32)], grid: u32, split_pages: usize) -> Vec<bf16> {
        let heads = self.heads;
        let (kernel, shared) = match heads.head_dim {
            64 => (&ATTN_DECODE_D64, ATTN_DECODE_SHARED_D64),
            _ => (&ATTN_DECODE_D128, ATTN_DECODE_SHARED_D128),
        };
        let (k, v) = (upload(device, &self.k), upload(device, &self.v));
        let q = upload(device, q);
        let table = upload(device, &self.table);
        let position = upload(device, &rows.iter().map(|r| r.1).collect::<Vec<_>>());
        let slot = upload(device, &rows.iter().map(|r| r.0 as i32).collect::<Vec<_>>());
        let groups = if self.packed { heads.kv } else { heads.q() };
        let ticket = upload(device, &vec![0u32; rows.len() * groups]);
        let pieces = rows.len() * groups * self.max_pages.div_ceil(split_pages.max(1));
        let parts = if split_pages > 0 { pieces } else { grid as usize * 2 };
        let partial = device.alloc(parts * (heads.q() / groups) * (heads.head_dim + 2) * 4).unwrap();
        let count = rows.len() * heads.q() * heads.head_dim;
        let out = device.alloc(count * 2).unwrap();
        let weights = upload(device, &[0u8; 16_000]);
        let params = AttnDecodeParams {
            k_map: self.map(device, &k),
            v_map: self.map(device, &v),
            q: q.pointer(),
            row_position: position.pointer(),
            row_slot: slot.pointer(),
            block_table: table.pointer(),
            partial: partial.pointer(),
            ticket: ticket.pointer(),
            out: out.pointer(),
            prefetch: Prefetch {
                weights: weights.pointer(),
                bytes: weights.bytes() as u64,
                share: (weights.bytes() as u64 / grid as u64).next_multiple_of(128),
            },
            rows: rows.len() as i32,
            q_heads: heads.q() as i32,
            groups: groups as i32,
            groups_per_kv_head: (groups / heads.kv) as i32,
            max_pages: self.max_pages as i32,
            split_pages: split_pages as i32,
            window: self.window as i32,
            scale: heads.scale(),
            v_scale: 1.0,
            ..Default::default()
        };
        let launch = Launch { shared_bytes: shared, pdl: true, ..kernel.launch([grid, 1, 1], params) };
        // Twice: the tickets must have wound themselves back.
        device.launch(&launch).unwrap();
        let first = download(device, &out);
        device.launch(&launch).unwrap();
        let second = download(device, &out);
        assert_eq!(bits(&first), bits(&second), "decode {heads:?} {rows:?}: two runs differ");
        second
    }

    /// Prefill of these chunks, whose rows follow one another.
    fn prefill(&self, device: &Device, q: &[bf16], chunks: &[ChunkRows], grid: u32) -> Vec<bf16> {
        let heads = self.heads;
        let (kernel, shared) = match heads.head_dim {
            64 => (&ATTN_PREFILL_D64, ATTN_PREFILL_SHARED_D64),
            _ => (&ATTN_PREFILL_D128, ATTN_PREFILL_SHARED_D128),
        };
        let (k, v) = (upload(device, &self.k), upload(device, &self.v));
        let query = upload(device, q);
        let table = upload(device, &self.table);
        let (head_dim, heads_per_kv) = (heads.head_dim as u32, heads.group as u32);
        let list = prefill_tiles(chunks, head_dim, heads_per_kv);
        let tiles = upload(device, &list);
        let tile_count = upload(device, &[list.len() as i32]);
        let ticket = upload(device, &[0u32]);
        let out = device.alloc(q.len() * 2).unwrap();
        let (d, group, kv) = (heads.head_dim as u64, heads.group as u64, heads.kv as u64);
        let q_map = TensorMapSpec {
            address: query.address(),
            dims: [d, group, kv, q.len() as u64 / (d * group * kv)],
            strides: [2, d * 2, group * d * 2, kv * group * d * 2],
            r#box: [64, heads_per_kv, 1, prefill_tile_tokens(head_dim, heads_per_kv)],
            swizzle: true,
        };
        let params = AttnPrefillParams {
            k_map: self.map(device, &k),
            v_map: self.map(device, &v),
            q_map: device.tensor_map(&q_map).unwrap(),
            tiles: tiles.pointer(),
            tile_count: tile_count.pointer(),
            block_table: table.pointer(),
            ticket: ticket.pointer(),
            out: out.pointer(),
            q_heads: heads.q() as i32,
            kv_heads: heads.kv as i32,
            max_pages: self.max_pages as i32,
            window: self.window as i32,
            scale: heads.scale(),
            v_scale: 1.0,
        };
        let launch = Launch { shared_bytes: shared, pdl: true, ..kernel.launch([grid, 1, 1], params) };
        device.launch(&launch).unwrap();
        assert_eq!(download::<u32>(device, &ticket), [0], "the ticket counter winds itself back");
        download(device, &out)
    }
}

fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Runs on every device of the test, checks the first result with `check` and that the others are the same bits.
fn on_every_device(run: impl Fn(&Device) -> Vec<bf16>, check: impl Fn(&[bf16])) {
    let mut first: Option<Vec<bf16>> = None;
    for device in devices() {
        let out = run(&device);
        match &first {
            None => {
                check(&out);
                first = Some(out);
            }
            Some(first) => assert_eq!(bits(first), bits(&out), "{}: not the bits of the first", device.describe()),
        }
    }
}

fn check_decode(head_dim: usize, kv: usize, group: usize, positions: &[i32], grid: u32) {
    check_decode_in_window(NO_WINDOW as usize, head_dim, kv, group, positions, grid);
}

fn check_decode_in_window(window: usize, head_dim: usize, kv: usize, group: usize, positions: &[i32], grid: u32) {
    let heads = Heads { head_dim, kv, group };
    let mut random = Random(group as u64 + 31 * grid as u64);
    let lengths: Vec<usize> = positions.iter().map(|&p| (p + 1) as usize).collect();
    let rows: Vec<(usize, i32)> =
        positions.iter().enumerate().map(|(i, &p)| (if p < 0 { 0 } else { i + 1 }, p)).collect();
    let cache = Cache::new(heads, &lengths, &mut random).with_window(window, &rows);
    let q = values(&mut random, rows.len() * heads.q() * head_dim, 1.0);
    for split_pages in [0, 1, 2] {
        let what = format!("decode {heads:?}, window {window}, grid {grid}, pieces of {split_pages} pages");
        let run = |device: &Device| cache.decode(device, &q, &rows, grid, split_pages);
        on_every_device(run, |out| cache.check(&q, &rows, out, &what));
    }
}

#[test]
fn decode_at_the_edges_of_pages() {
    check_decode(64, 2, 2, &[0], 4);
    check_decode(64, 2, 2, &[64], 1);
    check_decode(64, 2, 2, &[0, 63, -1, 64, 65, 127, 128, -1], 4);
    check_decode(128, 1, 4, &[128, 127, -1, 65, 64, 63, 0], 3);
}

#[test]
fn decode_of_every_group() {
    for (group, grid) in [(1, 4), (2, 3), (4, 5), (7, 2), (8, 4), (16, 3)] {
        check_decode(64, 2, group, &[100, 15, 200], grid);
        check_decode(128, 1, group, &[16, 150], grid);
    }
}

#[test]
fn decode_of_padding_only_and_of_sixteen_rows() {
    check_decode(64, 1, 1, &[-1, -1, -1], 2);
    check_decode(64, 1, 2, &[5, 70, -1, 130, 3, 64, 63, 1, 200, -1, 12, 77, 90, 191, 192, 193], 4);
}

#[test]
fn decode_of_sixty_four_rows() {
    let positions: Vec<i32> = (0..64).map(|row| if row % 9 == 4 { -1 } else { row * 37 % 331 }).collect();
    check_decode(64, 1, 3, &positions, 13);
    check_decode(128, 2, 1, &positions[..33], 5);
}

/// Query heads that read K and V each for itself: right, and where pieces are fixed the bits of those that share.
#[test]
fn decode_of_heads_that_are_not_packed() {
    let positions = [130, 63, -1, 0, 200];
    let rows: Vec<(usize, i32)> =
        positions.iter().enumerate().map(|(i, &p)| (if p < 0 { 0 } else { i + 1 }, p)).collect();
    for (head_dim, kv, group, grid) in [(64, 2, 3, 5), (128, 2, 2, 7), (64, 1, 16, 40)] {
        let heads = Heads { head_dim, kv, group };
        let mut random = Random(23);
        let mut cache = Cache::new(heads, &positions.map(|p| (p + 1) as usize), &mut random);
        let q = values(&mut random, rows.len() * heads.q() * head_dim, 1.0);
        for split_pages in [0, 1, 2] {
            let what = format!("decode {heads:?}, not packed, grid {grid}, pieces of {split_pages} pages");
            cache.packed = true;
            let packed = cache.decode(&devices().remove(0), &q, &rows, grid, split_pages);
            cache.packed = false;
            let run = |device: &Device| cache.decode(device, &q, &rows, grid, split_pages);
            on_every_device(run, |out| {
                cache.check(&q, &rows, out, &what);
                assert!(split_pages == 0 || bits(out) == bits(&packed), "{what}: other bits than packed");
            });
        }
    }
}

/// Windows that begin at, before and behind the edges of pages and of the warps' slices, shorter and longer than the sequence.
#[test]
fn decode_in_a_sliding_window() {
    for window in [1, 64, 100, 300] {
        check_decode_in_window(window, 64, 2, 2, &[0, 63, -1, 99, 128, 300], 4);
        check_decode_in_window(window, 128, 1, 5, &[178, 16], 7);
    }
}

/// Cut at fixed pages, a row is attended to in the same way alone and among others, on any grid.
#[test]
fn decode_in_fixed_pieces_does_not_know_the_batch() {
    let heads = Heads { head_dim: 64, kv: 2, group: 3 };
    let positions = [700, 64, 63, 300, 5, 129];
    let mut random = Random(21);
    let cache = Cache::new(heads, &positions.map(|p| p as usize + 1), &mut random);
    let columns = heads.q() * heads.head_dim;
    let q = values(&mut random, positions.len() * columns, 1.0);
    let rows: Vec<(usize, i32)> = positions.iter().enumerate().map(|(i, &p)| (i + 1, p)).collect();
    let device = crate::devices::devices().pop().unwrap();
    let together = cache.decode(&device, &q, &rows, 5, 4);
    for (i, row) in rows.iter().enumerate() {
        let range = i * columns..(i + 1) * columns;
        for grid in [1, 4, 7] {
            let alone = cache.decode(&device, &q[range.clone()], &[*row], grid, 4);
            assert!(bits(&alone) == bits(&together[range.clone()]), "row {i}, grid {grid}");
        }
    }
}

#[test]
fn decode_with_more_blocks_than_pages() {
    check_decode(128, 2, 5, &[130, -1, 60], 40);
}

#[test]
fn decode_of_long_contexts() {
    check_decode(64, 1, 4, &[4999], 4);
    check_decode(128, 1, 6, &[2300, 64, 1000], 7);
}

fn check_prefill(head_dim: usize, kv: usize, group: usize, chunks: &[(usize, usize)], grid: u32) {
    check_prefill_in_window(NO_WINDOW as usize, head_dim, kv, group, chunks, grid);
}

fn check_prefill_in_window(
    window: usize,
    head_dim: usize,
    kv: usize,
    group: usize,
    chunks: &[(usize, usize)],
    grid: u32,
) {
    let heads = Heads { head_dim, kv, group };
    let mut random = Random(group as u64 + 77 * grid as u64);
    let lengths: Vec<usize> = chunks.iter().map(|&(position, tokens)| position + tokens).collect();
    let (chunks, rows) = lay_out(chunks.iter().enumerate().map(|(i, &(position, tokens))| (i + 1, position, tokens)));
    let cache = Cache::new(heads, &lengths, &mut random).with_window(window, &rows);
    let q = values(&mut random, rows.len() * heads.q() * head_dim, 1.0);
    let what = format!("prefill {heads:?}, window {window}, grid {grid}, {chunks:?}");
    on_every_device(|device| cache.prefill(device, &q, &chunks, grid), |out| cache.check(&q, &rows, out, &what));
}

/// Chunks of (slot, position, tokens) one after the other, and the (slot, position) of their rows.
fn lay_out(chunks: impl Iterator<Item = (usize, usize, usize)>) -> (Vec<ChunkRows>, Vec<(usize, i32)>) {
    let (mut placed, mut rows) = (Vec::new(), Vec::new());
    for (slot, position, tokens) in chunks {
        let first_row = rows.len() as u32;
        placed.push(ChunkRows { slot: slot as u32, first_row, tokens: tokens as u32, position: position as u32 });
        rows.extend((position..position + tokens).map(|p| (slot, p as i32)));
    }
    (placed, rows)
}

#[test]
fn prefill_of_whole_prompts() {
    check_prefill(64, 2, 2, &[(0, 1)], 4);
    check_prefill(64, 2, 2, &[(0, 63), (0, 64), (0, 65)], 4);
    check_prefill(128, 1, 4, &[(0, 129)], 3);
}

#[test]
fn prefill_of_chunks_that_start_anywhere() {
    check_prefill(64, 1, 2, &[(1, 70), (63, 2), (64, 64), (127, 3), (128, 1), (200, 100)], 3);
    check_prefill(128, 2, 1, &[(100, 150), (33, 40)], 5);
}

#[test]
fn prefill_of_every_group() {
    for group in 1..=16 {
        check_prefill(64, 1, group, &[(130, 20), (0, 3)], 2);
        check_prefill(128, 1, group, &[(50, 19)], 2);
    }
}

/// Several tiles and KV heads to a block, more blocks than work, chunks at, before and behind the edges of pages.
#[test]
fn prefill_of_ragged_batches() {
    for seed in 1..=6 {
        let mut random = Random(seed);
        let mut chunk = |_| {
            let position = 64 * random.below(4) as usize + [0, 1, 37, 63][random.below(4) as usize];
            (position, [1, 2, 31, 64, 65, 90][random.below(6) as usize])
        };
        let chunks: Vec<(usize, usize)> = (0..2 + seed as usize % 4).map(&mut chunk).collect();
        let head_dim = if seed % 2 == 0 { 64 } else { 128 };
        let (kv, group) = (1 + random.below(3) as usize, 1 + random.below(8) as usize);
        check_prefill(head_dim, kv, group, &chunks, 1 << random.below(6));
    }
}

#[test]
fn prefill_over_long_contexts() {
    check_prefill(64, 1, 4, &[(4970, 30)], 1);
    check_prefill(128, 1, 8, &[(2040, 17), (1000, 5)], 2);
    check_prefill(128, 1, 5, &[(4983, 17)], 1);
}

#[test]
fn prefill_in_a_sliding_window() {
    for window in [1, 64, 100, 200] {
        check_prefill_in_window(window, 64, 1, 2, &[(0, 200), (130, 70), (400, 3)], 3);
        check_prefill_in_window(window, 64, 1, 1, &[(60, 250)], 2);
        check_prefill_in_window(window, 128, 1, 4, &[(300, 65), (127, 2)], 2);
    }
}

/// Both round the probabilities to bf16, relative to different maxima: they differ by no more than each from the truth.
#[test]
fn prefill_equals_decode_one_by_one() {
    let heads = Heads { head_dim: 64, kv: 2, group: 2 };
    let mut random = Random(5);
    let length = 150;
    let cache = Cache::new(heads, &[length], &mut random);
    let q = values(&mut random, length * heads.q() * 64, 1.0);
    let device = devices().remove(0);
    let by_step: Vec<bf16> = (0..length)
        .flat_map(|p| {
            let row = heads.q() * 64;
            cache.decode(&device, &q[p * row..(p + 1) * row], &[(1, p as i32)], 3, 0)
        })
        .collect();
    for cuts in [vec![0, 150], vec![0, 1, 64, 150], vec![0, 37, 128, 129, 150]] {
        let (chunks, rows) = lay_out(cuts.windows(2).map(|c| (1, c[0], c[1] - c[0])));
        let whole = cache.prefill(&device, &q, &chunks, 2);
        for (i, (a, b)) in whole.iter().zip(&by_step).enumerate() {
            let head = i / 64;
            let (_, position) = rows[head / heads.q()];
            let difference = (a.to_f64() - b.to_f64()).abs();
            if difference > 1e-5 {
                let (_, bound) =
                    cache.truth(&q[head * 64..(head + 1) * 64], 1, position as usize, head % heads.q() / heads.group);
                assert!(difference <= bound[i % 64] / 64.0 + 2e-5, "cuts {cuts:?}, position {position}: {a} and {b}");
            }
        }
    }
}

/// Tiles of keys lie at absolute positions, so the cut of a prompt into chunks changes no sum.
#[test]
fn prefill_has_the_same_bits_however_it_is_cut() {
    let heads = Heads { head_dim: 128, kv: 1, group: 3 };
    let mut random = Random(6);
    let mut cache = Cache::new(heads, &[300], &mut random);
    let q = values(&mut random, 300 * heads.q() * 128, 1.0);
    let device = devices().remove(0);
    for window in [NO_WINDOW as usize, 90] {
        cache.window = window;
        let run = |cuts: &[usize]| {
            let (chunks, _) = lay_out(cuts.windows(2).map(|c| (1, c[0], c[1] - c[0])));
            bits(&cache.prefill(&device, &q, &chunks, 3))
        };
        let whole = run(&[0, 300]);
        assert!(whole == run(&[0, 64, 129, 300]));
        assert!(whole == run(&[0, 1, 2, 299, 300]));
    }
}

fn check_rope(heads: Heads, norm: bool) {
    let d = heads.head_dim;
    let mut random = Random(d as u64 + norm as u64);
    let positions = [0, 63, -1, 64, 65, 127, 128, -1, 190];
    let lengths: Vec<usize> = positions.iter().map(|&p| (p + 1) as usize).collect();
    let cache = Cache::new(heads, &lengths, &mut random);
    let slots: Vec<i32> = positions.iter().enumerate().map(|(i, &p)| if p < 0 { 0 } else { i as i32 + 1 }).collect();
    let columns = (heads.q() + 2 * heads.kv) * d;
    let qkv = values(&mut random, positions.len() * columns, 2.0);
    // As the product leaves it: in heads of q and k, 8 columns of one half, then 8 of the other.
    let interleaved: Vec<bf16> = (0..qkv.len())
        .map(|i| {
            let (column, head) = (i % columns % d, i % columns / d);
            let from = column / 16 * 8 + column % 8 + if column % 16 < 8 { 0 } else { d / 2 };
            qkv[i - column + if head < heads.q() + heads.kv { from } else { column }]
        })
        .collect();
    let weights: Vec<Vec<bf16>> = (0..2)
        .map(|_| values(&mut random, d, 0.3).iter().map(|w| bf16::from_f32(1.0 + w.to_f32())).collect())
        .collect();
    let cos_sin: Vec<f32> = (0..256 * d / 2)
        .flat_map(|i| {
            let angle = (i / (d / 2)) as f64 * 10000f64.powf(-((i % (d / 2)) as f64) / (d / 2) as f64);
            [angle.cos() as f32, angle.sin() as f32]
        })
        .collect();
    let eps = 1e-6;

    // Every element with the tolerance it may have; `None` of a tolerance: bit for bit.
    let head = |row: usize, head: usize| &qkv[row * columns + head * d..][..d];
    let rotated = |x: &[bf16], position: i32, weight: &[bf16]| -> Vec<(f64, f64)> {
        let mut x: Vec<f64> = x.iter().map(|x| x.to_f64()).collect();
        if norm {
            let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / d as f64 + eps as f64).sqrt();
            for (x, w) in x.iter_mut().zip(weight) {
                *x = bf16::from_f64(bf16::from_f64(*x * scale).to_f64() * w.to_f64()).to_f64();
            }
        }
        // A norm on the edge of two bf16 may come out one off, twice.
        let slack = if norm { 1.0 / 60.0 } else { 1e-6 };
        (0..d)
            .map(|i| {
                let pair = i % (d / 2);
                let [cos, sin] = [0, 1].map(|j| cos_sin[(position as usize * d / 2 + pair) * 2 + j] as f64);
                let (low, high) = (x[pair], x[pair + d / 2]);
                let want = if i < d / 2 { low * cos - high * sin } else { high * cos + low * sin };
                (want, want.abs() / 256.0 + slack * (low.abs() + high.abs()))
            })
            .collect()
    };
    let compare = |got: &[bf16], want: Vec<(f64, f64)>, what: &str| {
        for (i, (got, (want, tolerance))) in got.iter().zip(want).enumerate() {
            assert!((got.to_f64() - want).abs() <= tolerance, "{heads:?} {what}, column {i}: {got}, not {want}");
        }
    };

    let q_count = positions.len() * heads.q() * d;
    on_every_device(
        |device| {
            let buffers = [upload(device, &interleaved), upload(device, &weights[0]), upload(device, &weights[1])];
            let table = upload(device, &cache.table);
            let cos_sin = upload(device, &cos_sin);
            let (position, slot) = (upload(device, &positions), upload(device, &slots));
            let (k, v) = (upload(device, &cache.k), upload(device, &cache.v));
            let q = device.alloc(q_count * 2).unwrap();
            let weight = |i: usize| if norm { buffers[i].pointer() } else { std::ptr::null_mut() };
            let params = RopeParams {
                qkv: buffers[0].pointer(),
                q_norm: weight(1),
                k_norm: weight(2),
                rope: Rope {
                    cos_sin: cos_sin.pointer(),
                    row_position: position.pointer(),
                    row_slot: slot.pointer(),
                    block_table: table.pointer(),
                    q: q.pointer(),
                    k_pages: k.pointer(),
                    v_pages: v.pointer(),
                    q_heads: heads.q() as i32,
                    kv_heads: heads.kv as i32,
                    head_dim: d as i32,
                    max_pages: cache.max_pages as i32,
                    ..Default::default()
                },
                rows: positions.len() as i32,
                norm_eps: eps,
            };
            let kernel = if d == 64 { &ROPE_APPEND_D64 } else { &ROPE_APPEND_D128 };
            let threads = positions.len() * columns / 16;
            let grid = threads.div_ceil(ROPE_THREADS as usize) as u32;
            device.launch(&Launch { pdl: true, ..kernel.launch([grid, 1, 1], params) }).unwrap();
            let mut all = download::<bf16>(device, &q);
            all.extend(download::<bf16>(device, &k));
            all.extend(download::<bf16>(device, &v));
            all
        },
        |out| {
            let (q, pools) = out.split_at(q_count);
            let (k, v) = pools.split_at(cache.k.len());
            let (mut k_rest, mut v_rest) = (k.to_vec(), v.to_vec());
            for (row, &position) in positions.iter().enumerate() {
                for h in 0..heads.q() {
                    let got = &q[(row * heads.q() + h) * d..][..d];
                    if position < 0 {
                        assert!(got.iter().all(|x| x.to_bits() == 0), "padding row {row} is not zero");
                    } else {
                        compare(got, rotated(head(row, h), position, &weights[0]), "q");
                    }
                }
                for h in (0..heads.kv).filter(|_| position >= 0) {
                    let at = cache.at(slots[row] as usize, position as usize, h);
                    compare(&k[at..at + d], rotated(head(row, heads.q() + h), position, &weights[1]), "k");
                    assert_eq!(bits(&v[at..at + d]), bits(head(row, heads.q() + heads.kv + h)), "v of row {row}");
                    k_rest[at..at + d].copy_from_slice(&cache.k[at..at + d]);
                    v_rest[at..at + d].copy_from_slice(&cache.v[at..at + d]);
                }
            }
            assert!(
                bits(&k_rest) == bits(&cache.k) && bits(&v_rest) == bits(&cache.v),
                "written beside the new tokens"
            );
        },
    );
}

#[test]
fn rope_rotates_and_appends() {
    check_rope(Heads { head_dim: 64, kv: 2, group: 2 }, false);
    check_rope(Heads { head_dim: 128, kv: 1, group: 5 }, false);
}

#[test]
fn rope_normalises_heads_first_where_the_model_does() {
    check_rope(Heads { head_dim: 64, kv: 1, group: 7 }, true);
    check_rope(Heads { head_dim: 128, kv: 3, group: 1 }, true);
}
