//! The sampler without budget forcing: what it draws, reports and keeps, against plain Rust in float64.
//!
//! Logits and most parameters are multiples of powers of two, so that the order of candidates and every cut through it is exact
//! and ties are frequent. Where a parameter is not, tokens as close to a cut as rounding can move them may fall on either side.

use crate::devices::{devices, download, upload};
use crate::random::Random;
use bytemuck::Zeroable;
use ponder::device::host::HostOptions;
use ponder::device::{Buffer, Device, Launch};
use ponder::kernels::SAMPLE;
use ponder::kernels::params::*;

const REAL: u8 = TRAIT_REAL as u8;
/// What float32 arithmetic may do to a score or a log-probability.
const TOLERANCE: f64 = 2e-4;

/// A sequence in its slot, and its logits.
#[derive(Clone)]
pub struct Row {
    pub state: SlotState,
    logits: Vec<f32>,
    bias: Vec<(i32, f32)>,
    allowed: Vec<bool>,
    counts: Vec<u16>,
    prompt: Vec<bool>,
    /// Strings of its budget.
    pub pool: Vec<i32>,
    /// Steering's tokens.
    pub avoided: Vec<i32>,
    pub switches: Vec<i32>,
}

impl Row {
    /// Greedy, without limits.
    pub fn new(logits: Vec<f32>) -> Row {
        let vocab = logits.len();
        let budget = Budget { max_thinking: BUDGET_NO_MAX as i32, newline: -1, inject_first: -1, ..Default::default() };
        let state = SlotState {
            serial: 7,
            flags: SLOT_ACTIVE,
            length: 10,
            max_generated: 1 << 20,
            max_length: 1 << 20,
            top_p: 1.0,
            repetition_penalty: 1.0,
            logprobs: -1,
            budget,
            ..Default::default()
        };
        Row {
            state,
            logits,
            bias: Vec::new(),
            allowed: vec![true; vocab],
            counts: vec![0; vocab],
            prompt: vec![false; vocab],
            pool: Vec::new(),
            avoided: Vec::new(),
            switches: Vec::new(),
        }
    }

    fn random(random: &mut Random, vocab: usize) -> Row {
        let spread = 1 << random.below(11);
        let level = |random: &mut Random| random.below(2 * spread) as f32 / 64.0 - spread as f32 / 64.0;
        let mut row = Row::new((0..vocab).map(|_| level(random)).collect());
        let s = &mut row.state;
        s.serial = random.below(1 << 30);
        s.length = 1 + random.below(5000) as i32;
        s.generated = random.below(50) as i32;
        s.seed_low = random.next() as u32;
        s.seed_high = random.next() as u32;
        let mut maybe = |f: &mut dyn FnMut(&mut Random)| {
            if random.below(2) == 0 {
                f(random);
            }
        };
        maybe(&mut |_| s.temperature = 1.0);
        maybe(&mut |r| s.temperature = [0.25, 0.5, 1.0, 2.0, 0.7, 1.3][r.below(6) as usize]);
        maybe(&mut |r| {
            let most = [10, 2 * vocab as u32][r.below(2) as usize];
            s.top_k = 1 + r.below(most) as i32;
        });
        maybe(&mut |r| s.top_p = [0.1, 0.5, 0.9, 0.95, 0.999][r.below(5) as usize]);
        maybe(&mut |r| s.min_p = [0.01, 0.1, 0.3, 1.0][r.below(4) as usize]);
        maybe(&mut |r| s.logprobs = r.below(MAX_TOP_LOGPROBS + 1) as i32);
        maybe(&mut |r| {
            s.flags |= SLOT_PENALTIES;
            s.repetition_penalty = [1.0, 2.0, 0.5, 1.1][r.below(4) as usize];
            s.presence_penalty = [0.0, 0.5, -1.0][r.below(3) as usize];
            s.frequency_penalty = [0.0, 0.25, -0.125][r.below(3) as usize];
            row.counts.iter_mut().for_each(|c| *c = r.below(12).saturating_sub(8) as u16);
            row.prompt.iter_mut().for_each(|p| *p = r.below(3) == 0);
        });
        maybe(&mut |r| {
            match r.below(2) {
                0 => s.flags |= SLOT_ALLOWED_MASK,
                // Now and then the mask is that of an earlier draw.
                _ => (s.flags, s.mask_for) = (s.flags | SLOT_GUIDED, s.generated - i32::from(r.below(4) == 0)),
            }
            let one_in = 1 + r.below(8);
            row.allowed.iter_mut().for_each(|a| *a = r.below(one_in) == 0);
            row.allowed[vocab / 3] = true;
        });
        maybe(&mut |r| {
            let mut ids: Vec<i32> = (0..1 + r.below(60)).map(|_| r.below(vocab as u32) as i32).collect();
            ids.sort_unstable();
            ids.dedup();
            row.bias = ids.iter().map(|&id| (id, r.below(2000) as f32 / 64.0 - 15.0)).collect();
        });
        maybe(&mut |r| {
            s.stop_count = 1 + r.below(MAX_STOP_IDS);
            s.eos_count = r.below(s.stop_count + 1).min(3);
            // Among the best tokens, so that they matter.
            let mut best: Vec<i32> = (0..vocab as i32).filter(|&i| i != vocab as i32 / 3).collect();
            best.sort_by(|&a, &b| row.logits[b as usize].total_cmp(&row.logits[a as usize]));
            for i in 0..s.stop_count as usize {
                s.stop_ids[i] = best[i * (1 + r.below(2) as usize)];
            }
            s.min_generated = r.below(100) as i32;
            s.flags |= if r.below(2) == 0 { SLOT_IGNORE_EOS } else { 0 };
        });
        maybe(&mut |r| s.max_generated = s.generated + 1 + r.below(2) as i32);
        maybe(&mut |r| s.max_length = s.length + 1 + r.below(2) as i32);
        row
    }

    /// As slot_runs in kernels/kernel.cuh, for a slot without a budget.
    fn runs(&self) -> bool {
        let s = &self.state;
        s.flags & SLOT_ACTIVE != 0 && (s.flags & SLOT_GUIDED == 0 || s.mask_for == s.generated)
    }

    fn inactive(mut self) -> Row {
        self.state.flags &= !SLOT_ACTIVE;
        self
    }

    /// Whether float32 computes this row's logits and distances without rounding.
    fn is_exact(&self) -> bool {
        [1.0, 2.0, 0.5].contains(&self.state.repetition_penalty)
            && [0.0, 0.25, 0.5, 1.0, 2.0].contains(&self.state.temperature)
    }
}

/// The sampler with its device memory: row i of the batch is the sequence in slot i + 1, or padding (`None`).
pub struct Bench {
    device: Device,
    launch: Launch,
    slots: Buffer,
    counts: Buffer,
    ring: Buffer,
    step: Buffer,
    vocab: usize,
    rows: usize,
    others: Vec<Buffer>,
}

impl Bench {
    pub fn new(device: &Device, traits: &[u8], cluster: u32, rows: &[Option<Row>]) -> Bench {
        let vocab = traits.len();
        let words = vocab.div_ceil(32);
        let count = rows.len() + 1;
        let mut slots = vec![SlotState::default(); count];
        let mut row_slot = vec![0i32; rows.len()];
        let mut logits = vec![0f32; rows.len() * vocab];
        let (mut allowed, mut seen) = (vec![0u32; count * words], vec![0u32; count * words]);
        let mut bias_ids = vec![0i32; count * MAX_LOGIT_BIAS as usize];
        let mut bias_values = vec![0f32; count * MAX_LOGIT_BIAS as usize];
        let mut counts = vec![0u16; count * vocab];
        let (mut avoided, mut switches) = (vec![0u32; count * words], vec![0u32; count * words]);
        let mut pool = vec![0];
        for (i, row) in rows.iter().enumerate() {
            let Some(row) = row else { continue };
            let slot = i + 1;
            row_slot[i] = slot as i32;
            let mut budget = row.state.budget;
            let strings = [&mut budget.start, &mut budget.end, &mut budget.close, &mut budget.end_string];
            strings.into_iter().chain(&mut budget.ignore_strings).for_each(|s| s.offset += pool.len() as u32);
            pool.extend_from_slice(&row.pool);
            let budget = if row.pool.is_empty() { row.state.budget } else { budget };
            slots[slot] = SlotState { bias_count: row.bias.len() as u32, budget, ..row.state };
            logits[i * vocab..][..vocab].copy_from_slice(&row.logits);
            counts[slot * vocab..][..vocab].copy_from_slice(&row.counts);
            for id in 0..vocab {
                allowed[slot * words + id / 32] |= u32::from(row.allowed[id]) << (id % 32);
                seen[slot * words + id / 32] |= u32::from(row.prompt[id]) << (id % 32);
            }
            for (bits, ids) in [(&mut avoided, &row.avoided), (&mut switches, &row.switches)] {
                ids.iter().for_each(|&id| bits[slot * words + id as usize / 32] |= 1 << (id % 32));
            }
            for (j, &(id, value)) in row.bias.iter().enumerate() {
                bias_ids[slot * MAX_LOGIT_BIAS as usize + j] = id;
                bias_values[slot * MAX_LOGIT_BIAS as usize + j] = value;
            }
        }
        let (slots, counts) = (upload(device, &slots), upload(device, &counts));
        let (ring, step) = (upload(device, &[TokenRing::zeroed()]), upload(device, &[0u32]));
        let others = vec![
            upload(device, &row_slot),
            upload(device, traits),
            upload(device, &pool),
            upload(device, &allowed),
            upload(device, &bias_ids),
            upload(device, &bias_values),
            upload(device, &seen),
            upload(device, &[0u32]),
            upload(device, &logits),
            upload(device, &avoided),
            upload(device, &switches),
            // What an earlier sequence has left there.
            upload(device, &vec![1i32; count * 2 * LOOP_PERIODS as usize]),
        ];
        let params = SampleParams {
            logits: others[8].pointer(),
            slots: slots.pointer(),
            row_slot: others[0].pointer(),
            token_traits: others[1].pointer(),
            pool: others[2].pointer(),
            allowed: others[3].pointer(),
            bias_ids: others[4].pointer(),
            bias_values: others[5].pointer(),
            output_counts: counts.pointer(),
            prompt_seen: others[6].pointer(),
            avoided: others[9].pointer(),
            switches: others[10].pointer(),
            loop_history: others[11].pointer(),
            ring: ring.pointer(),
            step: step.pointer(),
            ticket: others[7].pointer(),
            rows: rows.len() as i32,
            vocab: vocab as i32,
            ..Default::default()
        };
        let launch = Launch {
            cluster,
            shared_bytes: SAMPLE_SHARED_BASE + 4 * (vocab as u32).div_ceil(cluster).next_multiple_of(4),
            pdl: true,
            ..SAMPLE.launch([cluster, rows.len() as u32, 1], params)
        };
        Bench { device: device.clone(), launch, slots, counts, ring, step, vocab, rows: rows.len(), others }
    }

    /// For the next steps.
    pub fn set_logits(&self, row: usize, logits: &[f32]) {
        assert_eq!(logits.len(), self.vocab);
        self.device.upload(&self.others[8], row * self.vocab * 4, bytemuck::cast_slice(logits)).unwrap();
    }

    /// One step, and its records.
    pub fn step(&self) -> Vec<TokenRecord> {
        let before = self.ring().head;
        self.device.launch(&self.launch).unwrap();
        let ring = self.ring();
        assert_eq!(ring.head, before.wrapping_add(1), "one step more");
        let at = (before % RING_STEPS) as usize;
        assert_eq!(ring.rows[at], self.rows as u32, "rows of the step");
        ring.records[at][..self.rows].to_vec()
    }

    /// As if that many steps had been made before.
    fn start_at(&self, step: u32) {
        self.device.upload(&self.step, 0, bytemuck::bytes_of(&step)).unwrap();
        self.device.upload(&self.ring, std::mem::offset_of!(TokenRing, head), bytemuck::bytes_of(&step)).unwrap();
    }

    fn ring(&self) -> Box<TokenRing> {
        let mut ring = Box::new(TokenRing::zeroed());
        self.device.download(&self.ring, 0, bytemuck::bytes_of_mut(&mut *ring)).unwrap();
        ring
    }

    /// Of the sequence of row `i`.
    fn slot(&self, i: usize) -> SlotState {
        download::<SlotState>(&self.device, &self.slots)[i + 1]
    }

    fn counts(&self, i: usize) -> Vec<u16> {
        download::<u16>(&self.device, &self.counts)[(i + 1) * self.vocab..][..self.vocab].to_vec()
    }
}

/// Philox 4x32-10.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let high_low = |multiplier: u64, word: u32| {
            let product = multiplier * u64::from(word);
            ((product >> 32) as u32, product as u32)
        };
        let (high0, low0) = high_low(0xd251_1f53, counter[0]);
        let (high1, low1) = high_low(0xcd9e_8d57, counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

fn gumbel(state: &SlotState, id: usize) -> f64 {
    let words = philox([id as u32 / 4, state.length as u32, 0, 0], [state.seed_low, state.seed_high]);
    let u = ((f64::from(words[id % 4]) + 0.5) / 4_294_967_296.0).min(1.0 - 1.0 / 16_777_216.0);
    -(-(-u).ln_1p()).ln()
}

/// Logits as the draw sees them: after bias, masks and penalties; minus infinity for what may not be drawn.
fn adjusted(row: &Row, traits: &[u8]) -> Vec<f64> {
    let s = &row.state;
    let mut logits: Vec<f64> = row.logits.iter().map(|&x| f64::from(x)).collect();
    for &(id, bias) in &row.bias {
        logits[id as usize] += f64::from(bias);
    }
    if s.flags & SLOT_PENALTIES != 0 {
        for (id, x) in logits.iter_mut().enumerate() {
            let count = f64::from(row.counts[id]);
            if count > 0.0 || row.prompt[id] {
                let penalty = f64::from(s.repetition_penalty);
                *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
            }
            if count > 0.0 {
                *x -= f64::from(s.frequency_penalty) * count + f64::from(s.presence_penalty);
            }
        }
    }
    for id in 0..logits.len() {
        let stops = s.generated < s.min_generated && s.stop_ids[..s.stop_count as usize].contains(&(id as i32));
        let forbidden = s.flags & (SLOT_ALLOWED_MASK | SLOT_GUIDED) != 0 && !row.allowed[id];
        if traits[id] & REAL == 0 || stops || forbidden {
            logits[id] = f64::NEG_INFINITY;
        }
    }
    logits
}

/// A token that may be drawn: its distance below the maximum in units of the temperature, and whether it is certain that it may,
/// or a matter of rounding.
struct Candidate {
    id: usize,
    distance: f64,
    certain: bool,
}

/// Keeps the first `possible` candidates, of which the first `certain` are certain; and those whose distance is within `slack` of
/// the cut either way.
fn cut(kept: &mut Vec<Candidate>, certain: usize, possible: usize, slack: f64) {
    let (certain, possible) = (certain.min(kept.len()), possible.min(kept.len()));
    let (inner, outer) = (kept[certain - 1].distance - slack, kept[possible - 1].distance + slack);
    for (i, c) in kept.iter_mut().enumerate() {
        c.certain &= i < certain && (slack == 0.0 || c.distance <= inner || i == 0);
    }
    let mut i = 0;
    kept.retain(|c| {
        i += 1;
        i <= possible || (slack > 0.0 && c.distance <= outer)
    });
}

/// What min-p, top-k and top-p leave, best first.
fn kept(logits: &[f64], row: &Row) -> Vec<Candidate> {
    let s = &row.state;
    let slack = if row.is_exact() { 0.0 } else { TOLERANCE };
    let mut ids: Vec<usize> = (0..logits.len()).filter(|&i| logits[i] > f64::NEG_INFINITY).collect();
    ids.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let max = logits[ids[0]];
    let distance = |id: usize| (max - logits[id]) / f64::from(s.temperature);
    let mut kept: Vec<_> = ids.iter().map(|&id| Candidate { id, distance: distance(id), certain: true }).collect();
    if s.min_p > 0.0 {
        let within = |limit: f64| kept.iter().filter(|c| c.distance <= limit).count().max(1);
        let limit = -f64::from(s.min_p).ln();
        let (certain, possible) = (within(limit - slack), within(limit + slack));
        cut(&mut kept, certain, possible, 0.0);
    }
    if s.top_k > 0 {
        cut(&mut kept, s.top_k as usize, s.top_k as usize, slack);
    }
    if s.top_p < 1.0 {
        let mass: Vec<f64> = kept.iter().map(|c| (-c.distance).exp()).collect();
        let total: f64 = mass.iter().sum();
        let reach = |share: f64| {
            let mut sum = 0.0;
            let short = mass.iter().take_while(|&&m| {
                sum += m;
                sum < total * share
            });
            1 + short.count()
        };
        let share = f64::from(s.top_p);
        cut(&mut kept, reach(share - 1e-4), reach(share + 1e-4), slack);
    }
    kept
}

/// The token that is drawn when these may not be.
pub fn drawn(row: &Row, traits: &[u8], masked: &[i32]) -> i32 {
    let mut logits = adjusted(row, traits);
    masked.iter().for_each(|&id| logits[id as usize] = f64::NEG_INFINITY);
    let kept = kept(&logits, row);
    let score = |c: &Candidate| gumbel(&row.state, c.id) - c.distance;
    kept.iter().max_by(|a, b| score(a).total_cmp(&score(b))).unwrap().id as i32
}

/// Holds a record, and the slot and counts after the step, against what should have come of `row`.
fn check(row: &Row, traits: &[u8], slot_id: u32, record: &TokenRecord, slot: &SlotState, counts: &[u16], what: &str) {
    let before = &row.state;
    assert_eq!((record.serial, record.slot), (before.serial, slot_id), "{what}");
    let logits = adjusted(row, traits);
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
    let logprob = |id: usize| logits[id] - max - sum.ln();
    let token = record.token as usize;

    if before.temperature == 0.0 {
        let best = logits.iter().position(|&x| x == max).unwrap();
        let close = !row.is_exact() && logits[token] >= max - TOLERANCE;
        assert!(token == best || close, "{what}: greedy took {token}, the first of the best is {best}");
    } else {
        let kept = kept(&logits, row);
        let score = |c: &Candidate| gumbel(before, c.id) - c.distance;
        let best = kept.iter().filter(|c| c.certain).map(score).fold(f64::NEG_INFINITY, f64::max);
        let drawn = kept.iter().find(|c| c.id == token);
        let drawn = drawn.unwrap_or_else(|| panic!("{what}: {token} was drawn and is not among the {}", kept.len()));
        assert!(score(drawn) >= best - TOLERANCE, "{what}: {token} scores {}, the best {best}", score(drawn));
    }

    let reported = if before.logprobs < 0 { 0.0 } else { logprob(token) };
    assert!((f64::from(record.logprob) - reported).abs() < TOLERANCE, "{what}: logprob {}", record.logprob);
    let mut order: Vec<usize> = (0..logits.len()).filter(|&i| logits[i] > f64::NEG_INFINITY).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(before.logprobs.max(0) as usize);
    assert_eq!(record.top_count as usize, order.len(), "{what}");
    for (i, &id) in order.iter().enumerate() {
        assert!(
            !row.is_exact() || record.top_ids[i] == id as i32,
            "{what}: top {i} is {}, not {id}",
            record.top_ids[i]
        );
        assert!((f64::from(record.top_logprobs[i]) - logprob(id)).abs() < TOLERANCE, "{what}: logprob of top {i}");
    }

    let ignored = if before.flags & SLOT_IGNORE_EOS != 0 { before.eos_count as usize } else { 0 };
    let stops = before.stop_ids[ignored..before.stop_count as usize].contains(&record.token);
    let finish = if stops && before.generated + 1 >= before.min_generated {
        FINISH_STOP
    } else if before.generated + 1 == before.max_generated || before.length + 1 == before.max_length {
        FINISH_LENGTH
    } else {
        FINISH_NONE
    };
    let pauses = finish == FINISH_NONE && before.flags & SLOT_GUIDED != 0;
    let flags = TOKEN_VALID | if pauses { TOKEN_AWAITS_MASK } else { 0 };
    assert_eq!((record.finish, record.flags), (finish, flags), "{what}");
    assert_eq!(
        (record.generated, record.ignores_used, record.reasoning_tokens),
        (before.generated + 1, 0, 0),
        "{what}"
    );
    let after = SlotState {
        last_token: record.token,
        length: before.length + 1,
        generated: before.generated + 1,
        finish,
        flags: if finish == FINISH_NONE { before.flags } else { before.flags & !SLOT_ACTIVE },
        bias_count: row.bias.len() as u32,
        ..*before
    };
    // `ends_with_newline` and `utf8_missing` follow the token, with or without a budget.
    let after = SlotState { budget: slot.budget, ..after };
    assert_eq!(bytemuck::bytes_of(&after), bytemuck::bytes_of(slot), "{what}: {after:?} is right, not {slot:?}");
    let mut expected = row.counts.clone();
    expected[token] += u16::from(before.flags & SLOT_PENALTIES != 0);
    assert!(counts == expected, "{what}: output counts");
}

/// Runs rows (`None`: padding) and holds every record and slot against the truth.
fn run_and_check(device: &Device, traits: &[u8], cluster: u32, rows: &[Option<Row>], what: &str) -> Vec<TokenRecord> {
    let bench = Bench::new(device, traits, cluster, rows);
    let records = bench.step();
    for (i, (row, record)) in rows.iter().zip(&records).enumerate() {
        let what = format!("{what}, {}, cluster {cluster}, row {i}", device.describe());
        match row {
            Some(row) if row.runs() => {
                check(row, traits, i as u32 + 1, record, &bench.slot(i), &bench.counts(i), &what);
            }
            Some(row) => {
                assert_eq!((record.serial, record.slot, record.flags), (row.state.serial, i as u32 + 1, 0), "{what}");
                let same = SlotState { bias_count: row.bias.len() as u32, ..row.state };
                assert_eq!(bytemuck::bytes_of(&same), bytemuck::bytes_of(&bench.slot(i)), "{what}: it is not active");
            }
            None => assert_eq!((record.slot, record.flags), (0, 0), "{what}: padding"),
        }
    }
    records
}

/// `padded` of the last rows are no tokens.
fn traits(vocab: usize, padded: usize) -> Vec<u8> {
    let mut traits = vec![REAL; vocab - padded];
    traits.resize(vocab, 0);
    traits
}

/// For volume: the GPU if TEST_DEVICE=cuda, else the host target without its checks.
pub fn fast_device() -> Device {
    if std::env::var("TEST_DEVICE").is_ok_and(|d| d == "cuda") {
        return devices().remove(0);
    }
    Device::host(HostOptions::default())
}

#[test]
fn philox_gives_the_published_answers() {
    let answers = [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];
    for (counter, key, answer) in answers {
        assert_eq!(philox(counter, key), answer);
    }
}

#[test]
fn greedy_takes_the_best_and_of_equals_the_lowest_id() {
    let mut random = Random(1);
    let mut row = || Some(Row::new((0..512).map(|_| random.below(3) as f32).collect()));
    for device in devices() {
        run_and_check(&device, &traits(512, 0), 2, &[row(), row()], "greedy");
    }
    for cluster in [1, 2, 8] {
        let rows: Vec<_> = (0..16).map(|_| row()).collect();
        run_and_check(&fast_device(), &traits(512, 0), cluster, &rows, "greedy");
    }
}

/// Some rows with random settings, among them padding and a sequence that is not active.
fn random_rows(random: &mut Random, vocab: usize, count: usize) -> Vec<Option<Row>> {
    let mut rows: Vec<_> = (0..count).map(|_| Some(Row::random(random, vocab))).collect();
    rows[1] = None;
    rows[2] = rows[2].take().map(Row::inactive);
    rows
}

#[test]
fn every_parameter_with_every_other_under_every_check() {
    for (seed, device) in devices().iter().enumerate() {
        let mut random = Random(seed as u64);
        for (vocab, padded, cluster) in [(500, 0, 1), (512, 12, 2)] {
            let rows = random_rows(&mut random, vocab, 6);
            run_and_check(device, &traits(vocab, padded), cluster, &rows, &format!("vocab {vocab}"));
        }
    }
}

#[test]
fn every_parameter_with_every_other() {
    let device = fast_device();
    let mut random = Random(2);
    for batch in 0..24 {
        let (vocab, padded, cluster) = [(500, 0, 1), (512, 12, 2), (500, 7, 8), (2000, 100, 4)][batch % 4];
        let rows = random_rows(&mut random, vocab, 16);
        run_and_check(&device, &traits(vocab, padded), cluster, &rows, &format!("batch {batch}, vocab {vocab}"));
    }
}

#[test]
fn every_parameter_alone() {
    let mut random = Random(3);
    let mut plain = Row::random(&mut random, 500);
    plain = Row { bias: Vec::new(), ..plain };
    let plain = Row { state: SlotState { temperature: 1.0, ..Row::new(Vec::new()).state }, ..plain };
    let with = |set: &dyn Fn(&mut SlotState)| {
        let mut row = plain.clone();
        set(&mut row.state);
        Some(row)
    };
    let mut rows = vec![
        with(&|_| ()),
        with(&|s| s.temperature = 0.5),
        with(&|s| s.top_k = 3),
        with(&|s| s.top_k = 1),
        with(&|s| s.top_p = 0.3),
        with(&|s| s.top_p = 1e-9),
        with(&|s| s.min_p = 0.2),
        with(&|s| s.min_p = 1.0),
        with(&|s| s.logprobs = 0),
        with(&|s| s.logprobs = 20),
    ];
    let mut row = plain.clone();
    row.bias = vec![(17, 15.0), (499, -3.0)];
    rows.push(Some(row));
    let mut row = plain.clone();
    (row.state.flags, row.allowed) = (SLOT_ACTIVE | SLOT_ALLOWED_MASK, vec![false; 500]);
    (row.allowed[31], row.allowed[499]) = (true, true);
    rows.push(Some(row));
    for set in [
        |s: &mut SlotState| s.repetition_penalty = 2.0,
        |s: &mut SlotState| s.presence_penalty = 2.0,
        |s: &mut SlotState| s.frequency_penalty = -2.0,
    ] {
        let mut row = plain.clone();
        row.state.flags |= SLOT_PENALTIES;
        set(&mut row.state);
        row.counts = (0..500).map(|_| random.below(3) as u16).collect();
        row.prompt = (0..500).map(|_| random.below(2) == 0).collect();
        rows.push(Some(row));
    }
    run_and_check(&fast_device(), &traits(500, 0), 2, &rows, "alone");
}

#[test]
fn vocabularies_of_real_models() {
    let mut random = Random(4);
    for (vocab, padded, cluster) in [(32000, 0, 4), (152_064, 400, 8), (151_936, 271, 4)] {
        for batch in 0..2 {
            let rows = random_rows(&mut random, vocab, 5);
            run_and_check(&fast_device(), &traits(vocab, padded), cluster, &rows, &format!("vocab {vocab}, {batch}"));
        }
    }
}

/// A row of the largest vocabulary, and as many rows as a step has, with top-k, top-p and log-probabilities.
#[test]
fn the_largest_shapes_under_every_check() {
    let mut random = Random(6);
    let mut rows = |vocab: usize, count: usize| -> Vec<Option<Row>> {
        let set = |mut row: Row| {
            row.state = SlotState { temperature: 1.0, top_k: 50, top_p: 0.9, logprobs: 2, ..row.state };
            row
        };
        (0..count).map(|_| Some(set(Row::random(&mut random, vocab)))).collect()
    };
    let (one, many) = (rows(152_064, 1), rows(500, MAX_DECODE_ROWS as usize));
    for device in devices() {
        run_and_check(&device, &traits(152_064, 400), 8, &one, "152,064 logits");
        run_and_check(&device, &traits(500, 0), 1, &many, "64 rows");
    }
}

/// s1's known bug: at temperature 1 it draws ids that no tokenizer knows (s1-notes 1.3).
#[test]
fn padded_rows_of_the_vocabulary_are_never_drawn() {
    for device in devices() {
        let rows: Vec<_> = (0..2)
            .map(|i| {
                let mut row = Row::new((0..500).map(|id| if id < 480 { 0.0 } else { 30.0 }).collect());
                row.state.temperature = i as f32;
                row.state.seed_low = i;
                row.state.logprobs = 4;
                row.bias = vec![(499, 100.0)];
                Some(row)
            })
            .collect();
        for record in run_and_check(&device, &traits(500, 20), 2, &rows, "padded rows") {
            assert!(record.token < 480 && record.top_ids[..4].iter().all(|&id| id < 480));
        }
    }
}

#[test]
fn a_draw_depends_on_seed_and_position_alone() {
    let mut random = Random(5);
    let vocab = 700;
    let rows: Vec<_> = (0..8).map(|_| Some(Row::random(&mut random, vocab))).collect();
    let device = fast_device();
    let tokens = |records: &[TokenRecord]| records.iter().map(|r| r.token).collect::<Vec<_>>();
    let alone: Vec<i32> = rows
        .iter()
        .map(|row| run_and_check(&device, &traits(vocab, 9), 1, std::slice::from_ref(row), "alone")[0].token)
        .collect();
    for cluster in [1, 2, 4, 8] {
        let mut rows = rows.clone();
        assert_eq!(tokens(&run_and_check(&device, &traits(vocab, 9), cluster, &rows, "together")), alone);
        rows.reverse();
        let mut backwards = tokens(&run_and_check(&device, &traits(vocab, 9), cluster, &rows, "reversed"));
        backwards.reverse();
        assert_eq!(backwards, alone);
    }
}

#[test]
fn logits_that_leave_nothing_to_draw_end_the_sequence_with_an_error() {
    let spoil = |set: &dyn Fn(&mut Row)| {
        let mut row = Row::new((0..500).map(|id| (id % 7) as f32).collect());
        row.state.temperature = 1.0;
        row.state.logprobs = 5;
        set(&mut row);
        Some(row)
    };
    let rows = [
        spoil(&|row| row.logits[333] = f32::NAN),
        spoil(&|row| row.logits[0] = f32::INFINITY),
        spoil(&|row| row.logits.fill(f32::NEG_INFINITY)),
        spoil(&|row| row.logits.fill(f32::NAN)),
        spoil(&|row| {
            row.state.flags |= SLOT_ALLOWED_MASK;
            row.allowed.fill(false);
            row.allowed[4] = true;
            (row.state.stop_count, row.state.stop_ids[0], row.state.min_generated) = (1, 4, 9);
        }),
        spoil(&|_| ()),
        spoil(&|row| row.logits[3] = f32::NEG_INFINITY),
        spoil(&|row| row.logits[3] = f32::NAN),
    ];
    for device in devices() {
        for (cluster, rows) in [(1, &rows[4..]), (2, &rows[..])] {
            let bench = Bench::new(&device, &traits(500, 0), cluster, rows);
            let records = bench.step();
            for (i, record) in records.iter().enumerate() {
                let slot = bench.slot(i);
                let is_bad = ![5, 6].contains(&(i + 8 - rows.len()));
                assert_eq!(record.finish == FINISH_ERROR, is_bad, "row {i}");
                assert_eq!((record.serial, record.slot), (7, i as u32 + 1));
                assert_eq!(record.flags & TOKEN_VALID, TOKEN_VALID);
                assert_eq!(slot.finish, record.finish);
                assert_eq!(slot.flags & SLOT_ACTIVE == 0, is_bad);
                assert_eq!((slot.generated, slot.length), if is_bad { (0, 10) } else { (1, 11) });
            }
            // And then they are not active.
            assert!(
                bench.step().iter().enumerate().all(|(i, r)| (r.flags == 0) != [5, 6].contains(&(i + 8 - rows.len())))
            );
        }
    }
}

#[test]
fn the_ring_wraps_and_so_does_its_head() {
    let mut random = Random(6);
    let mut rows = random_rows(&mut random, 64, 4);
    let state = SlotState { seed_low: 3, temperature: 1.0, ..Row::new(Vec::new()).state };
    rows[0] = Some(Row { state, ..Row::new((0..64).map(|id| id as f32 / 16.0).collect()) });
    let bench = Bench::new(&fast_device(), &traits(64, 0), 2, &rows);
    for start in [0, u32::MAX - 2] {
        bench.start_at(start);
        for i in 0..RING_STEPS + 3 {
            let before = bench.slot(0);
            let ring = bench.ring();
            let record = bench.step()[0];
            let row = Row { state: before, ..rows[0].clone().unwrap() };
            check(
                &row,
                &traits(64, 0),
                1,
                &record,
                &bench.slot(0),
                &bench.counts(0),
                &format!("step {i} after {start}"),
            );
            // Nothing but the step's own entry is written.
            let (mut expected, after) = (ring, bench.ring());
            let at = (start.wrapping_add(i) % RING_STEPS) as usize;
            (expected.head, expected.rows[at]) = (after.head, after.rows[at]);
            expected.records[at][..4].copy_from_slice(&after.records[at][..4]);
            assert!(bytemuck::bytes_of(&*expected) == bytemuck::bytes_of(&*after), "step {i} after {start}");
        }
    }
}

/// Chi-square over many seeds and positions, with and without truncation.
#[test]
fn draws_follow_the_distribution_that_is_left() {
    let mut random = Random(7);
    let device = fast_device();
    for (temperature, top_k, top_p, min_p) in [(1.0, 0, 1.0, 0.0), (0.7, 12, 0.9, 0.0), (2.0, 25, 0.97, 0.1)] {
        let logits: Vec<f32> = (0..40).map(|_| random.below(200) as f32 / 64.0).collect();
        let rows: Vec<_> = (0..16)
            .map(|_| {
                let mut row = Row::new(logits.clone());
                let s = &mut row.state;
                (s.temperature, s.top_k, s.top_p, s.min_p) = (temperature, top_k, top_p, min_p);
                (s.seed_low, s.seed_high) = (random.next() as u32, random.next() as u32);
                Some(row)
            })
            .collect();
        let row = rows[0].as_ref().unwrap();
        let kept = kept(&adjusted(row, &traits(40, 0)), row);
        let total: f64 = kept.iter().map(|c| (-c.distance).exp()).sum();
        let bench = Bench::new(&device, &traits(40, 0), 1, &rows);
        let mut seen = [0.0; 40];
        let mut draws = 0.0;
        for _ in 0..4 {
            for _ in 0..RING_STEPS {
                device.launch(&bench.launch).unwrap();
            }
            for record in bench.ring().records.iter().flat_map(|step| &step[..rows.len()]) {
                seen[record.token as usize] += 1.0;
                draws += 1.0;
            }
        }
        let square: f64 = kept
            .iter()
            .map(|c| {
                let expected = draws * (-c.distance).exp() / total;
                (seen[c.id] - expected).powi(2) / expected
            })
            .sum();
        assert_eq!(kept.iter().map(|c| seen[c.id]).sum::<f64>(), draws, "nothing else is drawn");
        // Mean n - 1, variance 2 (n - 1); 4 standard deviations, and some for the skew.
        let freedom = kept.len() as f64 - 1.0;
        let limit = freedom + 4.0 * (2.0 * freedom).sqrt() + 8.0;
        assert!(square < limit, "chi-square {square} of {freedom} degrees of freedom");
    }
}
