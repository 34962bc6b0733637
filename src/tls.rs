//! TLS as a client: what the agent and the admin commands dial with.

use std::{io, sync::Arc};

use hyper_rustls::ConfigBuilderExt;
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs};

/// Trusts this machine's roots if `https`; else none, so that plain HTTP works on a machine that has none. The error is
/// that they cannot be read.
pub(crate) fn client_config(https: bool) -> io::Result<ClientConfig> {
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?;
    let config = match https {
        true => config.with_native_roots()?,
        false => config.with_root_certificates(RootCertStore::empty()),
    };
    Ok(config.with_no_client_auth())
}
