//! What the operator may set.

use std::path::{Path, PathBuf};

use fabstir_plugin_api::prelude::*;

use crate::vectors::Limits;

/// The `config` table of a storage-disk entry in `plugins.toml`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The folder that holds the blobs; made if it is missing. A relative path starts at the instance's own state folder.
    /// Default: `blobs`. Example: "/var/lib/fabstir/blobs".
    pub dir: Option<PathBuf>,
    /// The most bytes that all blobs together may take, those on their way included. Default: no limit but the disk, of which 1 GiB stays
    /// free, or a tenth of a smaller one. Example: 107374182400 (100 GiB).
    pub max_bytes: Option<u64>,
    /// The most bytes that the vectors of all namespaces, with their keys and data, may take on the disk. Their indexes take about half
    /// as much again. Default: no limit but the disk. Example: 1073741824 (1 GiB).
    pub max_vector_bytes: Option<u64>,
    /// The most bytes of memory that the indexes of vectors may take together: about 1,100 for each vector of 384 numbers. Namespaces
    /// that find no room are searched row by row. Default: 1073741824 (1 GiB). Example: 268435456 (256 MiB).
    pub index_bytes: Option<u64>,
}

impl Config {
    /// What the vectors may take.
    pub fn vectors(&self) -> Limits {
        Limits {
            max_bytes: self.max_vector_bytes,
            index_bytes: self.index_bytes.unwrap_or(1 << 30),
            searches: std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 64),
        }
    }

    /// The folder that holds the blobs, for an instance with this state folder.
    pub fn folder(&self, state_dir: &Path) -> PathBuf {
        state_dir.join(self.dir.as_deref().unwrap_or(Path::new("blobs")))
    }

    /// Refuses values that fit their types and make no sense.
    pub fn check(&self) -> Result<()> {
        if self.max_bytes == Some(0) {
            return Err(PluginError::invalid("`max_bytes` is 0, so no blob would fit: leave it out for no limit"));
        }
        if self.max_vector_bytes == Some(0) {
            return Err(PluginError::invalid("`max_vector_bytes` is 0, so no vector would fit: leave it out for no limit"));
        }
        if self.dir.as_deref().is_some_and(|dir| dir.as_os_str().is_empty()) {
            return Err(PluginError::invalid("`dir` is empty: name a folder, or leave it out"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Config, serde_json::Error> {
        serde_json::from_str(json)
    }

    #[test]
    fn dir_defaults_to_blobs_in_the_state_folder_and_relative_paths_start_there() {
        let state = Path::new("/state/disk");
        assert_eq!(parse("{}").unwrap().folder(state), Path::new("/state/disk/blobs"));
        assert_eq!(parse(r#"{"dir": "cold"}"#).unwrap().folder(state), Path::new("/state/disk/cold"));
        assert_eq!(parse(r#"{"dir": "/srv/blobs"}"#).unwrap().folder(state), Path::new("/srv/blobs"));
        assert_eq!(parse(r#"{"dir": ""}"#).unwrap().check().unwrap_err().code, Code::InvalidArgument);
    }

    #[test]
    fn max_bytes_of_zero_is_refused() {
        assert_eq!(parse(r#"{"max_bytes": 1}"#).unwrap().check(), Ok(()));
        assert_eq!(parse(r#"{"max_bytes": 0}"#).unwrap().check().unwrap_err().code, Code::InvalidArgument);
    }

    #[test]
    fn vectors_have_their_own_limits() {
        let limits = |json| parse(json).unwrap().vectors();
        assert_eq!((limits("{}").max_bytes, limits("{}").index_bytes), (None, 1 << 30));
        assert_eq!(limits(r#"{"max_vector_bytes": 5}"#).max_bytes, Some(5));
        assert_eq!(limits(r#"{"index_bytes": 0}"#).index_bytes, 0);
        assert_eq!(parse(r#"{"max_vector_bytes": 0}"#).unwrap().check().unwrap_err().code, Code::InvalidArgument);
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert!(parse(r#"{"directory": "/srv"}"#).unwrap_err().to_string().contains("directory"));
    }
}
