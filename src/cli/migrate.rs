//! `adit migrate`: brings the registry's database to this version and ends, for those who do that before a roll-out.

use std::{io::Write, path::PathBuf, time::Duration};

use clap::Args;

use super::{Given, file, given, parsed, set};
use crate::{
    cluster::store::{SchemaVersion, Store},
    config::{RelayConfig, values},
    secret::Secret,
};

/// Bring the registry's database to this version of adit, and exit
///
/// `adit serve` does the same when it starts: this is for doing it before. Relays of the version before may go on
/// running meanwhile. A database that a newer version has changed is left as it is.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// The relay's file, which may name the database [default: none]
    #[arg(long, env = "ADIT_CONFIG", value_name = "FILE", value_parser = parsed::<PathBuf>)]
    config: Option<Given<PathBuf>>,
    /// The registry: sqlite:FILE or mysql://user:password@host/adit [default: sqlite:adit.db]
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true, value_parser = parsed::<Secret>)]
    database_url: Option<Given<Secret>>,
    /// How long to wait for a database that does not answer yet [default: 30s]
    #[arg(long, env = "ADIT_DATABASE_WAIT", value_name = "DURATION", value_parser = given(values::duration))]
    wait: Option<Given<Duration>>,
}

impl MigrateArgs {
    /// The database, and how long to wait for it: flag or environment over the file over the default.
    pub fn database(&self) -> anyhow::Result<(Secret, Duration)> {
        let mut config = match file(&self.config) {
            Some(path) => RelayConfig::load(path)?,
            None => RelayConfig::default(),
        };
        set(&mut config.database_url, &self.database_url);
        set(&mut config.database_wait, &self.wait);
        config.validate()?;
        Ok((config.database_url, config.database_wait))
    }
}

/// Does it, and prints what the database is at.
pub(super) async fn run(database_url: Secret, wait: Duration) -> anyhow::Result<()> {
    let store = Store::open_within(database_url.expose(), wait).await?;
    let SchemaVersion { found, known } = store.schema_version().await?;
    store.close().await;
    let mut out = std::io::stdout();
    if found > known {
        writeln!(
            out,
            "the database is at version {found}, newer than this adit's {known}: left as it is"
        )?;
    } else {
        writeln!(out, "the database is at version {found}, as this adit needs it")?;
    }
    Ok(())
}
