//! `ponder serve`: the model over HTTP, until a signal ends it.

use crate::args::ServeArgs;
use crate::server::kv_events::{self, KvEvents};
use crate::server::{self, EffortTable, ServerState, Settings, Traces};
use crate::{Error, Result, Service, hub};
use std::io::IsTerminal;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

pub fn run(args: &ServeArgs) -> Result<()> {
    log(args.log_json);
    let (frontend, checkpoint, device) = super::open(&args.model)?;
    // Before the weights load: the port may be taken.
    let address = (args.host.as_str(), args.port);
    let listener = std::net::TcpListener::bind(address)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .map_err(|e| {
            Error::Usage(format!("cannot listen at {}:{}: {e}: choose another --port", args.host, args.port))
        })?;
    let settings = settings(args)?;
    let traces = settings.traces.clone();
    let telemetry = super::telemetry(&args.model.source, &device);
    let mut engine = super::load(frontend, checkpoint.as_ref(), &device, &super::options(&args.model))?;
    let changes = args.kv_events.is_some().then(|| {
        let (watcher, changes) = kv_events::channel();
        engine.watch_cache(watcher);
        changes
    });
    let loopback = listener.local_addr().is_ok_and(|address| address.ip().is_loopback());
    let state = ServerState::new(Service::start(engine), telemetry, Settings { loopback, ..settings });
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Error::Output)?;
    let served = runtime.block_on(async {
        let listener = TcpListener::from_std(listener).map_err(Error::Output)?;
        let local = listener.local_addr().map_err(Error::Output)?;
        if !state.settings.loopback && state.settings.api_key.is_none() {
            tracing::warn!("everybody who can reach {local} may ask: set --api-key");
        }
        if let (Some(address), Some(changes)) = (&args.kv_events, changes) {
            tokio::spawn(KvEvents::bind(address).await?.publish(changes));
        }
        tracing::info!(model = state.settings.model_name, "listening at http://{local}");
        server::serve(listener, state, signalled()).await
    });
    // Requests that were cut off are told in spans, too.
    drop(runtime);
    traces.iter().for_each(Traces::finish);
    served
}

fn settings(args: &ServeArgs) -> Result<Settings> {
    let mut efforts = EffortTable::default();
    for (name, budget) in &args.reasoning_effort {
        efforts.set(name.clone(), *budget);
    }
    let model_name = args.served_model_name.clone().unwrap_or_else(|| hub::model_name(&args.model.source.path));
    let to = |collector: &String| Traces::to(collector, &model_name);
    Ok(Settings {
        traces: args.otlp_traces_endpoint.as_ref().map(to).transpose()?,
        model_name,
        api_key: args.api_key.clone(),
        max_body: args.max_body as usize,
        max_answers: args.max_answers,
        max_connections: args.max_connections as usize,
        request_timeout: Duration::from_secs(args.request_timeout),
        shutdown_timeout: Duration::from_secs(args.shutdown_timeout),
        efforts,
        ..Settings::default()
    })
}

/// RUST_LOG says how much; by default what an operator should know.
fn log(json: bool) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let log = log.with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none());
    match json {
        true => log.json().init(),
        false => log.with_target(false).init(),
    }
}

/// SIGTERM or Ctrl-C.
async fn signalled() {
    let mut terminate = signal(SignalKind::terminate()).expect("signals can be listened to");
    let mut interrupt = signal(SignalKind::interrupt()).expect("signals can be listened to");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("ending: requests under way are finished first; a second signal ends at once");
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        std::process::exit(1);
    });
}
