//! What a relay asks of a sender: one JSON text a request, with exactly the members that senders know.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, Method, header};
use serde::Serialize;
use serde_json::Value;

use super::query::{as_sent, object, split_once, value};
use crate::wire::fields;

/// Names the profile, as a header.
const PROFILE_HEADER: HeaderName = HeaderName::from_static("moosicbox-profile");
/// Names the profile, as a query parameter.
const PROFILE_PARAMETER: &str = "moosicboxProfile";

/// The body of a request is not JSON, and the dialect carries nothing else: 415 for whoever asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a MoosicBox server can be sent JSON only")]
pub struct NotJson;

/// In the order in which the system we succeed writes them.
#[derive(Serialize)]
struct Http<'a> {
    encoding: &'static str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    headers: BTreeMap<String, String>,
    method: &'a str,
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<Value>,
    profile: Option<String>,
    query: BTreeMap<String, String>,
    request_id: u64,
    r#type: &'static str,
}

/// A request for the sender's local server. `target` is the path and query as they were sent; `request_id` is not 0,
/// which means "everybody". No body, or an empty one, is no payload.
pub fn http_request(
    request_id: u64,
    method: &Method,
    target: &[u8],
    headers: &HeaderMap,
    body: Option<Bytes>,
) -> Result<String, NotJson> {
    let (path, query) = split_once(target, b'?');
    let body = body.filter(|body| !body.is_empty());
    // Read as the sender will read it: what it would refuse, it would refuse without a word.
    let payload = body.map(|body| serde_json::from_slice(&body).map_err(|_| NotJson));
    Ok(json(&Http {
        encoding: "BINARY",
        headers: carried(headers),
        method: &method.as_str().to_ascii_uppercase(),
        path: as_sent(path.strip_prefix(b"/").unwrap_or(path)),
        payload: payload.transpose()?,
        profile: profile(query, headers),
        query: object(query),
        request_id,
        r#type: "HTTP",
    }))
}

/// Nobody waits for the answer to this request any more.
pub fn abort(request_id: u64) -> String {
    format!(r#"{{"type":"ABORT","request_id":{request_id}}}"#)
}

/// What these types hold has no form that JSON lacks.
pub(super) fn json(message: &impl Serialize) -> String {
    serde_json::to_string(message).expect("texts and numbers under names that are texts")
}

fn profile(query: &[u8], headers: &HeaderMap) -> Option<String> {
    let named = value(query, PROFILE_PARAMETER).and_then(|profile| String::from_utf8(profile).ok());
    named.or_else(|| headers.get(PROFILE_HEADER)?.to_str().ok().map(str::to_owned))
}

/// The headers as the sender gives them to its own HTTP client: each once, as text.
fn carried(headers: &HeaderMap) -> BTreeMap<String, String> {
    let mut headers = headers.clone();
    fields::strip_hop_by_hop(&mut headers);
    let names = headers.keys().filter(|name| is_carried(name));
    let joined = names.filter_map(|name| {
        let values = headers.get_all(name).iter();
        let texts: Result<Vec<&str>, _> = values.map(|value| std::str::from_utf8(value.as_bytes())).collect();
        Some((name.as_str().to_owned(), texts.ok()?.join(", ")))
    });
    joined.collect()
}

/// What a local server may want to know of a request: the sender *adds* these to its own headers, and what it says of
/// itself (`User-Agent` above all, by which MoosicBox tells tunnelled requests) must stand alone.
fn is_carried(name: &HeaderName) -> bool {
    const CARRIED: [HeaderName; 8] = [
        header::ACCEPT,
        header::ACCEPT_LANGUAGE,
        header::RANGE,
        header::IF_RANGE,
        header::IF_MATCH,
        header::IF_NONE_MATCH,
        header::IF_MODIFIED_SINCE,
        header::IF_UNMODIFIED_SINCE,
    ];
    CARRIED.contains(name) || name.as_str().starts_with("hx-")
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let field = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), HeaderValue::from_static(value))
        };
        fields.iter().map(field).collect()
    }

    fn get(target: &str, given: &HeaderMap) -> Value {
        let text = http_request(7, &Method::GET, target.as_bytes(), given, None).expect("no body");
        serde_json::from_str(&text).expect("JSON")
    }

    #[test]
    fn a_request_is_written_as_senders_know_it() {
        let given = headers(&[("accept", "text/x"), ("range", "bytes=0-4"), ("host", "relay")]);
        let target = b"/hello?clientId=c1&a=1&a=3&flag&e=&sp=x%20y%2Bz";
        assert_eq!(
            http_request(7785179868931506163, &Method::GET, target, &given, None).expect("no body"),
            concat!(
                r#"{"encoding":"BINARY","headers":{"accept":"text/x","range":"bytes=0-4"},"method":"GET","#,
                r#""path":"hello","profile":null,"#,
                r#""query":{"a":"3","clientId":"c1","e":"","flag":"","sp":"x%20y%2Bz"},"#,
                r#""request_id":7785179868931506163,"type":"HTTP"}"#
            )
        );
    }

    #[test]
    fn a_request_with_a_body_has_a_payload_and_no_type_of_it() {
        let given = headers(&[("content-type", "application/json"), ("content-length", "12")]);
        let body = Some(Bytes::from_static(b" {\"b\" : [1]} "));
        assert_eq!(
            http_request(u64::MAX, &Method::POST, b"/x%2Fy", &given, body).expect("JSON"),
            concat!(
                r#"{"encoding":"BINARY","method":"POST","path":"x%2Fy","payload":{"b":[1]},"#,
                r#""profile":null,"query":{},"request_id":18446744073709551615,"type":"HTTP"}"#
            )
        );
        let empty = http_request(1, &Method::POST, b"/", &given, Some(Bytes::new())).expect("no body");
        assert!(!empty.contains("payload") && empty.contains(r#""path":"","#), "{empty}");
    }

    #[test]
    fn a_body_that_is_not_json_cannot_be_carried() {
        let too_deep = "[".repeat(200) + &"]".repeat(200);
        for body in ["a=1", " ", "{}{}", "{\"a\":1", "\"\\ud800\"", &too_deep] {
            let asked = http_request(
                1,
                &Method::POST,
                b"/",
                &HeaderMap::new(),
                Some(Bytes::copy_from_slice(body.as_bytes())),
            );
            assert_eq!(asked, Err(NotJson), "{body}");
        }
    }

    #[test]
    fn the_profile_is_of_the_query_before_the_header() {
        let given = headers(&[("moosicbox-profile", "header")]);
        assert_eq!(get("/?moosicboxProfile=the%20query", &given)["profile"], "the query");
        assert_eq!(get("/?moosicboxProfile=%ff", &given)["profile"], "header");
        assert_eq!(get("/", &given)["profile"], "header");
        assert_eq!(get("/", &HeaderMap::new())["profile"], Value::Null);
        assert_eq!(get("/", &given).get("headers"), None);
    }

    #[test]
    fn headers_go_along_that_say_what_is_wanted_and_no_others() {
        let mut given = headers(&[
            ("accept", "a/b"),
            ("accept", "c/d"),
            ("cookie", "a=1"),
            ("cookie", "b=2"),
            ("if-range", "\"x\""),
            ("authorization", "Bearer upstream's"),
            ("connection", "x-once, keep-alive"),
            ("x-once", "1"),
            ("keep-alive", "1"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("host", "relay"),
            ("expect", "100-continue"),
            ("content-encoding", "gzip"),
            ("forwarded", "for=x"),
            ("x-forwarded-for", "x"),
            ("traceparent", "00-0-0-00"),
            ("adit-client", "c"),
            ("user-agent", "an app"),
        ]);
        given.insert("hx-prompt", HeaderValue::from_bytes("ö".as_bytes()).expect("a value"));
        given.insert("hx-target", HeaderValue::from_static("a"));
        given.append("hx-target", HeaderValue::from_bytes(b"\xf6").expect("a value"));
        assert_eq!(
            get("/", &given)["headers"],
            serde_json::json!({
                "accept": "a/b, c/d", "hx-prompt": "ö", "if-range": "\"x\"",
            })
        );
    }

    #[test]
    fn an_abort_is_a_type_and_an_id() {
        assert_eq!(
            abort(8291565998303050323),
            r#"{"type":"ABORT","request_id":8291565998303050323}"#
        );
    }

    proptest! {
        #[test]
        fn no_request_makes_it_panic(
            target in prop::collection::vec(any::<u8>(), 0..60),
            body in prop::option::of(prop::collection::vec(any::<u8>(), 0..20)),
        ) {
            let _ = http_request(1, &Method::PUT, &target, &HeaderMap::new(), body.map(Bytes::from));
        }
    }
}
