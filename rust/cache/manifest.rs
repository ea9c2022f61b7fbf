//! The manifest that makes a shard part of the cache.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Cache, shard_writer::Written};
use crate::{Error, Result, wire::Hex};

pub const EXTENSION: &str = "manifest.json";
const FORMAT: &str = "logratio.cache";
const VERSION: u32 = 1;
/// What stands before and behind the checksum, which is the last field.
const CRC_BEFORE: &str = ",\n  \"crc32c\": \"";
const CRC_BEHIND: &str = "\"\n}\n";

/// One shard of the folder, as its manifest names it. Unknown fields are of later versions of
/// this format and mean nothing to this one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: String,
    pub version: u32,
    pub fingerprint: String,
    pub kind: String,
    /// File name of the shard.
    pub shard: String,
    pub bytes: u64,
    pub rows: u64,
    pub tokens: u64,
    pub sha256: String,
    /// CRC32C of the shard's tail, by which the shard is known at open.
    pub seal: u32,
}

/// What every version of a manifest has, whatever else it lacks.
#[derive(Deserialize)]
struct Version {
    format: String,
    version: u32,
}

impl Manifest {
    pub fn new(cache: &Cache, written: &Written) -> Self {
        Self {
            format: FORMAT.into(),
            version: VERSION,
            fingerprint: Hex(&cache.fingerprint).to_string(),
            kind: cache.kind.name().into(),
            shard: written.name.clone(),
            bytes: written.bytes,
            rows: written.rows,
            tokens: written.tokens,
            sha256: written.sha256.clone(),
            seal: written.seal,
        }
    }

    /// The manifest's file name: the shard's, with another ending. No two writers share one unless
    /// they wrote the same bytes.
    pub fn name(&self) -> String {
        manifest_name(&self.shard)
    }

    /// As JSON whose last field is the CRC32C of everything before it.
    pub fn encode(&self) -> Vec<u8> {
        let json = serde_json::to_string_pretty(self).expect("strings and numbers");
        let body = json.trim_end_matches("\n}");
        let crc = crc32c::crc32c(body.as_bytes());
        format!("{body}{CRC_BEFORE}{crc:08x}{CRC_BEHIND}").into_bytes()
    }

    /// Reads and checks a manifest of this cache.
    pub fn decode(cache: &Cache, path: &Path, bytes: &[u8]) -> Result<Self> {
        let refuse = |reason: String| Error::cache(path, reason);
        let Some(body) = checked(bytes) else {
            return Err(refuse("the manifest's checksum does not match".into()));
        };
        let json = format!("{body}\n}}");
        let no_manifest = |error| refuse(format!("no manifest that this library reads: {error}"));
        let Version { format, version } = serde_json::from_str(&json).map_err(no_manifest)?;
        if format != FORMAT || version != VERSION {
            let reason = format!("{format} version {version}, this library reads {VERSION}");
            return Err(refuse(reason));
        }
        let manifest: Self = serde_json::from_str(&json).map_err(no_manifest)?;
        let wanted = Hex(&cache.fingerprint).to_string();
        if manifest.fingerprint != wanted {
            let found = &manifest.fingerprint;
            Err(refuse(format!(
                "it belongs to reference {found}, not to {wanted}"
            )))
        } else if manifest.kind != cache.kind.name() {
            let (found, wanted) = (&manifest.kind, cache.kind.name());
            Err(refuse(format!("it holds {found} values, not {wanted}")))
        } else if path != cache.path(&manifest.name()) || !is_plain(&manifest.shard) {
            Err(refuse(format!("it is the manifest of {}", manifest.shard)))
        } else {
            Ok(manifest)
        }
    }
}

/// The file name of the manifest of a shard with this one.
pub fn manifest_name(shard: &str) -> String {
    let stem = shard.split('.').next().unwrap_or_default();
    format!("{stem}.{EXTENSION}")
}

/// Whether this can only name a file of the folder.
fn is_plain(shard: &str) -> bool {
    let stem = shard.strip_suffix(&format!(".{}", super::shard::EXTENSION));
    stem.is_some_and(|stem| stem.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

/// Everything before the checksum, if that matches.
fn checked(bytes: &[u8]) -> Option<&str> {
    let text = str::from_utf8(bytes).ok()?;
    let rest = text.strip_suffix(CRC_BEHIND)?;
    let (body, crc) = rest.split_at_checked(rest.len().checked_sub(8)?)?;
    let body = body.strip_suffix(CRC_BEFORE)?;
    let matches = format!("{:08x}", crc32c::crc32c(body.as_bytes())) == crc;
    matches.then_some(body)
}
