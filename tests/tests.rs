//! One integration binary; a module per subject.

mod layout;
mod random;
mod scheduler;
