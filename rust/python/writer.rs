//! `StoreWriter`.

use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use numpy::{PyArray1, PyArray2, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;

use super::{
    convert::{array, matrix, rows},
    store::Store,
};
use crate::{Error, Result, group, store};

/// Collect groups and seal them as a store, at `path` or in memory.
///
/// With a path, columns grow as files in the folder `<path>.partial`; `finish` joins them, syncs and
/// renames. An unfinished writer removes the folder, unless it made a checkpoint: then `resume` goes
/// on from there. With `deduplicate`, groups that say what an earlier one said are left out.
#[pyclass(frozen, module = "logratio._rust")]
pub struct StoreWriter(Mutex<Option<store::StoreWriter>>);

impl StoreWriter {
    fn of(writer: store::StoreWriter) -> Self {
        Self(Mutex::new(Some(writer)))
    }

    fn with<T>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut store::StoreWriter) -> Result<T> + Send,
    ) -> PyResult<T>
    where
        T: Send,
    {
        Ok(py.detach(|| work(self.lock().as_mut().ok_or_else(closed)?))?)
    }

    fn lock(&self) -> MutexGuard<'_, Option<store::StoreWriter>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn closed() -> Error {
    Error::Closed {
        what: "store writer",
    }
}

/// What became of a group, and the number of the earlier group it says the same or the opposite
/// of, or −1.
fn outcome(outcome: store::Outcome) -> (u8, i64) {
    match outcome {
        store::Outcome::Kept => (0, -1),
        store::Outcome::Duplicate(first) => (1, first as i64),
        store::Outcome::Opposite(first) => (2, first as i64),
    }
}

#[pymethods]
impl StoreWriter {
    #[new]
    #[pyo3(signature = (path = None, *, deduplicate = false))]
    fn new(py: Python<'_>, path: Option<PathBuf>, deduplicate: bool) -> PyResult<Self> {
        let writer = py.detach(|| {
            let writer = match &path {
                Some(path) => store::StoreWriter::create(path)?,
                None => store::StoreWriter::in_memory(),
            };
            if deduplicate {
                writer.deduplicating()
            } else {
                Ok(writer)
            }
        });
        Ok(Self::of(writer?))
    }

    /// Go on from the last checkpoint of a writer of `path` that died: (writer, note).
    ///
    /// None where there is no checkpoint, or the files are not what it says; a new writer replaces
    /// them. ValueError if that writer was made with another `deduplicate`.
    #[staticmethod]
    #[pyo3(signature = (path, *, deduplicate = false))]
    fn resume(
        py: Python<'_>,
        path: PathBuf,
        deduplicate: bool,
    ) -> PyResult<Option<(Self, String)>> {
        let found = py.detach(|| store::StoreWriter::resume(&path, deduplicate))?;
        Ok(found.map(|(writer, note)| (Self::of(writer), note)))
    }

    /// Number of groups so far.
    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        self.with(py, |writer| Ok(writer.len()))
    }

    /// Add one prompt and its completions, end to end; outcome and first as in `push_many`.
    ///
    /// `values` (`[K, 4]`) are in the order of VALUES, NaN where there is none; None: none at all.
    /// A refused group (ValueError) leaves the writer as it was; after an OSError it takes no more.
    #[expect(clippy::too_many_arguments, reason = "the columns of a group")]
    #[pyo3(signature = (
        prompt_ids, completion_ids, completion_mask, completion_lengths, roles, file, line,
        values = None
    ))]
    fn push(
        &self,
        py: Python<'_>,
        prompt_ids: PyReadonlyArray1<'_, i32>,
        completion_ids: PyReadonlyArray1<'_, i32>,
        completion_mask: PyReadonlyArray1<'_, u8>,
        completion_lengths: PyReadonlyArray1<'_, u32>,
        roles: PyReadonlyArray1<'_, u8>,
        file: u32,
        line: u64,
        values: Option<PyReadonlyArray2<'_, f32>>,
    ) -> PyResult<(u8, i64)> {
        let group = group::Group {
            prompt_ids: prompt_ids.as_slice()?,
            completion_ids: completion_ids.as_slice()?,
            completion_mask: completion_mask.as_slice()?,
            completion_lengths: completion_lengths.as_slice()?,
            roles: roles.as_slice()?,
            values: rows("values", values.as_ref())?,
            file,
            line,
        };
        self.with(py, |writer| writer.push(&group)).map(outcome)
    }

    /// Add `G` groups of `N` completions in all, end to end: `outcome` and `first`, `[G]` each.
    ///
    /// `values` (`[N, 4]`) are as in `push`. Outcome 0: kept. 1: left out, a duplicate of the kept
    /// group `first`, whose values stay. 2: kept, though group `first` says the opposite (chosen and
    /// rejected exchanged). `first` is −1 where there is none.
    /// A ValueError names the refused group by its index and nothing is added; after an OSError the
    /// writer takes no more.
    #[expect(clippy::too_many_arguments, reason = "the columns of a store")]
    #[pyo3(signature = (
        prompt_ids, prompt_lengths, completion_ids, completion_mask, completion_lengths,
        group_sizes, roles, files, lines, values = None
    ))]
    #[expect(clippy::type_complexity, reason = "two arrays")]
    fn push_many(
        &self,
        py: Python<'_>,
        prompt_ids: PyReadonlyArray1<'_, i32>,
        prompt_lengths: PyReadonlyArray1<'_, u32>,
        completion_ids: PyReadonlyArray1<'_, i32>,
        completion_mask: PyReadonlyArray1<'_, u8>,
        completion_lengths: PyReadonlyArray1<'_, u32>,
        group_sizes: PyReadonlyArray1<'_, u32>,
        roles: PyReadonlyArray1<'_, u8>,
        files: PyReadonlyArray1<'_, u32>,
        lines: PyReadonlyArray1<'_, u64>,
        values: Option<PyReadonlyArray2<'_, f32>>,
    ) -> PyResult<(Py<PyArray1<u8>>, Py<PyArray1<i64>>)> {
        let bulk = store::Bulk {
            prompt_ids: prompt_ids.as_slice()?,
            prompt_lengths: prompt_lengths.as_slice()?,
            completion_ids: completion_ids.as_slice()?,
            completion_mask: completion_mask.as_slice()?,
            completion_lengths: completion_lengths.as_slice()?,
            group_sizes: group_sizes.as_slice()?,
            roles: roles.as_slice()?,
            values: rows("values", values.as_ref())?,
            files: files.as_slice()?,
            lines: lines.as_slice()?,
        };
        let outcomes = self.with(py, |writer| writer.push_many(&bulk))?;
        let (outcomes, firsts) = outcomes.into_iter().map(outcome).unzip();
        Ok((array(py, outcomes), array(py, firsts)))
    }

    /// Groups that say the opposite of each other, the earlier first, and how often each was said:
    /// `[C, 2]`, `[C, 2]`. None where the writer does not deduplicate.
    #[expect(clippy::type_complexity, reason = "two arrays")]
    fn conflicts(&self, py: Python<'_>) -> PyResult<(Py<PyArray2<i64>>, Py<PyArray2<u32>>)> {
        let (groups, votes) = self.with(py, |writer| Ok(writer.conflicts()))?;
        let shape = [groups.len(), 2];
        let groups = groups.into_flattened().into_iter().map(i64::from).collect();
        Ok((
            matrix(py, groups, shape)?,
            matrix(py, votes.into_flattened(), shape)?,
        ))
    }

    /// File number and line of a group that was kept.
    fn place(&self, py: Python<'_>, group: i64) -> PyResult<(u32, u64)> {
        self.with(py, |writer| writer.place(group))
    }

    /// Make everything pushed so far, and `note`, survive `kill -9` and a loss of power.
    ///
    /// ValueError in memory.
    fn checkpoint(&self, py: Python<'_>, note: &str) -> PyResult<()> {
        self.with(py, |writer| writer.checkpoint(note))
    }

    /// Seal the store with a JSON text of your own and open it.
    #[pyo3(signature = (metadata = "{}"))]
    fn finish(&self, py: Python<'_>, metadata: &str) -> PyResult<Store> {
        let finish = || self.lock().take().ok_or_else(closed)?.finish(metadata);
        Ok(Store::of(py.detach(finish)?))
    }

    /// Let go of the files: what was saved by `checkpoint` stays, the rest is removed.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.lock().take()));
    }
}
