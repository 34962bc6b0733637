//! CORS (the Fetch standard, §3.3) on the relay's own host: the pages of other origins that may call a client, as
//! `cors.origins` names them. What a client's own host says of it is the client's upstream's.

use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header, request::Parts};

use super::out_body::OutBody;
use crate::config::CorsConfig;

/// How long a page need not ask again, in seconds.
const MAX_AGE: HeaderValue = HeaderValue::from_static("3600");
/// HEAD needs no permission.
const METHODS: HeaderValue = HeaderValue::from_static("GET, POST, OPTIONS, DELETE, PUT, PATCH");
/// What MoosicBox's apps send; `hx-*` is htmx.
const HEADERS: HeaderValue = HeaderValue::from_static(
    "authorization, accept, content-type, moosicbox-profile, hx-boosted, hx-current-url, hx-history-restore-request, \
     hx-prompt, hx-request, hx-target, hx-trigger, hx-trigger-name",
);
/// What they read.
const EXPOSED: HeaderValue = HeaderValue::from_static(
    "hx-location, hx-push-url, hx-redirect, hx-refresh, hx-replace-url, hx-reselect, hx-reswap, hx-retarget, \
     hx-trigger, hx-trigger-after-settle, hx-trigger-after-swap",
);
const VARY: HeaderValue = HeaderValue::from_static("origin");
const VARY_PREFLIGHT: HeaderValue =
    HeaderValue::from_static("access-control-request-method, access-control-request-headers");
const YES: HeaderValue = HeaderValue::from_static("true");

/// The origin of the page that asks, if its page may read the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Origin(HeaderValue);

impl Origin {
    /// Of a request on the relay's own host.
    pub fn allowed(config: &CorsConfig, headers: &HeaderMap) -> Option<Self> {
        let mut sent = headers.get_all(header::ORIGIN).iter();
        let (Some(origin), None) = (sent.next(), sent.next()) else {
            return None;
        };
        let allowed = config.origins.iter().any(|allowed| allowed == "*" || origin == allowed);
        allowed.then(|| Self(origin.clone()))
    }

    /// Tells the browser, in place of whatever the upstream may have told it.
    pub fn tell(self, headers: &mut HeaderMap) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, self.0);
        headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, YES);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
        headers.append(header::VARY, VARY);
    }
}

/// The answer to a preflight, which carries no credential and reaches no client; [`Origin::tell`] completes it.
pub(super) fn preflight() -> Response<OutBody> {
    let mut response = Response::new(OutBody::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, METHODS);
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HEADERS);
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    headers.insert(header::VARY, VARY_PREFLIGHT);
    response
}

/// Whether a browser asks what it may ask for. Any other OPTIONS is the client's.
pub(super) fn is_preflight(parts: &Parts) -> bool {
    parts.method == Method::OPTIONS && parts.headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(origins: &[&str], sent: &[&'static str]) -> Option<Origin> {
        let origins = origins.iter().map(|&origin| origin.to_owned()).collect();
        let sent = sent
            .iter()
            .map(|&origin| (header::ORIGIN, HeaderValue::from_static(origin)));
        Origin::allowed(&CorsConfig { origins }, &sent.collect())
    }

    #[test]
    fn an_origin_is_allowed_when_it_is_named_and_alone() {
        let app = "https://app.example.org";
        assert!(allowed(&["*"], &["null"]).is_some());
        assert!(allowed(&["tauri://localhost", app], &[app]).is_some());
        for sent in [
            "https://app.example.org.evil",
            "http://app.example.org",
            "https://app.example.org:8443",
            "null",
        ] {
            assert_eq!(allowed(&[app], &[sent]), None, "{sent}");
        }
        assert_eq!(allowed(&[], &[app]), None);
        assert_eq!(allowed(&["*"], &[]), None);
        assert_eq!(allowed(&["*"], &[app, app]), None);
    }

    #[test]
    fn what_the_upstream_said_of_other_origins_is_replaced() {
        let mut headers = HeaderMap::new();
        headers.insert("access-control-allow-origin", HeaderValue::from_static("*"));
        headers.insert("vary", HeaderValue::from_static("accept"));
        let origin = allowed(&["*"], &["https://a"]).expect("allowed");
        origin.tell(&mut headers);
        assert_eq!(headers["access-control-allow-origin"], "https://a");
        assert_eq!(headers["access-control-allow-credentials"], "true");
        let vary: Vec<_> = headers.get_all("vary").iter().collect();
        assert_eq!(vary, ["accept", "origin"]);
    }
}
