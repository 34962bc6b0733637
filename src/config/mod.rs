//! What an operator may set: the relay's and the agent's configuration, read from TOML, checked, and named in errors.
//!
//! A flag wins over its environment variable, that over the file, and the file over the default. Here are the file and
//! the default; `cli` lays flags and environment over them. Nothing here opens a socket.

pub mod agent;
pub mod relay;
pub mod upstream;
pub mod url;
pub mod values;

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

pub use agent::{AgentConfig, AgentFile, TunnelConfig, TunnelFile};
pub use relay::{CorsConfig, HttpConfig, LimitsConfig, LogConfig, RelayConfig, TlsConfig, TunnelsConfig};
pub use upstream::{HostHeader, UpstreamUrl};
pub use url::{Domain, RelayUrl};
pub use values::Invalid;

/// Why a configuration is not accepted: a sentence that names the file or the key, and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not there or not readable.
    #[error("cannot read the configuration file `{}`", path.display())]
    Read {
        /// The file asked for.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not TOML, or has a key or a value that it may not have. The text names the key.
    #[error("configuration file `{}`: {detail}", path.display())]
    File {
        /// The file read.
        path: PathBuf,
        /// What is wrong, with the place or the key.
        detail: String,
    },
    /// A value that is not acceptable, wherever it came from.
    #[error("`{key}` {why}")]
    Key {
        /// The key as the file spells it, with its table: `http.max_target`.
        key: &'static str,
        /// What is wrong with the value, and what to write instead.
        why: String,
    },
    /// Something needed was given nowhere; the text says where it can be given.
    #[error("{0}")]
    Missing(String),
}

/// Refuses the value of `key` unless `holds`.
fn check(holds: bool, key: &'static str, why: &str) -> Result<(), ConfigError> {
    if holds {
        return Ok(());
    }
    let why = why.to_owned();
    Err(ConfigError::Key { key, why })
}

/// Reads a TOML file.
fn read_table(path: &Path) -> Result<toml::Table, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    text.parse().map_err(|error| syntax_error(path, &text, &error))
}

/// Makes the typed configuration of a table that came (in part) from the file `path`.
fn from_table<T: DeserializeOwned>(table: toml::Table, path: &Path) -> Result<T, ConfigError> {
    table.try_into().map_err(|error| ConfigError::File {
        path: path.to_owned(),
        detail: error.to_string().trim_end().replace("\nin `", " in `"),
    })
}

/// By line, and without the line itself as `toml` would print it: it may hold a secret.
fn syntax_error(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let before = error
        .span()
        .and_then(|span| text.as_bytes().get(..span.start))
        .unwrap_or_default();
    let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
    ConfigError::File {
        path: path.to_owned(),
        detail: format!("line {line} is not TOML: {}", error.message()),
    }
}

/// Lays `over` upon `base`: tables are joined key by key, anything else is replaced.
fn overlay(base: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(below)), toml::Value::Table(above)) => overlay(below, above),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_toml_is_refused_by_line_and_not_quoted() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "listen = \"0.0.0.0:80\"\n\nadmin_token = \"hunter2\n").expect("written");
        let refused = RelayConfig::load(file.path()).expect_err("no end of text").to_string();
        assert!(refused.contains("line 3") && !refused.contains("hunter2"), "{refused}");
    }

    #[test]
    fn tables_are_joined_and_the_rest_replaced() {
        let mut base: toml::Table = "a = [1]\n[t]\nx = 1\ny = 1".parse().expect("TOML");
        overlay(&mut base, "a = [2]\n[t]\ny = 2".parse().expect("TOML"));
        assert_eq!(base, "a = [2]\n[t]\nx = 1\ny = 2".parse().expect("TOML"));
    }
}
