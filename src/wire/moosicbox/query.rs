//! Queries and paths on their way to a sender, which puts them together again in a way of its own.
//!
//! The sender writes `name=value` for every member of the object it is given, sorted, joined by `&` **and not encoded**,
//! and calls that URL. What the upstream reads must be what it would have read of the request itself, so:
//! - an escape is decoded where its byte means the same with and without (`%61`, `%2F`): whatever the sender itself looks
//!   up by name finds it;
//! - it stays an escape where its byte would mean something else: `%26` would begin a parameter, `%3D` would end a name,
//!   `%23` the query, `%2B` would be a space, `%25` would begin an escape, and spaces, controls and bytes outside ASCII
//!   are no URL;
//! - what was sent plain stays plain, `+` and `=` among it: however the upstream reads those, it is how it would have.

use std::{collections::BTreeMap, fmt::Write};

/// The query as the sender's object. Of a name that is there twice the last one counts; a bare name has the value `""`.
pub(super) fn object(query: &[u8]) -> BTreeMap<String, String> {
    let mut by_meaning = BTreeMap::new();
    for pair in query.split(|&byte| byte == b'&').filter(|pair| !pair.is_empty()) {
        let (name, value) = split_once(pair, b'=');
        // `a%20b` and `a+b` are two ways to write one name: the last one counts, however it is sorted.
        by_meaning.insert(meaning(name), (arriving(name, false), arriving(value, true)));
    }
    by_meaning.into_values().collect()
}

/// A path, or what else of a URL is passed on as it stands. Only what is no URL at all is encoded.
pub(super) fn as_sent(text: &[u8]) -> String {
    let mut out = String::with_capacity(text.len());
    for &byte in text {
        put(&mut out, byte, is_url(byte));
    }
    out
}

/// Percent-decodes. `+` stays, and so does an escape that is broken.
pub fn decode(text: &[u8]) -> Vec<u8> {
    Bytes(text).map(|(byte, _)| byte).collect()
}

/// The value of the last parameter of this name.
pub(super) fn value(query: &[u8], name: &str) -> Option<Vec<u8>> {
    let pairs = query.split(|&byte| byte == b'&').map(|pair| split_once(pair, b'='));
    let mut named = pairs.filter(|(given, _)| decode(given) == name.as_bytes());
    named.next_back().map(|(_, value)| decode(value))
}

/// Before and after the first of these bytes; all before, when there is none.
pub(super) fn split_once(text: &[u8], at: u8) -> (&[u8], &[u8]) {
    match text.iter().position(|&byte| byte == at) {
        Some(found) => (&text[..found], &text[found + 1..]),
        None => (text, &[]),
    }
}

fn meaning(name: &[u8]) -> Vec<u8> {
    let spaced = |(byte, escaped): (u8, bool)| if byte == b'+' && !escaped { b' ' } else { byte };
    Bytes(name).map(spaced).collect()
}

fn arriving(text: &[u8], is_value: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for (byte, escaped) in Bytes(text) {
        let plain = match escaped {
            true => means_the_same_plain(byte) || (is_value && byte == b'='),
            false => is_url(byte),
        };
        put(&mut out, byte, plain);
    }
    out
}

fn put(out: &mut String, byte: u8, plain: bool) {
    match plain {
        true => out.push(char::from(byte)),
        // Writing to a String cannot fail.
        false => drop(write!(out, "%{byte:02X}")),
    }
}

/// Unreserved (RFC 3986 §2.3), and those reserved characters that no reader of queries takes apart.
fn means_the_same_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$'()*,/:?@".contains(&byte)
}

/// Printable ASCII without what begins the fragment.
fn is_url(byte: u8) -> bool {
    byte.is_ascii_graphic() && byte != b'#'
}

/// The bytes of an encoded text, and whether each was written as an escape.
struct Bytes<'a>(&'a [u8]);

impl Iterator for Bytes<'_> {
    type Item = (u8, bool);

    fn next(&mut self) -> Option<(u8, bool)> {
        let (&first, rest) = self.0.split_first()?;
        if let (b'%', [high, low, after @ ..]) = (first, rest)
            && let (Some(high), Some(low)) = (hex(*high), hex(*low))
        {
            self.0 = after;
            return Some((high << 4 | low, true));
        }
        self.0 = rest;
        Some((first, false))
    }
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| value.try_into().ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As the sender does it.
    fn rejoined(object: &BTreeMap<String, String>) -> String {
        let pairs: Vec<String> = object.iter().map(|(name, value)| format!("{name}={value}")).collect();
        pairs.join("&")
    }

    /// As an upstream reads a query: a form, where the last one counts.
    fn form(query: &str) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let pairs = query.as_bytes().split(|&byte| byte == b'&');
        let pairs = pairs.filter(|pair| !pair.is_empty()).map(|pair| split_once(pair, b'='));
        pairs.map(|(name, value)| (meaning(name), meaning(value))).collect()
    }

    #[test]
    fn values_are_decoded_unless_they_would_be_read_differently() {
        for (query, object_of_it) in [
            ("a=1&a=2&a=3", r#"{"a":"3"}"#),
            ("flag&e=&&", r#"{"e":"","flag":""}"#),
            ("%63lientId=%63-1", r#"{"clientId":"c-1"}"#),
            ("sp=x%20y+z", r#"{"sp":"x%20y+z"}"#),
            ("plus=1%2b1", r#"{"plus":"1%2B1"}"#),
            ("q=a%26b%3Dc%23d%25e", r#"{"q":"a%26b=c%23d%25e"}"#),
            ("a%3Db=1=2", r#"{"a%3Db":"1=2"}"#),
            ("path=%2Fmusic%2FBj%c3%b6rk", r#"{"path":"/music/Bj%C3%B6rk"}"#),
            ("broken=%zz%4&%", r#"{"%":"","broken":"%zz%4"}"#),
            ("a+b=1&a%20b=2", r#"{"a%20b":"2"}"#),
            ("", "{}"),
        ] {
            let written = serde_json::to_string(&object(query.as_bytes())).expect("JSON");
            assert_eq!(written, object_of_it, "{query}");
        }
        assert_eq!(object(b"\xff=#\x01")["%FF"], "%23%01");
    }

    #[test]
    fn a_path_stays_as_it_is() {
        assert_eq!(as_sent(b"a%2Fb/%c3/../x;y=1"), "a%2Fb/%c3/../x;y=1");
        assert_eq!(as_sent("ö #\"".as_bytes()), "%C3%B6%20%23\"");
    }

    #[test]
    fn a_value_is_found_by_its_decoded_name() {
        assert_eq!(value(b"a=1&%61=2%20&b", "a"), Some(b"2 ".to_vec()));
        assert_eq!(value(b"a=1&b", "b"), Some(vec![]));
        assert_eq!(value(b"a=1&b", "c"), None);
    }

    proptest! {
        #[test]
        fn the_upstream_reads_what_was_meant(query in "([ab+&=]|%2[05-7Bb3]|%3[dD]|%[cC]3|%|[!-\"$-~]){0,24}") {
            prop_assert_eq!(form(&rejoined(&object(query.as_bytes()))), form(&query));
        }

        #[test]
        fn what_is_joined_is_a_url_whatever_it_is_made_of(query in prop::collection::vec(any::<u8>(), 0..40)) {
            let object = object(&query);
            let joined = rejoined(&object);
            prop_assert!(joined.bytes().all(is_url), "{}", joined);
            prop_assert_eq!(form(&joined).len(), object.len(), "{}", joined);
        }
    }
}
