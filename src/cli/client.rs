//! `adit client`: make, list, change and delete clients.

use clap::ValueEnum;
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use super::admin_api::{AdminApi, AdminArgs, Said};
use crate::{
    cluster::{now_ms, registry::ClientSummary},
    ids::ClientId,
    secret::Secret,
};

/// Make, list, change and delete clients: the names that tunnels serve
#[derive(clap::Args, Debug)]
pub struct ClientCommand {
    #[command(flatten)]
    admin: AdminArgs,
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand, Debug)]
enum Action {
    /// Make a client; its access token goes to stdout, this once
    Create {
        /// 1 to 63 characters of a-z, 0-9 and '-'
        name: ClientId,
        /// What those who open the client's address must show
        #[arg(long, value_enum, default_value = "token")]
        auth: Mode,
        #[command(flatten)]
        basic: BasicArgs,
    },
    /// List the clients
    List,
    /// Change what those who open the client's address must show
    Update {
        /// The client
        name: ClientId,
        /// What they must show from now on
        #[arg(long, value_enum)]
        auth: Mode,
        #[command(flatten)]
        basic: BasicArgs,
    },
    /// Delete a client, its tokens and its tunnels
    Delete {
        /// The client
        name: ClientId,
    },
}

#[derive(clap::Args, Debug)]
struct BasicArgs {
    /// The user name, with --auth basic
    #[arg(long, value_name = "USER", required_if_eq("auth", "basic"))]
    basic_user: Option<String>,
    /// The password, with --auth basic (better in the variable than where `ps` shows it)
    #[arg(long, env = "ADIT_BASIC_PASSWORD", hide_env_values = true, value_name = "PASSWORD")]
    #[arg(required_if_eq("auth", "basic"))]
    basic_password: Option<Secret>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    /// An access token of the client
    Token,
    /// A user name and a password
    Basic,
    /// Nothing: the address is public
    Public,
}

impl Mode {
    fn json(self, basic: &BasicArgs) -> Value {
        let mut json = json!({"auth": self.to_possible_value().map(|value| value.get_name().to_owned())});
        // The password may come from a variable that is set for another command; the user name is meant.
        if let Some(user) = &basic.basic_user {
            json["basic_user"] = json!(user);
            json["basic_password"] = json!(basic.basic_password.as_ref().map(Secret::expose));
        }
        json
    }
}

#[derive(Deserialize)]
struct Page {
    clients: Vec<ClientSummary>,
    next: Option<ClientId>,
}

impl ClientCommand {
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
            Action::Create { name, auth, basic } => create(api, &name, auth.json(&basic)).await,
            Action::List => list(api).await,
            Action::Update { name, auth, basic } => {
                api.call(Method::PATCH, &format!("/clients/{name}"), auth.json(&basic))
                    .await?;
                Ok(Said {
                    note: format!("client {name} changed"),
                    result: String::new(),
                })
            }
            Action::Delete { name } => {
                api.call(Method::DELETE, &format!("/clients/{name}"), Value::Null)
                    .await?;
                Ok(Said {
                    note: format!("client {name} deleted"),
                    result: String::new(),
                })
            }
        }
    }
}

async fn create(api: &AdminApi, name: &ClientId, mut body: Value) -> anyhow::Result<Said> {
    body["client_id"] = json!(name);
    let made = api.call(Method::POST, "/clients", body).await?;
    super::token::made(&made, &format!("client {name} created"))
}

async fn list(api: &AdminApi) -> anyhow::Result<Said> {
    let (mut clients, mut after) = (Vec::new(), String::new());
    loop {
        let page: Page = serde_json::from_value(
            api.call(Method::GET, &format!("/clients?after={after}"), Value::Null)
                .await?,
        )?;
        clients.extend(page.clients);
        match page.next {
            Some(next) => after = next.into(),
            None => break,
        }
    }
    if clients.is_empty() {
        return Ok(Said {
            note: "no clients yet: make one with `adit client create NAME`".into(),
            result: String::new(),
        });
    }
    let now = now_ms();
    let mut lines = vec![format!(
        "{:<24} {:<7} {:>7}  {}",
        "NAME", "AUTH", "TUNNELS", "LAST SEEN"
    )];
    lines.extend(clients.iter().map(|client| {
        let seen = client
            .last_seen_at
            .map_or_else(|| "never".to_owned(), |at| ago(now - at));
        format!(
            "{:<24} {:<7} {:>7}  {seen}",
            client.client_id.as_str(),
            client.auth,
            client.tunnels
        )
    }));
    Ok(Said {
        note: String::new(),
        result: lines.join("\n"),
    })
}

/// Roughly, as people say it.
pub(super) fn ago(ms: i64) -> String {
    match ms.max(0) / 1000 {
        s @ 0..60 => format!("{s} s ago"),
        s @ 60..3600 => format!("{} min ago", s / 60),
        s @ 3600..172_800 => format!("{} h ago", s / 3600),
        s => format!("{} days ago", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::admin_api::tests::Listening;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        client: ClientCommand,
    }

    fn action(words: &str) -> Action {
        let words = std::iter::once("client").chain(words.split(' '));
        Cli::try_parse_from(words)
            .unwrap_or_else(|error| panic!("{error}"))
            .client
            .action
    }

    #[tokio::test]
    async fn a_client_is_made_listed_and_deleted_and_only_the_token_is_on_stdout() {
        let relay = Listening::admin().await;
        let api = relay.api("right");
        let created = action("create home").run(&api).await.expect("created");
        assert!(created.result.starts_with("adit_") && !created.result.contains(char::is_whitespace));
        assert!(created.note.contains("home") && !created.note.contains(&created.result));
        let taken = action("create home").run(&api).await.err().expect("taken").to_string();
        assert!(taken.contains("exists already"), "{taken}");

        let meant_basic = action("create cafe --basic-user ann --basic-password p")
            .run(&api)
            .await;
        assert!(
            meant_basic
                .err()
                .expect("refused")
                .to_string()
                .contains("auth `basic` only")
        );

        action("update home --auth basic --basic-user ann --basic-password p")
            .run(&api)
            .await
            .expect("changed");
        let listed = action("list").run(&api).await.expect("listed");
        assert!(
            listed
                .result
                .lines()
                .any(|line| line.starts_with("home") && line.contains("basic")),
            "{}",
            listed.result
        );
        action("delete home").run(&api).await.expect("deleted");
        assert!(action("list").run(&api).await.expect("listed").result.is_empty());
    }

    #[test]
    fn arguments_that_cannot_work_are_refused_and_secrets_do_not_print() {
        for words in [
            "create Home",
            "create home --auth basic --basic-user ann",
            "create home --auth magic",
            "update home",
            "delete",
        ] {
            assert!(
                Cli::try_parse_from(std::iter::once("client").chain(words.split(' '))).is_err(),
                "{words}"
            );
        }
        let words = "client create home --admin-token t0psecret --auth basic --basic-user ann --basic-password hunter2";
        let cli = Cli::try_parse_from(words.split(' ')).unwrap_or_else(|error| panic!("{error}"));
        let printed = format!("{:?}", cli.client);
        assert!(
            !printed.contains("hunter2") && !printed.contains("t0psecret"),
            "{printed}"
        );
    }

    #[test]
    fn times_are_said_as_people_say_them() {
        for (seconds, said) in [
            (-5, "0 s ago"),
            (59, "59 s ago"),
            (60, "1 min ago"),
            (7200, "2 h ago"),
            (172_800, "2 days ago"),
        ] {
            assert_eq!(ago(seconds * 1000), said);
        }
    }
}
