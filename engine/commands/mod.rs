//! The commands of the `ponder` binary: each reads its flags, drives an engine and prints.

mod chat;
mod generate;
mod inspect;
mod output;
mod profile;

use crate::Result;
use crate::args::{Args, Command, ModelArgs};
use crate::checkpoint::Checkpoint;
use crate::device::{Device, DeviceChoice};
use crate::engine::Engine;
use crate::executor::ExecutorOptions;
use crate::frontend::Frontend;
use crate::telemetry::Telemetry;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Inspect(args) => inspect::run(&args),
    }
}

/// Everything but the weights: what is wrong with flags, model folder or device is said before they load.
fn open(args: &ModelArgs) -> Result<(Frontend, Checkpoint, Device)> {
    let choice = args.device.parse()?;
    let frontend = Frontend::open(&args.path, &args.thinking())?;
    let checkpoint = Checkpoint::open(&args.path)?;
    Ok((frontend, checkpoint, Device::open(choice)?))
}

/// Loads the weights, with a progress bar if somebody is watching.
fn load(frontend: Frontend, checkpoint: &Checkpoint, device: &Device, options: &ExecutorOptions) -> Result<Engine> {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("loading {bar:40} {bytes} of {total_bytes}, {bytes_per_sec}");
    bar.set_style(style.expect("a valid template"));
    let engine = Engine::new(frontend, checkpoint, device, options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    engine
}

fn options(args: &ModelArgs) -> ExecutorOptions {
    ExecutorOptions {
        max_context: args.max_context,
        pages: args.kv_pages,
        graphs: !args.no_graphs,
        ..ExecutorOptions::default()
    }
}

/// What the driver knows of the GPU in use; none on the host target.
fn telemetry(args: &ModelArgs, device: &Device) -> Option<Telemetry> {
    match args.device.parse() {
        Ok(DeviceChoice::Cuda(ordinal)) => Telemetry::open(ordinal),
        _ if device.is_host() => None,
        _ => Telemetry::open(0),
    }
}
