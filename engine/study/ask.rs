//! Many requests at once through an engine, and what to do with each answer as soon as it is complete.

use crate::Result;
use crate::engine::Engine;
use crate::frontend::Request;
use crate::sequence::Answer;
use std::collections::HashMap;

/// Requests that wait beside those that run, so that a seat is never empty.
const AHEAD: usize = 64;

/// `done` hears of each answer by the key of its request, in the order in which they end.
///
/// # Errors
/// A request that can never be served, a device that fails, or what `done` says.
pub fn ask<Key>(
    engine: &mut Engine,
    requests: impl IntoIterator<Item = Result<(Key, Request)>>,
    mut done: impl FnMut(Key, Answer) -> Result<()>,
) -> Result<()> {
    let mut requests = requests.into_iter();
    let mut open = HashMap::new();
    loop {
        while engine.stats().waiting < AHEAD {
            let Some(request) = requests.next() else { break };
            let (key, request) = request?;
            open.insert(engine.submit(&request)?, (key, Answer::default()));
        }
        if open.is_empty() {
            return Ok(());
        }
        for update in engine.step()? {
            let (_, answer) = open.get_mut(&update.request).expect("updates are of open requests");
            answer.extend(update.token, update.text, update.finish);
            if update.finish.is_some() {
                let (key, answer) = open.remove(&update.request).expect("it is open");
                done(key, answer)?;
            }
        }
    }
}
