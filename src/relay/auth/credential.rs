//! Credentials as requests carry them: found, and stripped again once the relay has consumed them. Pure.

use std::borrow::Cow;

use base64::{Engine, engine::general_purpose::STANDARD};
use http::{HeaderMap, HeaderName, HeaderValue, header::AUTHORIZATION};

/// For a downstream whose `Authorization` belongs to the upstream.
const ADIT_AUTHORIZATION: HeaderName = HeaderName::from_static("adit-authorization");
const SIGNATURE: &str = "signature";

/// Where the credential was that the relay has consumed, and which must not be passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consumed {
    /// None was asked for.
    Nothing,
    /// The header `Adit-Authorization`; `Authorization` is the upstream's.
    AditAuthorization,
    /// The header `Authorization`.
    Authorization,
    /// The query parameter `signature`.
    Signature,
}

impl Consumed {
    /// Takes the credential out of the request. Returns the query to go on with: byte for byte what it was, but for the
    /// parameter that was consumed; `None` if nothing is left. `Adit-Authorization` never goes on.
    pub fn strip<'q>(self, headers: &mut HeaderMap, query: Option<&'q str>) -> Option<Cow<'q, str>> {
        headers.remove(ADIT_AUTHORIZATION);
        match self {
            Consumed::Nothing | Consumed::AditAuthorization => query.map(Cow::Borrowed),
            Consumed::Authorization => {
                headers.remove(AUTHORIZATION);
                query.map(Cow::Borrowed)
            }
            Consumed::Signature => query.and_then(without_signature).map(Cow::Owned),
        }
    }
}

/// Whether the request carries anything that could be meant as a credential.
pub(super) fn any(headers: &HeaderMap, query: Option<&str>) -> bool {
    headers.contains_key(ADIT_AUTHORIZATION) || headers.contains_key(AUTHORIZATION) || signature(query).is_some()
}

/// The token of an agent or an operator.
pub(in crate::relay) fn bearer(headers: &HeaderMap) -> Option<&str> {
    headers.get(AUTHORIZATION).and_then(bearer_or_bare)
}

/// A downstream's token or signature: the first place that has one decides.
pub(super) fn token<'r>(headers: &'r HeaderMap, query: Option<&'r str>) -> Option<(&'r str, Consumed)> {
    if let Some(value) = headers.get(ADIT_AUTHORIZATION) {
        // This header is ours alone: what cannot be read in it is a wrong token.
        return Some((bearer_or_bare(value).unwrap_or(""), Consumed::AditAuthorization));
    }
    if let Some(token) = bearer(headers) {
        return Some((token, Consumed::Authorization));
    }
    signature(query).map(|signature| (signature, Consumed::Signature))
}

/// User and password (RFC 7617 §2).
pub(super) fn basic(headers: &HeaderMap) -> Option<(Vec<u8>, Vec<u8>)> {
    let (scheme, rest) = headers.get(AUTHORIZATION)?.to_str().ok()?.trim().split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let mut user = STANDARD.decode(rest.trim()).ok()?;
    let colon = user.iter().position(|byte| *byte == b':')?;
    let password = user.split_off(colon + 1);
    user.truncate(colon);
    Some((user, password))
}

/// `Bearer X` in any case, or a bare `X`. Another scheme is not a token of ours: it may be the upstream's.
fn bearer_or_bare(value: &HeaderValue) -> Option<&str> {
    let text = value.to_str().ok()?.trim();
    match text.split_once(' ') {
        Some((scheme, token)) => scheme.eq_ignore_ascii_case("bearer").then(|| token.trim()),
        None => (!text.is_empty()).then_some(text),
    }
}

/// As it stands in the query: signatures are base64url and need no decoding. One that is written `signature` comes
/// first; MoosicBox's apps write it in any case.
pub(super) fn signature(query: Option<&str>) -> Option<&str> {
    let written = |name| query?.split('&').find_map(|parameter| signature_value(parameter, name));
    written(|name| name == SIGNATURE).or_else(|| written(|name| name.eq_ignore_ascii_case(SIGNATURE)))
}

fn signature_value(parameter: &str, is_name: fn(&str) -> bool) -> Option<&str> {
    parameter
        .split_once('=')
        .filter(|(name, _)| is_name(name))
        .map(|(_, value)| value)
}

/// Without the signature that [`signature`] finds, wherever it is repeated. One of another value is the upstream's.
fn without_signature(query: &str) -> Option<String> {
    let consumed = signature(Some(query));
    let any_case = |name: &str| name.eq_ignore_ascii_case(SIGNATURE);
    let kept: Vec<&str> = query
        .split('&')
        .filter(|parameter| signature_value(parameter, any_case) != consumed)
        .collect();
    (!kept.is_empty()).then(|| kept.join("&"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(fields: &[(HeaderName, &str)]) -> HeaderMap {
        fields
            .iter()
            .map(|(name, value)| (name.clone(), HeaderValue::from_str(value).expect("a value")))
            .collect()
    }

    #[test]
    fn the_first_place_that_has_a_token_decides() {
        let query = Some("a=1&signature=S");
        let all = headers(&[(ADIT_AUTHORIZATION, "Bearer X"), (AUTHORIZATION, "Bearer Y")]);
        assert_eq!(token(&all, query), Some(("X", Consumed::AditAuthorization)));
        for value in ["Bearer Y", "bearer Y", "BEARER  Y ", "Y"] {
            assert_eq!(
                token(&headers(&[(AUTHORIZATION, value)]), query),
                Some(("Y", Consumed::Authorization)),
                "{value}"
            );
        }
        for value in ["Basic dTpw", "Digest username=u", ""] {
            assert_eq!(
                token(&headers(&[(AUTHORIZATION, value)]), query),
                Some(("S", Consumed::Signature)),
                "{value}"
            );
        }
        assert_eq!(token(&headers(&[(AUTHORIZATION, "Basic dTpw")]), None), None);
        assert_eq!(
            token(&headers(&[(ADIT_AUTHORIZATION, "Basic dTpw")]), query),
            Some(("", Consumed::AditAuthorization))
        );
        assert_eq!(token(&HeaderMap::new(), Some("xsignature=S&signature")), None);
        for query in ["Signature=T&signature=S", "a=1&SIGNATURE=S&Signature=T"] {
            assert_eq!(
                token(&HeaderMap::new(), Some(query)),
                Some(("S", Consumed::Signature)),
                "{query}"
            );
        }
    }

    #[test]
    fn basic_is_user_colon_password_and_the_password_may_have_colons() {
        let of = |value: &str| basic(&headers(&[(AUTHORIZATION, value)]));
        assert_eq!(of("Basic dTpwOnE="), Some((b"u".to_vec(), b"p:q".to_vec())));
        assert_eq!(of("bAsIc Og=="), Some((vec![], vec![])));
        for bad in ["Basic", "Basic dXA=", "Basic !!!", "Bearer dTpw", ""] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_consumed_credential_does_not_go_on_and_everything_else_does() {
        let both = [(ADIT_AUTHORIZATION, "X"), (AUTHORIZATION, "Bearer upstream's")];
        let mut map = headers(&both);
        assert_eq!(
            Consumed::AditAuthorization
                .strip(&mut map, Some("a=%20+&&b"))
                .as_deref(),
            Some("a=%20+&&b")
        );
        assert_eq!(map, headers(&both[1..]));

        let mut map = headers(&both[1..]);
        map.append(AUTHORIZATION, HeaderValue::from_static("again"));
        assert_eq!(Consumed::Authorization.strip(&mut map, None), None);
        assert!(map.is_empty());

        let mut map = headers(&both);
        assert_eq!(
            Consumed::Nothing.strip(&mut map, Some("signature=theirs")).as_deref(),
            Some("signature=theirs")
        );
        assert_eq!(map, headers(&both[1..]));
    }

    #[test]
    fn only_the_consumed_signature_leaves_the_query() {
        let strip = |query| {
            Consumed::Signature
                .strip(&mut HeaderMap::new(), Some(query))
                .map(Cow::into_owned)
        };
        for (query, left) in [
            ("signature=S", None),
            ("signature=S&a=1", Some("a=1")),
            ("a=%2B+&signature=S&&b", Some("a=%2B+&&b")),
            ("signature=S&x=1&signature=S", Some("x=1")),
            ("signature=S&signature=upstream", Some("signature=upstream")),
            (
                "signature=S&%73ignature=S&Signature=S&signature",
                Some("%73ignature=S&signature"),
            ),
            ("SIGNATURE=S&a=1&Signature=upstream", Some("a=1&Signature=upstream")),
        ] {
            assert_eq!(strip(query).as_deref(), left, "{query}");
        }
    }
}
