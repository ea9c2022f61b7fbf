//! What a folder holds at one moment, while writers and sealers change it; and the manifests in it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, ErrorKind},
    path::Path,
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{
    disk::ReadMode,
    folder::{Cache, JOURNAL, MANIFEST, PARTIAL, SHARD, is_shard_name, manifest_name},
    journal::JournalTable,
    shard::Shard,
    shard_writer::Written,
    source::Source,
};
use crate::{Error, Result, file_format::Hex};

/// How often the folder may change while it is opened.
pub const TRIES: u32 = 200;
pub const PAUSE: Duration = Duration::from_millis(5);

/// More bytes than any manifest has, with fields of later versions: what is read of one at most.
const LARGEST_MANIFEST: u64 = 1 << 20;

/// The names of a folder at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    pub manifests: BTreeSet<String>,
    pub shards: BTreeSet<String>,
    pub journals: BTreeSet<String>,
    /// Unfinished files, of living writers or of ones that died.
    pub partials: BTreeSet<String>,
}

impl Listing {
    fn once(cache: &Cache) -> Result<Self> {
        let folder = cache.folder();
        let names = cache.disk.list(folder).map_err(Error::io(folder))?;
        let mut listing = Self::default();
        for name in names {
            let extension = name.split_once('.').map_or("", |(_, extension)| extension);
            match extension {
                MANIFEST => listing.manifests.insert(name),
                SHARD => listing.shards.insert(name),
                JOURNAL => listing.journals.insert(name),
                PARTIAL => listing.partials.insert(name),
                _ => false,
            };
        }
        Ok(listing)
    }

    /// Lists until two lists agree.
    ///
    /// A file that came or went while a list was made may be in it or not. What replaces a file is
    /// durable before that file is removed, so a list that misses both differs from the one before.
    pub fn stable(cache: &Cache) -> Result<Self> {
        let mut before = Self::once(cache)?;
        for _ in 0..TRIES {
            let now = Self::once(cache)?;
            if now == before {
                return Ok(now);
            }
            before = now;
            thread::sleep(PAUSE);
        }
        Err(busy(cache.folder()))
    }
}

pub fn busy(folder: &Path) -> Error {
    let error = io::Error::new(ErrorKind::TimedOut, "the folder never stood still");
    Error::io(folder)(error)
}

/// All records of a folder as it is now: shards first, then journals, each by name.
pub fn open_sources(cache: &Cache, mode: ReadMode) -> Result<Vec<Source>> {
    with_stable_listing(cache, |listing| open_all(cache, listing, mode))
}

/// Lists the folder and opens what is in it; again if a file was removed before it was opened.
pub fn with_stable_listing<T>(cache: &Cache, open: impl Fn(&Listing) -> Result<T>) -> Result<T> {
    for _ in 0..TRIES {
        match open(&Listing::stable(cache)?) {
            // Removed after it was listed, because its records are in another file now.
            Err(error) if is_gone(&error) => thread::sleep(PAUSE),
            opened => return opened,
        }
    }
    Err(busy(cache.folder()))
}

/// Whether a listed file has been removed.
pub fn is_gone(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == ErrorKind::NotFound)
}

fn open_all(cache: &Cache, listing: &Listing, mode: ReadMode) -> Result<Vec<Source>> {
    let shards = read_manifests(cache, listing)?.into_values();
    let shards = shards.map(|manifest| open_shard(cache, &manifest, listing, mode));
    let journals = listing.journals.iter().map(|name| {
        let journal = JournalTable::open(cache, cache.path(name));
        journal.map(Source::Journal)
    });
    shards
        .map(|shard| shard.map(Source::Shard))
        .chain(journals)
        .collect()
}

/// The manifests by the name of their shard.
pub fn read_manifests(cache: &Cache, listing: &Listing) -> Result<BTreeMap<String, Manifest>> {
    let read = |name: &String| {
        let manifest = read_manifest(cache, &cache.path(name))?;
        Ok((manifest.shard.clone(), manifest))
    };
    listing.manifests.iter().map(read).collect()
}

pub fn read_manifest(cache: &Cache, path: &Path) -> Result<Manifest> {
    let read = || {
        let file = cache.disk.open(path)?;
        let mut bytes = vec![0; file.length()?.min(LARGEST_MANIFEST) as usize];
        file.read_at(&mut bytes, 0)?;
        Ok(bytes)
    };
    let bytes = read().map_err(Error::io(path))?;
    Manifest::decode(cache, path, &bytes)
}

/// Opens the shard that a manifest names.
pub fn open_shard(
    cache: &Cache,
    manifest: &Manifest,
    listing: &Listing,
    mode: ReadMode,
) -> Result<Shard> {
    let path = cache.path(&manifest.shard);
    if !listing.shards.contains(&manifest.shard) {
        let rows = manifest.rows;
        let reason = format!(
            "it is gone, with {rows} completions: restore it, or remove {} and score them again",
            manifest.name()
        );
        return Err(Error::cache(&path, reason));
    }
    let shard = Shard::open(cache, path, manifest.bytes, mode)?;
    if (shard.seal, shard.rows()) != (manifest.seal, manifest.rows) {
        let reason = format!("it is another shard than {} names", manifest.name());
        return Err(Error::cache(shard.path(), reason));
    }
    Ok(shard)
}

const FORMAT: &str = "logratio.cache";
const VERSION: u32 = 1;
/// The text around the checksum, which is the last field.
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
        } else if path != cache.path(&manifest.name()) || !is_shard_name(&manifest.shard) {
            Err(refuse(format!("it is the manifest of {}", manifest.shard)))
        } else {
            Ok(manifest)
        }
    }
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
