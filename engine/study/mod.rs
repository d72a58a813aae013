//! Studies of how thinking budgets and inference techniques behave: tasks and graders, sweeps, metrics, reports with plots. Each
//! writes a folder, appends every answer to a file there as soon as it is known, and goes on from that file when started again.
//! Prints nothing but progress.

pub mod ablation;
pub mod ask;
pub mod curate;
pub mod folder;
pub mod grade;
pub mod metrics;
pub mod plot;
pub mod random;
pub mod scaling;
pub mod tasks;
