//! How likely the tokens of a prompt were, from the logits of the rows before them. On the host, because few ask for it: a row takes
//! it as long as a pass over the vocabulary. Knows no device.

use crate::batch::Score;

/// `logits`: [next.len()][vocab], of the rows whose next tokens are known. Rows are spread over the cores.
pub fn scores(logits: &[f32], next: &[u32], top: u32) -> Vec<Score> {
    let vocab = logits.len() / next.len();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(next.len());
    let share = next.len().div_ceil(threads);
    let judge = |(logits, next): (&[f32], &[u32])| -> Vec<Score> {
        logits.chunks_exact(vocab).zip(next).map(|(row, &token)| score(row, token, top as usize)).collect()
    };
    std::thread::scope(|scope| {
        let shares = logits.chunks(share * vocab).zip(next.chunks(share));
        let threads: Vec<_> = shares.map(|share| scope.spawn(move || judge(share))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("it only calculates")).collect()
    })
}

fn score(row: &[f32], token: u32, top: usize) -> Score {
    let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&logit| f64::from(logit - highest).exp()).sum();
    let log_sum = highest + sum.ln() as f32;
    let own = row[token as usize];
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(top + 1);
    for (id, &logit) in row.iter().enumerate() {
        if top > 0 && (best.len() < top || best[top - 1].1 < logit) {
            // Of equals the lower id is first, as in the sampler.
            let at = best.partition_point(|&(_, other)| other >= logit);
            best.insert(at, (id as u32, logit));
            best.truncate(top);
        }
    }
    Score {
        token,
        logprob: own - log_sum,
        rank: 1 + row.iter().filter(|&&logit| logit > own).count() as u32,
        top: best.into_iter().map(|(id, logit)| (id, logit - log_sum)).collect(),
    }
}
