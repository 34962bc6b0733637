//! `adit token`: make, list and revoke a client's access tokens.

use anyhow::Context;
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    admin_api::{AdminApi, AdminArgs, Said},
    client::ago,
};
use crate::{
    cluster::{now_ms, registry::TokenRow},
    ids::{ClientId, TokenId},
};

/// Make, list and revoke a client's access tokens
#[derive(clap::Args, Debug)]
pub struct TokenCommand {
    #[command(flatten)]
    admin: AdminArgs,
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand, Debug)]
enum Action {
    /// Make one more token; it goes to stdout, this once
    Create {
        /// The client
        name: ClientId,
        /// What to call the token, so that you know later which one to revoke
        #[arg(long)]
        label: Option<String>,
    },
    /// List a client's tokens (never their secrets)
    List {
        /// The client
        name: ClientId,
    },
    /// Revoke a token: the tunnels that it opened are closed
    Revoke {
        /// The client
        name: ClientId,
        /// As `adit token list` shows it
        token_id: TokenId,
    },
}

#[derive(Deserialize)]
struct List {
    tokens: Vec<TokenRow>,
}

impl TokenCommand {
    /// Does it, and says what came of it.
    pub async fn run(self) -> anyhow::Result<()> {
        let api = AdminApi::new(self.admin)?;
        self.action.run(&api).await?.print();
        Ok(())
    }
}

impl Action {
    async fn run(self, api: &AdminApi) -> anyhow::Result<Said> {
        match self {
            Action::Create { name, label } => {
                let token = api
                    .call(
                        Method::POST,
                        &format!("/clients/{name}/tokens"),
                        json!({"label": label}),
                    )
                    .await?;
                made(&token, &format!("token for client {name} created"))
            }
            Action::List { name } => list(api, &name).await,
            Action::Revoke { name, token_id } => {
                api.call(
                    Method::DELETE,
                    &format!("/clients/{name}/tokens/{token_id}"),
                    Value::Null,
                )
                .await?;
                Ok(Said {
                    note: format!("token {token_id} of client {name} revoked"),
                    result: String::new(),
                })
            }
        }
    }
}

/// A new token, as the API answered it: the secret alone is the result.
pub(super) fn made(answer: &Value, what: &str) -> anyhow::Result<Said> {
    let secret = answer["token"]
        .as_str()
        .context("the relay's answer has no token: is it of another version?")?;
    let token_id = answer["token_id"].as_str().unwrap_or("?");
    let note = format!("{what} (token id {token_id}). Give the agent this access token; it is not shown again:");
    Ok(Said {
        note,
        result: secret.to_owned(),
    })
}

async fn list(api: &AdminApi, name: &ClientId) -> anyhow::Result<Said> {
    let answer = api
        .call(Method::GET, &format!("/clients/{name}/tokens"), Value::Null)
        .await?;
    let List { tokens } = serde_json::from_value(answer)?;
    if tokens.is_empty() {
        let note = format!("client {name} has no tokens: make one with `adit token create {name}`");
        return Ok(Said {
            note,
            result: String::new(),
        });
    }
    let now = now_ms();
    let mut lines = vec![format!("{:<36} {:<14} {}", "TOKEN ID", "CREATED", "LABEL")];
    lines.extend(tokens.iter().map(|token| {
        let label = token.label.as_deref().unwrap_or("");
        format!("{} {:<14} {label}", token.token_id, ago(now - token.created_at))
            .trim_end()
            .to_owned()
    }));
    Ok(Said {
        note: String::new(),
        result: lines.join("\n"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::admin_api::tests::Listening;

    #[tokio::test]
    async fn a_token_is_made_found_by_its_label_and_revoked_by_its_id() {
        let relay = Listening::admin().await;
        let api = relay.api("right");
        let name: ClientId = "home".parse().expect("a client id");
        api.call(Method::POST, "/clients", json!({"client_id": name}))
            .await
            .expect("a client");

        let label = Some("nas".to_owned());
        let made = Action::Create {
            name: name.clone(),
            label,
        }
        .run(&api)
        .await
        .expect("made");
        assert!(made.result.starts_with("adit_") && !made.note.contains(&made.result));
        let listed = Action::List { name: name.clone() }
            .run(&api)
            .await
            .expect("listed")
            .result;
        assert!(!listed.contains("adit_"));
        let line = listed
            .lines()
            .find(|line| line.ends_with("nas"))
            .expect("the token's line");
        let token_id: TokenId = line.split(' ').next().and_then(|id| id.parse().ok()).expect("an id");
        Action::Revoke {
            name: name.clone(),
            token_id,
        }
        .run(&api)
        .await
        .expect("revoked");
        let again = Action::Revoke { name, token_id }
            .run(&api)
            .await
            .err()
            .expect("gone")
            .to_string();
        assert!(again.contains("no such token"), "{again}");
    }
}
