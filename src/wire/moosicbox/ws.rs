//! What apps and their sender say to each other over the apps' WebSockets: JSON, carried as it is.

use serde::{Deserialize, Serialize};
use serde_json::{Value, value::RawValue};

use super::request::{NotJson, json};

#[derive(Serialize)]
struct Ws<'a> {
    r#type: &'static str,
    conn_id: u64,
    request_id: u64,
    body: Value,
    profile: Option<&'a str>,
}

/// What an app said, for its sender. The answer names `request_id`, and may name `conn_id`; neither is 0.
pub fn ws_request(request_id: u64, conn_id: u64, body: &str, profile: Option<&str>) -> Result<String, NotJson> {
    Ok(json(&Ws {
        r#type: "WS",
        conn_id,
        request_id,
        body: serde_json::from_str(body).map_err(|_| NotJson)?,
        profile,
    }))
}

/// Which of its client's apps an answer is for. Never another client's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Audience {
    /// The one that asked this.
    WhoAsked(u64),
    /// Those connections.
    Only(Vec<u64>),
    /// All but those connections.
    AllBut(Vec<u64>),
}

/// What a sender said to its apps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WsAnswer {
    /// To which.
    pub audience: Audience,
    /// Compact JSON, otherwise as the sender wrote it.
    pub body: String,
}

/// A text frame of a sender that is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a text frame is no answer to an app")]
pub struct NotAnAnswer;

#[derive(Deserialize)]
struct Answer<'a> {
    request_id: u64,
    #[serde(borrow)]
    body: &'a RawValue,
    to_connection_ids: Option<Vec<u64>>,
    exclude_connection_ids: Option<Vec<u64>>,
}

impl WsAnswer {
    /// Reads a text frame.
    pub fn decode(frame: &str) -> Result<Self, NotAnAnswer> {
        let answer: Answer<'_> = serde_json::from_str(frame).map_err(|_| NotAnAnswer)?;
        let audience = match (answer.request_id, answer.to_connection_ids) {
            (0, Some(only)) => Audience::Only(only),
            (0, None) => Audience::AllBut(answer.exclude_connection_ids.unwrap_or_default()),
            (request_id, _) => Audience::WhoAsked(request_id),
        };
        Ok(Self {
            audience,
            body: compact(answer.body.get()),
        })
    }
}

/// Valid JSON without the spaces between its tokens.
fn compact(json: &str) -> String {
    let (mut in_text, mut escaped) = (false, false);
    let kept = json.chars().filter(|&c| {
        let keep = in_text || !c.is_ascii_whitespace();
        in_text = if c == '"' && !escaped { !in_text } else { in_text };
        escaped = in_text && c == '\\' && !escaped;
        keep
    });
    kept.collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(frame: &str) -> (Audience, String) {
        let answer = WsAnswer::decode(frame).expect(frame);
        (answer.audience, answer.body)
    }

    #[test]
    fn what_an_app_says_is_written_as_senders_know_it() {
        assert_eq!(
            ws_request(6203427697166407387, 13426452147272006790, " {\"a\" : 1}\n", None),
            Ok(concat!(
                r#"{"type":"WS","conn_id":13426452147272006790,"request_id":6203427697166407387,"#,
                r#""body":{"a":1},"profile":null}"#
            )
            .to_owned())
        );
        let with_profile = ws_request(1, 2, "null", Some("home")).expect("JSON");
        assert_eq!(
            with_profile,
            r#"{"type":"WS","conn_id":2,"request_id":1,"body":null,"profile":"home"}"#
        );
        assert_eq!(ws_request(1, 2, "hello", None), Err(NotJson));
    }

    #[test]
    fn an_answer_says_for_whom_it_is() {
        let body = || "1".to_owned();
        for (frame, audience) in [
            (
                r#"{"request_id":18446744073709551615,"body":1,"to_connection_ids":[3]}"#,
                Audience::WhoAsked(u64::MAX),
            ),
            (r#"{"request_id":0,"body":1}"#, Audience::AllBut(vec![])),
            (
                r#"{"request_id":0,"body":1,"to_connection_ids":null,"exclude_connection_ids":null}"#,
                Audience::AllBut(vec![]),
            ),
            (
                r#"{"request_id":0,"body":1,"exclude_connection_ids":[4,5]}"#,
                Audience::AllBut(vec![4, 5]),
            ),
            (
                r#"{"exclude_connection_ids":[4],"to_connection_ids":[3],"body":1,"request_id":0,"later":{}}"#,
                Audience::Only(vec![3]),
            ),
            (
                r#"{"request_id":0,"body":1,"to_connection_ids":[]}"#,
                Audience::Only(vec![]),
            ),
        ] {
            assert_eq!(decode(frame), (audience, body()), "{frame}");
        }
    }

    #[test]
    fn the_body_stays_as_it_is_but_for_spaces_between_tokens() {
        let body = r#"{"b" : [1.0, 12345678901234567890123] ,"a":"x \" y\\" , "n":null}"#;
        let compact = r#"{"b":[1.0,12345678901234567890123],"a":"x \" y\\","n":null}"#;
        assert_eq!(decode(&format!(r#"{{"request_id":1,"body":{body}}}"#)).1, compact);
        assert_eq!(decode(r#"{"request_id":1,"body":null}"#).1, "null");
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for frame in [
            "",
            "null",
            "[]",
            r#"{"request_id":1}"#,
            r#"{"body":1}"#,
            r#"{"request_id":-1,"body":1}"#,
            r#"{"request_id":1.0,"body":1}"#,
            r#"{"request_id":"1","body":1}"#,
            r#"{"request_id":0,"body":1,"to_connection_ids":["1"]}"#,
            "TUNNEL_RESPONSE:1|1|1e30=",
        ] {
            assert_eq!(WsAnswer::decode(frame), Err(NotAnAnswer), "{frame}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[{}\\[\\]\",:0-9a-z_\\\\ ]{0,60}") {
            let _ = WsAnswer::decode(&text);
            let _ = ws_request(1, 2, &text, None);
        }

        #[test]
        fn any_text_in_a_body_arrives(text in ".*") {
            let body = serde_json::to_string(&text).expect("JSON");
            prop_assert_eq!(decode(&format!("{{\"request_id\":1,\"body\": {body} }}")).1, body);
        }
    }
}
