//! What a folder holds at one moment, though writers and sealers are at work in it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::ErrorKind,
    path::Path,
    thread,
    time::Duration,
};

use super::{
    Cache, ReadMode, journal,
    journal_table::JournalTable,
    manifest::{self, Manifest},
    shard::{self, Shard},
    source::Source,
};
use crate::{Error, Result};

/// How often the folder may change while it is opened.
pub const TRIES: u32 = 200;
pub const PAUSE: Duration = Duration::from_millis(5);

/// The ending of files that are not finished.
pub const PARTIAL: &str = "partial";
/// More bytes than any manifest has, with fields of later versions: what is read of one at most.
const LARGEST_MANIFEST: u64 = 1 << 20;

/// The names of a folder at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    pub manifests: BTreeSet<String>,
    pub shards: BTreeSet<String>,
    pub journals: BTreeSet<String>,
    /// What writers that died may have left.
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
                manifest::EXTENSION => listing.manifests.insert(name),
                shard::EXTENSION => listing.shards.insert(name),
                journal::EXTENSION => listing.journals.insert(name),
                PARTIAL => listing.partials.insert(name),
                _ => false,
            };
        }
        Ok(listing)
    }

    /// Lists until two lists agree.
    ///
    /// A file that came or went while a list was made may be in it or not. What replaces a file is
    /// durable before that file goes, so that a list which misses both differs from the one before.
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
    let error = std::io::Error::new(ErrorKind::TimedOut, "the folder never stood still");
    Error::io(folder)(error)
}

/// All records of a folder as it stands now: shards first, then journals, each by name.
pub fn open_sources(cache: &Cache, mode: ReadMode) -> Result<Vec<Source>> {
    until_still(cache, |listing| open_all(cache, listing, mode))
}

/// Lists the folder and opens what is in it, again if a file is gone before it is open.
pub fn until_still<T>(cache: &Cache, open: impl Fn(&Listing) -> Result<T>) -> Result<T> {
    for _ in 0..TRIES {
        match open(&Listing::stable(cache)?) {
            // It went after it was listed, because its records are somewhere else now.
            Err(error) if is_gone(&error) => thread::sleep(PAUSE),
            opened => return opened,
        }
    }
    Err(busy(cache.folder()))
}

/// Whether a file that was listed is not there any more.
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
