//! One integration binary; a module per subject.

mod attention;
#[cfg(feature = "cuda")]
mod cuda;
mod devices;
mod layout;
mod loading;
mod norms;
mod products;
mod random;
mod reference;
#[cfg(feature = "cuda")]
mod resources;
mod sampler;
mod scheduler;
mod sequence;
mod simt;
