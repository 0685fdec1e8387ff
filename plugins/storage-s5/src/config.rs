//! What the operator may set.

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fabstir_plugin_api::prelude::*;
use reqwest::Url;
use zeroize::Zeroizing;

/// The `config` table of a storage-s5 entry in `plugins.toml`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where blobs are kept and looked for, best first. Required. Example: `[{ url = "https://s5.example.org", token_file = "/run/credentials/s5" }]`.
    pub portals: Vec<PortalConfig>,
    /// On how many portals a blob is when `put` returns. Default: `1`. Example: `2`.
    #[serde(default = "copies")]
    pub copies: u32,
    /// The largest blob that is sent in one request, in bytes, at most 33554432; larger ones go in chunks and are resumed where they broke off.
    /// Deployed portals take 32 MiB at once. Default: `32505856` (31 MiB). Example: `1048576`.
    #[serde(default = "single_max_bytes")]
    pub single_max_bytes: u64,
    /// How many bytes a chunk of a larger blob has, 65536 to 1073741824. Default: `16777216` (16 MiB). Example: `4194304`.
    #[serde(default = "chunk_bytes")]
    pub chunk_bytes: u64,
    /// How long a portal has to answer, to take some bytes, and to send a MiB of them, in milliseconds, 100 to 600000: then another is asked.
    /// Default: `30000`. Example: `5000`.
    #[serde(default = "timeout_ms")]
    pub timeout_ms: u64,
    /// The most bytes of disk that blobs may take on their way to and from portals. Default: no limit but that 1 GiB, or a tenth of a smaller disk,
    /// stays free. Example: `10737418240` (10 GiB).
    #[serde(default)]
    pub spool_max_bytes: Option<u64>,
}

/// A portal, and what it lets us in with.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PortalConfig {
    /// Its address. Required. Example: `"https://s5.example.org"`.
    pub url: String,
    /// The token of an account there. A file is the better place for it. Default: none. Example: `"T0xN.."`.
    #[serde(default)]
    pub token: Option<Token>,
    /// A file with the token in its only line, which nobody but its owner may read. A relative path starts at the instance's state folder.
    /// Default: none. Example: `"/run/credentials/fabstir-node/s5"`.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
}

/// A secret that no log shows.
#[derive(Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Token(String);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

fn copies() -> u32 {
    1
}

fn single_max_bytes() -> u64 {
    31 << 20
}

fn chunk_bytes() -> u64 {
    16 << 20
}

fn timeout_ms() -> u64 {
    30_000
}

/// A configuration that makes sense.
#[derive(Debug, Clone)]
pub struct Settings {
    pub portals: Vec<(Url, Option<Zeroizing<String>>)>,
    pub copies: usize,
    pub single_max: u64,
    pub chunk: u64,
    pub timeout: Duration,
    pub spool_max: Option<u64>,
}

impl Config {
    /// Refuses values that fit their types and make no sense, and reads the tokens.
    pub fn check(self, state_dir: &Path) -> Result<Settings> {
        if self.portals.is_empty() {
            return Err(PluginError::invalid(
                "`portals` is empty: name at least one, such as { url = \"https://s5.example.org\" }",
            ));
        }
        let bounded = |key: &str, value: u64, least: u64, most: u64| match (least..=most).contains(&value) {
            true => Ok(value),
            false => Err(PluginError::invalid(format!("`{key}` is {value}: it must be {least} to {most}"))),
        };
        let copies = bounded("copies", self.copies.into(), 1, self.portals.len() as u64)
            .map_err(|error| PluginError::invalid(format!("{error}, the number of portals")))?;
        if self.spool_max_bytes == Some(0) {
            return Err(PluginError::invalid("`spool_max_bytes` is 0, so no blob would fit: leave it out for no limit"));
        }
        let mut portals: Vec<(Url, Option<Zeroizing<String>>)> = Vec::new();
        for (place, portal) in (1..).zip(self.portals) {
            let wrong = |why: String| PluginError::invalid(format!("portal {place} of `portals`: {why}"));
            let url = address(&portal.url).map_err(wrong)?;
            if portals.iter().any(|(known, _)| *known == url) {
                return Err(wrong(format!("`url` {url} stands there twice")));
            }
            let token = match (portal.token, portal.token_file) {
                (Some(_), Some(_)) => return Err(wrong("`token` and `token_file` both: leave one out".into())),
                (Some(Token(token)), None) => Some(Zeroizing::new(token)),
                (None, Some(file)) => Some(read_token(&state_dir.join(file)).map_err(wrong)?),
                (None, None) => None,
            };
            if token.as_ref().is_some_and(|token| token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic())) {
                return Err(wrong("the token is empty, or has characters that no token has".into()));
            }
            portals.push((url, token));
        }
        Ok(Settings {
            portals,
            copies: copies as usize,
            single_max: bounded("single_max_bytes", self.single_max_bytes, 0, 32 << 20)?,
            chunk: bounded("chunk_bytes", self.chunk_bytes, 64 << 10, 1 << 30)?,
            timeout: Duration::from_millis(bounded("timeout_ms", self.timeout_ms, 100, 600_000)?),
            spool_max: self.spool_max_bytes,
        })
    }
}

/// A portal's address, with a path that ends in `/`, so that others can be appended.
fn address(text: &str) -> Result<Url, String> {
    let mut url: Url = text.parse().map_err(|error| format!("`url` {text:?} is no address: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(format!("`url` {text:?} begins with neither http:// nor https://"));
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err("`url` has a user, a query or a fragment: a token belongs into `token_file`".into());
    }
    if !url.path().ends_with('/') {
        url.set_path(&format!("{}/", url.path()));
    }
    Ok(url)
}

fn read_token(file: &Path) -> Result<Zeroizing<String>, String> {
    let failed = |error: std::io::Error| format!("`token_file` {} cannot be read: {error}", file.display());
    let mode = std::fs::metadata(file).map_err(failed)?.permissions().mode();
    if mode & 0o077 != 0 {
        let path = file.display();
        return Err(format!("`token_file` {path} is open to others (mode {:o}): run chmod 600 {path}", mode & 0o777));
    }
    let text = Zeroizing::new(std::fs::read_to_string(file).map_err(failed)?);
    Ok(Zeroizing::new(text.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: serde_json::Value, state_dir: &Path) -> Result<Settings> {
        let config: Config = serde_json::from_value(json).map_err(|error| PluginError::invalid(error.to_string()))?;
        config.check(state_dir)
    }

    fn with(key: &str, value: serde_json::Value) -> Result<Settings> {
        let mut json =
            serde_json::json!({ "portals": [{ "url": "http://127.0.0.1:5050" }, { "url": "https://s5.example.org/a" }] });
        json[key] = value;
        check(json, Path::new("/state"))
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        let settings = with("copies", 1.into()).unwrap();
        assert_eq!((settings.copies, settings.single_max, settings.chunk), (1, 31 << 20, 16 << 20));
        assert_eq!((settings.timeout, settings.spool_max), (Duration::from_secs(30), None));
        let urls: Vec<&str> = settings.portals.iter().map(|(url, _)| url.as_str()).collect();
        assert_eq!(urls, ["http://127.0.0.1:5050/", "https://s5.example.org/a/"]);
    }

    #[test]
    fn each_key_that_makes_no_sense_is_named() {
        let wrong = [
            ("portals", serde_json::json!([])),
            ("copies", 0.into()),
            ("copies", 3.into()),
            ("single_max_bytes", (40 << 20).into()),
            ("chunk_bytes", 1000.into()),
            ("timeout_ms", 1.into()),
            ("spool_max_bytes", 0.into()),
            ("portal", "x".into()),
        ];
        for (key, value) in wrong {
            let error = with(key, value).expect_err(key);
            assert!(error.message.contains(key), "{key}: {error}");
        }
        for url in
            ["", "s5.example.org", "ftp://s5.example.org", "http://user@s5.example.org", "http://s5.example.org/?auth_token=x"]
        {
            let error = with("portals", serde_json::json!([{ "url": url }])).expect_err(url);
            assert!(error.message.contains("portal 1") && error.message.contains("url"), "{error}");
        }
        let twice = with("portals", serde_json::json!([{ "url": "http://a" }, { "url": "http://a/" }])).expect_err("is the same");
        assert!(twice.message.contains("twice"), "{twice}");
    }

    #[test]
    fn token_comes_from_a_file_that_nobody_else_may_read_and_is_never_shown() {
        let state = tempfile::tempdir().unwrap();
        let file = state.path().join("token");
        std::fs::write(&file, "s3cret\n").unwrap();
        let json = || serde_json::json!({ "portals": [{ "url": "http://a", "token_file": "token" }] });
        let mode = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(0o644);
        assert!(check(json(), state.path()).unwrap_err().message.contains("chmod 600"));
        mode(0o600);
        let settings = check(json(), state.path()).unwrap();
        assert_eq!(settings.portals[0].1.as_ref().map(|token| token.as_str()), Some("s3cret"));

        let mut both = json();
        both["portals"][0]["token"] = "t0ken".into();
        let config: Config = serde_json::from_value(both.clone()).unwrap();
        assert!(!format!("{config:?}").contains("t0ken"));
        assert!(check(both, state.path()).unwrap_err().message.contains("both"));
    }
}
