//! The binary: parses, sets up logs and the runtime, runs, and turns what went wrong into a sentence and an exit code.

use std::{process::ExitCode, time::Duration};

use adit::{
    cli::{Cli, Plan},
    config::LogConfig,
    telemetry::{self, Traces},
};
use clap::Parser;

/// The configuration is wrong: nothing was opened or started. What clap exits with, too.
const BAD_CONFIG: u8 = 2;
/// It was started and failed.
const FAILED: u8 = 1;
/// How long a blocking call still in progress (a name look-up) may hold the exit up.
const LINGER: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let (log, plan) = match Cli::parse().plan() {
        Ok(planned) => planned,
        Err(error) => return failed(&error, BAD_CONFIG),
    };
    match run(&log, plan) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error, FAILED),
    }
}

fn run(log: &LogConfig, plan: Plan) -> anyhow::Result<()> {
    // Named, so that a dependency that brings another TLS provider cannot make the choice ambiguous, which panics.
    // An error means that one is installed already, which is as good.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let traces = {
        let _inside = runtime.enter(); // where the collector is called from
        plan.service().map(Traces::from_env).transpose()?.flatten()
    };
    telemetry::init(log.format, &log.filter, traces.as_ref())?;
    let ended = runtime.block_on(async {
        let ended = plan.run().await;
        if let Some(traces) = traces {
            traces.end().await;
        }
        ended
    });
    runtime.shutdown_timeout(LINGER);
    ended
}

/// Says what went wrong and why, as one sentence.
fn failed(error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("adit: {error:#}");
    ExitCode::from(code)
}
