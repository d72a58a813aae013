//! One integration binary; a module per subject.

mod attention;
mod bench;
mod blocks;
mod budget;
mod cli;
mod clients;
#[cfg(feature = "cuda")]
mod cuda;
mod decode_loop;
mod devices;
mod engine;
mod families;
mod fp8_checkpoints;
mod fp8_kv;
mod fp8_products;
mod guide;
mod harnesses;
#[cfg(feature = "hub")]
mod hub;
mod kernel_docs;
mod layout;
mod loading;
mod memory;
mod model;
mod modulo;
mod norms;
mod parity;
mod products;
mod random;
mod reference;
mod requests;
#[cfg(feature = "cuda")]
mod resources;
mod robustness;
mod sampler;
mod scale_out;
mod scheduler;
mod scripts;
mod sequence;
mod server;
mod service;
mod simt;
mod simulator;
mod structured;
mod study;
mod techniques;
mod tools;
mod traces;
