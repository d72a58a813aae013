//! Ponder: LLM inference with budget forcing on hand-written Hopper kernels.
//!
//! Two halves that share only [`batch`]: logic (requests, sequences, pages; never sees a device) and compute (devices,
//! kernels, the model; never sees a request). `engine` is where they meet. See ARCHITECTURE.md.

pub mod args;
pub mod batch;
pub mod bench;
pub mod blocks;
pub mod budget;
pub mod chat;
pub mod checkpoint;
pub mod commands;
pub mod config;
pub mod device;
pub mod engine;
pub mod error;
pub mod executor;
pub mod frontend;
pub mod guide;
pub mod hub;
pub mod kernels;
pub mod kv_cache;
pub mod loader;
pub mod model;
pub mod ops;
pub mod rope;
pub mod sampling;
pub mod scheduler;
pub mod scoring;
pub mod sequence;
pub mod server;
pub mod service;
pub mod simulator;
pub mod slots;
pub mod steering;
pub mod stepper;
pub mod structured;
pub mod study;
pub mod telemetry;
pub mod thinking;
pub mod tiles;
pub mod tiling;
pub mod tokenizer;

pub use engine::Engine;
pub use error::{Error, Result};
pub use frontend::Request;
pub use service::Service;
