//! A store of some groups of another.

use std::path::Path;

use super::{Store, StoreWriter, columns::Columns, stored::stored};
use crate::{Error, Result};

impl Store {
    /// Seals the groups for which `keep` holds as a store of their own, in the same order, at
    /// `path` or in memory. Groups are copied one by one, so that memory stays bounded.
    pub fn select(&self, keep: &[bool], path: Option<&Path>, metadata: &str) -> Result<Self> {
        if keep.len() != self.len() {
            let (found, groups) = (keep.len(), self.len());
            let reason = format!("keep has {found} values for {groups} groups");
            return Err(Error::Invalid(reason));
        }
        let (files, lines) = (self.files()?, self.lines()?);
        let mut writer = path.map_or_else(|| Ok(StoreWriter::in_memory()), StoreWriter::create)?;
        let mut lengths = Vec::new();
        for index in (0..keep.len()).filter(|&index| keep[index]) {
            let group = stored(self, index)?.to_push(&mut lengths, files[index], lines[index]);
            let refused = |error| match error {
                Error::Invalid(reason) => self.corrupt(format!("group {index}: {reason}")),
                error => error,
            };
            writer.push(&group).map_err(refused)?;
        }
        writer.finish(metadata)
    }
}
