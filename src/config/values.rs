//! The small values of a configuration and how they are written: durations, sizes, networks.
//!
//! Written by hand rather than with `humantime-serde` and `bytesize`: two dozen lines, one grammar that the
//! documentation states in full, and errors that say what to write.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, de};

/// The longest duration of a configuration: longer ones are a slip of the unit, and this far cannot overflow a clock.
pub const MAX_DURATION: Duration = Duration::from_secs(24 * 60 * 60);

/// Why a text is not the value it should be: a phrase that follows the name of its key or flag.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub(crate) String);

/// Parses `250ms`, `5s`, `2m` or `1h`; at most [`MAX_DURATION`].
pub fn duration(text: &str) -> Result<Duration, Invalid> {
    let wrong = || {
        Invalid(format!(
            "`{text}` is not a duration: write a whole number and a unit, like \"250ms\", \"5s\", \"2m\" or \"1h\", at most \"24h\""
        ))
    };
    let (number, unit) = number_and_unit(text).ok_or_else(wrong)?;
    let milliseconds = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wrong()),
    };
    let duration = Duration::from_millis(number.checked_mul(milliseconds).ok_or_else(wrong)?);
    if duration > MAX_DURATION {
        return Err(wrong());
    }
    Ok(duration)
}

/// Parses `4096`, `32KiB`, `16MiB` or `1GiB` to bytes.
pub fn size(text: &str) -> Result<usize, Invalid> {
    let wrong = || {
        Invalid(format!(
            "`{text}` is not a size: write bytes, or a whole number and a unit, like 4096, \"32KiB\", \"16MiB\" or \"1GiB\""
        ))
    };
    let (number, unit) = number_and_unit(text).ok_or_else(wrong)?;
    let shift = match unit {
        "" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return Err(wrong()),
    };
    let bytes = number.checked_mul(1 << shift).ok_or_else(wrong)?;
    usize::try_from(bytes).map_err(|_| wrong())
}

/// Parses an address to listen on: `0.0.0.0:8080`, `[::]:8080`.
pub fn address(text: &str) -> Result<SocketAddr, Invalid> {
    let wrong = |_| {
        Invalid(format!(
            "`{text}` is not an address to listen on: write it like 0.0.0.0:8080 or 127.0.0.1:8080"
        ))
    };
    text.parse().map_err(wrong)
}

/// Parses a network (`10.0.0.0/8`) or a single address (`10.0.0.1`).
pub fn network(text: &str) -> Result<IpNet, Invalid> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| {
            Invalid(format!(
                "`{text}` is not a network: write it like 10.0.0.0/8 or 10.0.0.1"
            ))
        })
}

/// Parses networks separated by commas; none if the text is empty.
pub fn networks(text: &str) -> Result<Vec<IpNet>, Invalid> {
    text.split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(network)
        .collect()
}

/// Parses a value that may be empty, which means that it is not set.
pub fn optional<T: FromStr>(text: &str) -> Result<Option<T>, T::Err> {
    if text.is_empty() {
        Ok(None)
    } else {
        text.parse().map(Some)
    }
}

fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit.trim_start()))
}

/// Reads a TOML text or whole number as what `parse` makes of it.
fn de_text<'de, D: Deserializer<'de>, T, E: fmt::Display>(
    deserializer: D,
    parse: impl FnOnce(&str) -> Result<T, E>,
) -> Result<T, D::Error> {
    let text = deserializer.deserialize_any(TextOrNumber)?;
    parse(&text).map_err(de::Error::custom)
}

/// For `#[serde(deserialize_with)]`: see [`duration`].
pub(crate) fn de_duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    de_text(deserializer, duration)
}

/// For `#[serde(deserialize_with)]`: see [`address`].
pub(crate) fn de_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    de_text(deserializer, address)
}

/// For `#[serde(deserialize_with)]`: see [`size`].
pub(crate) fn de_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    de_text(deserializer, size)
}

/// For `#[serde(deserialize_with)]`: any value that parses from a text.
pub(crate) fn de_parsed<'de, D: Deserializer<'de>, T: FromStr<Err: fmt::Display>>(d: D) -> Result<T, D::Error> {
    de_text(d, str::parse)
}

/// For `#[serde(deserialize_with)]`: see [`optional`].
pub(crate) fn de_optional<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    de_text(deserializer, optional)
}

/// For `#[serde(deserialize_with)]`: an array of [`network`]s.
pub(crate) fn de_networks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts
        .iter()
        .map(|text| network(text).map_err(de::Error::custom))
        .collect()
}

struct TextOrNumber;

impl de::Visitor<'_> for TextOrNumber {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text or a whole number")
    }

    fn visit_str<E>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    fn visit_i64<E>(self, number: i64) -> Result<String, E> {
        Ok(number.to_string())
    }

    fn visit_u64<E>(self, number: u64) -> Result<String, E> {
        Ok(number.to_string())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_need_a_unit_and_an_end() {
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("24h"), Ok(MAX_DURATION));
        for bad in [
            "",
            "5",
            "s",
            "-1s",
            "+1s",
            "1.5s",
            "5 parsecs",
            "25h",
            "99999999999999999999s",
            "18446744073709551615h",
        ] {
            let error = duration(bad).expect_err(bad).to_string();
            assert!(error.contains("is not a duration"), "{error}");
        }
    }

    #[test]
    fn sizes_are_bytes_or_binary_units() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("16MiB"), Ok(16 << 20));
        assert_eq!(size("16 MiB"), Ok(16 << 20));
        for bad in [
            "",
            "KiB",
            "16MB",
            "16mib",
            "-1",
            "99999999999999999999",
            "99999999999999GiB",
        ] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn networks_are_networks_or_addresses() {
        let parsed = networks("10.0.0.0/8, ::1").expect("two networks");
        assert_eq!(
            parsed,
            ["10.0.0.0/8".parse().expect("v4"), "::1/128".parse().expect("v6")]
        );
        assert_eq!(networks(""), Ok(vec![]));
        assert!(networks("10.0.0.0/33").is_err());
        assert!(networks("example.org").is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = (duration(&text), size(&text), networks(&text));
        }
    }
}
