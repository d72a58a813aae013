//! Random numbers of studies: splitmix64, the same on every machine for the same seed.

#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// One for each subject, so that what one draws does not shift another's.
    pub fn of(seed: u64, subject: &str) -> Random {
        let hash = blake3::hash(subject.as_bytes());
        let word = u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"));
        Random(seed ^ word)
    }

    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 .. n, each as likely up to 2^-64 n.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "nothing to draw from");
        ((u128::from(self.word()) * n as u128) >> 64) as usize
    }

    /// 0 .. 1, 53 bits.
    pub fn unit(&mut self) -> f64 {
        (self.word() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}
