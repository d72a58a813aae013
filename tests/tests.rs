//! One integration binary; a module per subject.

mod attention;
mod devices;
mod layout;
mod loading;
mod random;
#[cfg(feature = "cuda")]
mod resources;
mod scheduler;
mod sequence;
