//! What the prefix cache knows, told to routers over ZeroMQ in vLLM's format: messages of three frames (topic, number, batch), a
//! batch in MessagePack as an array of time, events and rank, an event as a map. Nobody who listens, or does not, holds up anybody.

use crate::blocks::{CacheChange, CacheWatcher};
use crate::kernels::params::PAGE_TOKENS;
use crate::{Error, Result};
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc::{Receiver, channel as queue};
use zeromq::{PubSocket, Socket, SocketSend, ZmqMessage};

/// Changes that wait to be told.
const MOST_WAITING: usize = 100_000;
/// Changes in one message.
const MOST_AT_ONCE: usize = 1000;

/// What the engine tells and the socket has not been given yet.
pub struct Changes {
    queue: Receiver<CacheChange>,
    /// More came than wait here.
    lost: Arc<AtomicBool>,
}

/// What the engine calls, and where its changes come out.
pub fn channel() -> (CacheWatcher, Changes) {
    let (sender, receiver) = queue(MOST_WAITING);
    let lost = Arc::new(AtomicBool::new(false));
    let too_much = lost.clone();
    let watcher = Box::new(move |change| {
        if sender.try_send(change).is_err() {
            too_much.store(true, Ordering::Relaxed);
        }
    });
    (watcher, Changes { queue: receiver, lost })
}

#[derive(Serialize)]
#[serde(tag = "type")]
enum Event {
    BlockStored {
        block_hashes: [u64; 1],
        parent_block_hash: Option<u64>,
        token_ids: Vec<u32>,
        block_size: u32,
        lora_id: Option<u32>,
        medium: &'static str,
        lora_name: Option<&'static str>,
    },
    BlockRemoved {
        block_hashes: [u64; 1],
        medium: &'static str,
    },
    AllBlocksCleared,
}

const MEDIUM: &str = "GPU";

impl From<CacheChange> for Event {
    fn from(change: CacheChange) -> Event {
        match change {
            CacheChange::Stored { hash, parent, tokens } => Event::BlockStored {
                block_hashes: [hash.short()],
                parent_block_hash: parent.map(|parent| parent.short()),
                token_ids: tokens,
                block_size: PAGE_TOKENS,
                lora_id: None,
                medium: MEDIUM,
                lora_name: None,
            },
            CacheChange::Removed { hash } => Event::BlockRemoved { block_hashes: [hash.short()], medium: MEDIUM },
        }
    }
}

pub struct KvEvents {
    socket: PubSocket,
    /// Of the next message.
    number: u64,
}

impl KvEvents {
    /// # Errors
    /// An address that is none, or is taken.
    pub async fn bind(address: &str) -> Result<KvEvents> {
        let mut socket = PubSocket::new();
        let bound = socket.bind(address).await;
        let bound = bound.map_err(|e| Error::Usage(format!("cannot tell KV events at {address}: {e}")))?;
        tracing::info!("KV events at {bound}");
        Ok(KvEvents { socket, number: 0 })
    }

    /// Until the engine has gone.
    pub async fn publish(mut self, mut changes: Changes) {
        let mut some = Vec::new();
        while changes.queue.recv_many(&mut some, MOST_AT_ONCE).await > 0 {
            self.send(some.drain(..).map(Event::from).collect()).await;
            // Who does not know all is better off with nothing.
            if changes.queue.is_empty() && changes.lost.swap(false, Ordering::Relaxed) {
                self.send(vec![Event::AllBlocksCleared]).await;
            }
        }
    }

    async fn send(&mut self, events: Vec<Event>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        let batch = rmp_serde::to_vec_named(&(now, events, 0)).expect("plain values");
        let mut message = ZmqMessage::from(Vec::new());
        message.push_back(self.number.to_be_bytes().to_vec().into());
        message.push_back(batch.into());
        self.number += 1;
        // Who listens no more is nobody's problem.
        let _ = self.socket.send(message).await;
    }
}
