//! RMS norm, and the embedding that begins the residual stream.

use crate::devices::{devices, download, upload};
use crate::random::Random;
use crate::reference::rms_norm;
use half::bf16;
use ponder::device::{Device, Launch};
use ponder::kernels::params::{EmbedParams, NORM_SHARED, NormParams, SLOT_ACTIVE, SlotState};
use ponder::kernels::{EMBED, RMS_NORM};

const EPS: f32 = 1e-6;

fn values(random: &mut Random, count: usize) -> Vec<bf16> {
    (0..count).map(|_| bf16::from_f32(random.below(1 << 20) as f32 / (1 << 18) as f32 - 2.0)).collect()
}

fn wide(v: &[bf16]) -> Vec<f64> {
    v.iter().map(|x| x.to_f64()).collect()
}

/// Two roundings to bf16, each of which may fall to the other side of a tie: 2^-8 of the value each.
fn check(got: &[bf16], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got.to_f64() - want).abs() <= want.abs() / 128.0, "{what}: {i}: {got} but {want} is right");
    }
}

#[test]
fn rms_norm_takes_the_rows_it_is_told_to() {
    for device in devices() {
        let mut random = Random(11);
        for hidden in [8, 256, 1000, 8192] {
            let (x, weight) = (values(&mut random, 5 * hidden), values(&mut random, hidden));
            for index in [None, Some([4, 0, 4])] {
                let rows: Vec<usize> = index.map_or((0..5).collect(), |i| i.map(|r| r as usize).to_vec());
                let out = device.alloc(rows.len() * hidden * 2).unwrap();
                let (x_buffer, weight_buffer) = (upload(&device, &x), upload(&device, &weight));
                let index_buffer = upload(&device, &index.unwrap_or_default());
                let params = NormParams {
                    x: x_buffer.pointer(),
                    weight: weight_buffer.pointer(),
                    row_index: if index.is_some() { index_buffer.pointer() } else { std::ptr::null() },
                    out: out.pointer(),
                    rows: rows.len() as i32,
                    hidden: hidden as i32,
                    eps: EPS,
                    ..Default::default()
                };
                let launch = RMS_NORM.launch([params.rows as u32, 1, 1], params);
                device.launch(&Launch { shared_bytes: NORM_SHARED, pdl: true, ..launch }).unwrap();
                let row = |&r: &usize| rms_norm(&wide(&x[r * hidden..][..hidden]), &weight, EPS);
                let truth: Vec<f64> = rows.iter().flat_map(row).collect();
                check(&download::<bf16>(&device, &out), &truth, &format!("{}, hidden {hidden}", device.describe()));
            }
        }
    }
}

struct Embedding {
    table: Vec<bf16>,
    hidden: usize,
}

impl Embedding {
    fn row(&self, token: i32) -> &[bf16] {
        &self.table[token as usize * self.hidden..][..self.hidden]
    }

    /// Positions, embeddings [rows][hidden], and sums of squares [rows][hidden / 64].
    fn run(
        &self,
        device: &Device,
        slots: &[SlotState],
        row_slot: &[i32],
        prompt: Option<(&[i32], &[i32])>,
    ) -> (Vec<i32>, Vec<bf16>, Vec<f32>) {
        let (table, slots, row_slot_buffer) =
            (upload(device, &self.table), upload(device, slots), upload(device, row_slot));
        let (token, position) = prompt.unwrap_or_default();
        let (token_buffer, position_buffer) = (upload(device, token), upload(device, position));
        let row_position = device.alloc(row_slot.len() * 4).unwrap();
        let out = device.alloc(row_slot.len() * self.hidden * 2).unwrap();
        let squares = device.alloc(row_slot.len() * (self.hidden / 64) * 4).unwrap();
        let params = EmbedParams {
            table: table.pointer(),
            slots: slots.pointer(),
            row_slot: row_slot_buffer.pointer(),
            prompt_token: if prompt.is_some() { token_buffer.pointer() } else { std::ptr::null() },
            prompt_position: if prompt.is_some() { position_buffer.pointer() } else { std::ptr::null() },
            row_position: row_position.pointer(),
            out: out.pointer(),
            squares: if prompt.is_some() { std::ptr::null_mut() } else { squares.pointer() },
            rows: row_slot.len() as i32,
            hidden: self.hidden as i32,
            vocab: (self.table.len() / self.hidden) as i32,
            ..Default::default()
        };
        device.launch(&Launch { pdl: true, ..EMBED.launch([row_slot.len() as u32, 1, 1], params) }).unwrap();
        (download(device, &row_position), download(device, &out), download(device, &squares))
    }
}

#[test]
fn embed_follows_the_slots_in_decode_and_the_prompt_in_prefill() {
    let hidden = 1088;
    let embedding = Embedding { table: values(&mut Random(13), 11 * hidden), hidden };
    let mut slots = vec![SlotState::default(); 4];
    slots[1] = SlotState { flags: SLOT_ACTIVE, last_token: 10, length: 7, ..Default::default() };
    slots[2] = SlotState { flags: 0, last_token: 3, length: 9, ..Default::default() };
    slots[3] = SlotState { flags: SLOT_ACTIVE, last_token: 11, length: 1, ..Default::default() };
    for device in devices() {
        let (position, out, squares) = embedding.run(&device, &slots, &[2, 1, 0, 3], None);
        assert_eq!(position, [-1, 6, -1, 0], "{}", device.describe());
        let zeros = vec![bf16::ZERO; hidden];
        let rows: Vec<_> = out.chunks(hidden).collect();
        assert_eq!(rows[..3], [&zeros[..], embedding.row(10), &zeros[..]]);
        for (part, values) in squares.iter().zip(out.chunks(64)).take(3 * hidden / 64) {
            let truth: f64 = wide(values).iter().map(|x| x * x).sum();
            assert!((f64::from(*part) - truth).abs() <= 1e-6 * truth, "{part} but {truth} is right");
        }
        assert!(rows[3].iter().all(|x| x.is_nan()), "token 11 of 11 is out of bounds, and its row not NaN");

        let prompt: (&[i32], &[i32]) = (&[0, 5, -1, 5], &[12, 0, 3, -1]);
        let (position, out, _) = embedding.run(&device, &slots, &[1, 1, 2, 0], Some(prompt));
        assert_eq!(position, prompt.1);
        let rows: Vec<_> = out.chunks(hidden).collect();
        assert_eq!((rows[0], rows[1], rows[3]), (embedding.row(0), embedding.row(5), &zeros[..]));
        assert!(rows[2].iter().all(|x| x.is_nan()));
    }
}
