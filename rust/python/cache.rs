//! `CacheWriter`, `CacheReader` and their key.

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::{exceptions::PyValueError, prelude::*, types::PyBytes};

use super::array;
use crate::{
    Error, cache,
    fingerprint::{self, Key},
};

/// Append log-probs to a new journal of its own in `folder`, which is created if need be.
///
/// Any number of writers may share a folder. `fingerprint` is 32 bytes that name the reference.
#[pyclass(frozen, module = "logratio._rust")]
pub struct CacheWriter(Mutex<Option<cache::CacheWriter>>);

#[pymethods]
impl CacheWriter {
    #[new]
    fn new(py: Python<'_>, folder: PathBuf, fingerprint: [u8; 32]) -> PyResult<Self> {
        let writer = py.detach(|| cache::CacheWriter::create(&folder, &fingerprint))?;
        Ok(Self(Mutex::new(Some(writer))))
    }

    /// Append one block, which survives a loss of power when this returns.
    ///
    /// Record i has `keys[i]` and `logps[offsets[i]:offsets[i + 1]]`. Values that are not finite or
    /// above 1e-3 are a CorruptCacheError and nothing is written; after an OSError (disk full: errno
    /// ENOSPC) the writer takes no more, and a new one can go on.
    fn append(
        &self,
        py: Python<'_>,
        keys: PyReadonlyArray2<'_, u8>,
        offsets: PyReadonlyArray1<'_, i64>,
        logps: PyReadonlyArray1<'_, f32>,
    ) -> PyResult<()> {
        let (keys, offsets, logps) = (rows(&keys)?, offsets.as_slice()?, logps.as_slice()?);
        let closed = || Error::Closed {
            what: "cache writer",
        };
        let append = || {
            let mut writer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            writer
                .as_mut()
                .ok_or_else(closed)?
                .append(keys, offsets, logps)
        };
        Ok(py.detach(append)?)
    }

    /// Let the journal go; one without a block is removed. Closing twice is no error.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take()));
    }
}

/// The log-probs of one reference, as its folder stood when it was opened.
#[pyclass(frozen, module = "logratio._rust")]
pub struct CacheReader(cache::CacheReader);

#[pymethods]
impl CacheReader {
    /// Read every journal of `folder` and check every byte; writers may be at work.
    ///
    /// A torn last block is skipped and counted. Damage before a whole block, another fingerprint,
    /// impossible values and records that contradict each other are a CorruptCacheError.
    #[staticmethod]
    fn open(py: Python<'_>, folder: PathBuf, fingerprint: [u8; 32]) -> PyResult<Self> {
        Ok(Self(py.detach(|| {
            cache::CacheReader::open(&folder, &fingerprint)
        })?))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// Number of log-probs of all rows.
    #[getter]
    fn tokens(&self) -> u64 {
        self.0.tokens()
    }

    /// Bytes behind the last whole block of the journals: unacknowledged, never read.
    #[getter]
    fn torn_bytes(&self) -> u64 {
        self.0.torn_bytes()
    }

    /// Records left out because another with their key came first.
    #[getter]
    fn duplicates(&self) -> usize {
        self.0.duplicates()
    }

    /// Row number of each key, -1 where it is missing.
    fn join(&self, py: Python<'_>, keys: PyReadonlyArray2<'_, u8>) -> PyResult<Py<PyArray1<i64>>> {
        let keys = rows(&keys)?;
        Ok(array(py, py.detach(|| self.0.join(keys))))
    }

    /// Read rows by number: where each begins `[n+1]`, and their log-probs end to end.
    #[expect(clippy::type_complexity, reason = "two arrays")]
    fn read(
        &self,
        py: Python<'_>,
        rows: PyReadonlyArray1<'_, i64>,
    ) -> PyResult<(Py<PyArray1<i64>>, Py<PyArray1<f32>>)> {
        let rows = rows.as_slice()?;
        let (offsets, logps) = py.detach(|| self.0.read(rows))?;
        Ok((array(py, offsets), array(py, logps)))
    }
}

/// Hash one completion in its prompt: 32 bytes from the ids exactly as fed to the model
/// (prompt, then completion) and `start`, the length of the prompt.
#[pyfunction]
pub fn content_key<'py>(
    py: Python<'py>,
    ids: PyReadonlyArray1<'py, i32>,
    start: usize,
) -> PyResult<Bound<'py, PyBytes>> {
    let ids = ids.as_slice()?;
    let key = py.detach(|| fingerprint::content_key(ids, start))?;
    Ok(PyBytes::new(py, &key))
}

fn rows<'a>(keys: &'a PyReadonlyArray2<'_, u8>) -> PyResult<&'a [Key]> {
    if keys.shape()[1] != size_of::<Key>() {
        let shape = keys.shape();
        return Err(PyValueError::new_err(format!(
            "keys must be [n, 32], not {shape:?}"
        )));
    }
    Ok(keys.as_slice()?.as_chunks().0)
}
