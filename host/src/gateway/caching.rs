//! What HTTP says of the cache: `cache-control` in a request, `x-cache` in both.
//!
//! `cache-control` means what RFC 9111 (5.2.1) has it mean: `no-store`, `no-cache`, `only-if-cached` and `max-age`; a directive that is not
//! known is passed over, as it says there. `x-cache: any` in a request takes an earlier answer although a new one would be drawn anew.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::cache::{Found, Wish};

pub(super) const X_CACHE: HeaderName = HeaderName::from_static("x-cache");

/// `may_keep` is what the body says of it.
pub(super) fn wish(headers: &HeaderMap, may_keep: bool) -> Wish {
    let mut wish = Wish { no_store: !may_keep, ..Wish::default() };
    let texts = |name| headers.get_all(name).into_iter().filter_map(|value: &HeaderValue| value.to_str().ok());
    for directive in texts(header::CACHE_CONTROL).flat_map(|value| value.split(',')) {
        let (name, value) = directive.split_once('=').unwrap_or((directive, ""));
        match name.trim().to_ascii_lowercase().as_str() {
            "no-store" => wish.no_store = true,
            "no-cache" => wish.anew = true,
            "only-if-cached" => wish.only_kept = true,
            "max-age" => wish.max_age = value.trim().trim_matches('"').parse().ok().map(Duration::from_secs),
            _ => {}
        }
    }
    wish.any_draw = texts(X_CACHE).any(|value| value.trim().eq_ignore_ascii_case("any"));
    wish
}

/// `miss`, or `hit` and by what.
pub(super) fn told(found: Found) -> HeaderValue {
    let text = match found {
        Found::Miss => return HeaderValue::from_static("miss"),
        Found::Joined => "hit; layer=flight".to_owned(),
        Found::Alike { age, permille } => {
            format!("hit; layer=semantic; similarity={}.{:03}; age={}", permille / 1000, permille % 1000, age.as_secs())
        }
        Found::Kept { age } => format!("hit; layer=exact; age={}", age.as_secs()),
    };
    HeaderValue::try_from(text).expect("letters and digits are a header value")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directives_are_read_as_the_standard_has_them() {
        let of = |lines: &[(&str, &str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in lines {
                headers.append(HeaderName::try_from(*name).expect("a name"), value.parse().expect("a value"));
            }
            wish(&headers, true)
        };
        assert_eq!(of(&[]), Wish::default());
        assert!(of(&[("cache-control", "max-stale, No-Store")]).no_store);
        let both = of(&[("cache-control", "no-cache"), ("cache-control", "max-age=\"60\"")]);
        assert_eq!((both.anew, both.max_age), (true, Some(Duration::from_secs(60))));
        assert!(
            of(&[("cache-control", "only-if-cached"), ("x-cache", "Any")])
                == Wish { only_kept: true, any_draw: true, ..Wish::default() }
        );
        assert!(wish(&HeaderMap::new(), false).no_store);
    }
}
