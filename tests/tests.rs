//! One integration binary; a module per subject.

mod layout;
mod loading;
mod random;
mod scheduler;
mod sequence;
