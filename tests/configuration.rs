//! An operator configures adit: what wins, what is refused, and that nothing is started on a bad configuration.

use std::process::{Command, Output};

/// Runs the binary in an empty directory, with no environment but `variables`.
fn adit(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let place = tempfile::tempdir().expect("a directory");
    let mut command = Command::new(env!("CARGO_BIN_EXE_adit"));
    command
        .args(arguments)
        .env_clear()
        .envs(variables.iter().copied())
        .current_dir(place.path());
    command.output().expect("the binary runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn flag_wins_over_environment_over_file_over_default() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let text = "listen = \"127.0.0.1:1\"\nadmin_listen = \"127.0.0.1:2\"\ndrain_timeout = \"3s\"";
    std::fs::write(file.path(), text).expect("written");
    let path = file.path().to_str().expect("text");
    let variables = [
        ("ADIT_CONFIG", path),
        ("ADIT_LISTEN", "127.0.0.1:11"),
        ("ADIT_ADMIN_LISTEN", "127.0.0.1:12"),
    ];
    let output = adit(&["serve", "--check", "--listen", "127.0.0.1:21"], &variables);
    let printed = stdout(&output);
    assert!(output.status.success(), "{}", stderr(&output));
    for (said, by) in [
        ("listen: 127.0.0.1:21,", "the flag"),
        ("admin_listen: 127.0.0.1:12,", "the environment"),
        ("drain_timeout: 3s,", "the file"),
        ("max_headers: 100,", "the default"),
    ] {
        assert!(printed.contains(said), "{by}: {said} is not in\n{printed}");
    }
}

#[test]
fn the_admin_token_may_have_the_name_that_moosicbox_gave_it() {
    for (variables, is_set) in [
        (&[("TUNNEL_ACCESS_TOKEN", "hunter2")][..], true),
        (&[("TUNNEL_ACCESS_TOKEN", "hunter2"), ("ADIT_ADMIN_TOKEN", "")], true),
        (&[("TUNNEL_ACCESS_TOKEN", "")], false),
    ] {
        let printed = stdout(&adit(&["serve", "--check"], variables));
        assert_eq!(
            printed.contains("admin_token: Some("),
            is_set,
            "{variables:?}: {printed}"
        );
        assert_eq!(
            printed.contains("admin_token: None"),
            !is_set,
            "{variables:?}: {printed}"
        );
    }
}

#[test]
fn a_bad_configuration_exits_with_2_and_names_the_key() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "[http]\nmax_heders = 1").expect("written");
    let path = file.path().to_str().expect("text");
    for (arguments, variables, said) in [
        (&["serve"][..], &[("ADIT_CONFIG", path)][..], "max_heders"),
        (&["serve"], &[("ADIT_CONFIG", "/nowhere.toml")], "/nowhere.toml"),
        (&["serve"], &[("ADIT_LISTEN", "8080")], "--listen"),
        (&["serve"], &[("DATABASE_URL", "postgres://x")], "`database_url`"),
        (&["http", "3000"], &[], "ADIT_RELAY"),
        (
            &["http", "3000"],
            &[("ADIT_RELAY", "https://r"), ("ADIT_CLIENT", "home")],
            "ADIT_TOKEN",
        ),
        (&["agent"], &[], "[[tunnel]]"),
        (&["agent"], &[("ADIT_CONNECTIONS", "many")], "--connections"),
        (&["healthcheck"], &[("ADIT_CONFIG", path)], "max_heders"),
    ] {
        let output = adit(arguments, variables);
        let printed = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?} {variables:?}: {printed}");
        assert!(
            printed.contains(said) && !printed.contains("panicked"),
            "{said} is not in: {printed}"
        );
    }
}

#[test]
fn no_secret_is_printed() {
    let variables = [
        ("ADIT_ADMIN_TOKEN", "hunter2"),
        ("TUNNEL_ACCESS_TOKEN", "hunter2"),
        ("DATABASE_URL", "sqlite:hunter2"),
        ("ADIT_TOKEN", "hunter2"),
        ("ADIT_LOG", "trace"),
    ];
    for arguments in [
        &["serve", "--help"][..],
        &["http", "--help"],
        &["agent", "--help"],
        &["serve", "--check"],
    ] {
        let output = adit(arguments, &variables);
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
        assert!(
            !(stdout(&output) + &stderr(&output)).contains("hunter2"),
            "{arguments:?}"
        );
    }
}
