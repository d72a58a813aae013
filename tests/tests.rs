//! One integration binary; a module per subject.

mod random;
mod scheduler;
