//! `CacheWriter`, `CacheReader`, `CacheFolder` and their key.

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use numpy::{PyArray1, PyArray2, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::{
    prelude::*,
    types::{PyBytes, PyDict},
};

use super::convert::{ArgumentError, array, matrix};
use crate::{
    Error, Result,
    cache::{self, Cache, Compacted, Part, ReadMode, Report, Slice, ValueKind},
    content_key as key,
};

/// The folder of one reference, of per-token values or of sums.
fn folder(folder: PathBuf, fingerprint: [u8; 32], sums: bool) -> Cache {
    let kind = if sums {
        ValueKind::Sums
    } else {
        ValueKind::PerToken
    };
    Cache::new(folder, fingerprint).with_kind(kind)
}

/// Records of one key may be `tolerance` apart: nats a token.
fn tolerant(cache: Cache, tolerance: Option<f32>) -> Cache {
    match tolerance {
        Some(tolerance) => cache.with_tolerance(tolerance),
        None => cache,
    }
}

/// Append log-probs to a new journal in `folder`, which is created if need be.
///
/// Any number of writers may share a folder. `fingerprint` is 32 bytes that name the reference.
/// With `sums`, the folder keeps one sum a completion.
#[pyclass(frozen, module = "logratio._rust")]
pub struct CacheWriter(Mutex<Option<cache::CacheWriter>>);

#[pymethods]
impl CacheWriter {
    #[new]
    #[pyo3(signature = (folder, fingerprint, *, sums=false))]
    fn new(py: Python<'_>, folder: PathBuf, fingerprint: [u8; 32], sums: bool) -> PyResult<Self> {
        let writer = py.detach(|| self::folder(folder, fingerprint, sums).writer())?;
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
        Ok(py.detach(|| self.with(|writer| writer.append(keys, offsets, logps)))?)
    }

    /// Append one block of sums, each over `tokens` tokens, with the same promise.
    fn append_sums(
        &self,
        py: Python<'_>,
        keys: PyReadonlyArray2<'_, u8>,
        tokens: PyReadonlyArray1<'_, u32>,
        sums: PyReadonlyArray1<'_, f64>,
    ) -> PyResult<()> {
        let (keys, tokens, sums) = (rows(&keys)?, tokens.as_slice()?, sums.as_slice()?);
        Ok(py.detach(|| self.with(|writer| writer.append_sums(keys, tokens, sums)))?)
    }

    /// Bytes in the journal.
    #[getter]
    fn file_bytes(&self) -> PyResult<u64> {
        Ok(self.with(|writer| Ok(writer.bytes()))?)
    }

    /// Turn the journal into a sealed shard and return its name, None where nothing was appended.
    ///
    /// The writer is closed, whatever happens; when this fails, the journal stays and is read.
    fn seal(&self, py: Python<'_>) -> PyResult<Option<String>> {
        let seal = || match self.take() {
            Some(writer) => writer.seal(),
            None => Err(closed()),
        };
        Ok(py.detach(seal)?)
    }

    /// Let the journal go; one without a block is removed. Closing twice is no error.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.take()));
    }
}

impl CacheWriter {
    fn with<T>(&self, act: impl FnOnce(&mut cache::CacheWriter) -> Result<T>) -> Result<T> {
        let mut writer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        act(writer.as_mut().ok_or_else(closed)?)
    }

    fn take(&self) -> Option<cache::CacheWriter> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

fn closed() -> Error {
    let what = "cache writer";
    Error::Closed { what }
}

/// The values of one reference, as its folder stood when it was opened.
#[pyclass(frozen, module = "logratio._rust")]
pub struct CacheReader(cache::CacheReader);

#[pymethods]
impl CacheReader {
    /// Open every shard and journal of `folder`; writers may be at work.
    ///
    /// Journals are checked whole, shards by their seal now and block by block as they are read. A
    /// torn last block is skipped and counted. Damage, another fingerprint and impossible values
    /// are a CorruptCacheError. With `pread`, shards are not mapped: one that is cut while it is
    /// open is an error instead of a SIGBUS. Two records of one key may be `tolerance` nats a token
    /// apart (1e-3 where none is given), or they contradict each other.
    #[staticmethod]
    #[pyo3(signature = (folder, fingerprint, *, sums=false, pread=false, tolerance=None))]
    fn open(
        py: Python<'_>,
        folder: PathBuf,
        fingerprint: [u8; 32],
        sums: bool,
        pread: bool,
        tolerance: Option<f32>,
    ) -> PyResult<Self> {
        let mode = if pread {
            ReadMode::Pread
        } else {
            ReadMode::Map
        };
        let cache = tolerant(self::folder(folder, fingerprint, sums), tolerance);
        let open = || cache.open(mode);
        Ok(Self(py.detach(open)?))
    }

    /// Number of records, those that repeat a key included.
    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn __repr__(&self) -> String {
        let (records, tokens) = (self.0.len(), self.0.tokens());
        format!("CacheReader({records} records, {tokens} tokens)")
    }

    /// Number of tokens of all records.
    #[getter]
    fn tokens(&self) -> u64 {
        self.0.tokens()
    }

    /// Bytes of all files, as far as they were read.
    #[getter]
    fn file_bytes(&self) -> u64 {
        self.0.bytes()
    }

    /// Bytes behind the last whole block of the journals: unacknowledged, never read.
    #[getter]
    fn torn_bytes(&self) -> u64 {
        self.0.torn_bytes()
    }

    /// Number of different keys. Walks through all of them, and compares the records of each.
    fn distinct(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(py.detach(|| self.0.distinct())?)
    }

    /// Row number of each key, -1 where it is missing. Records of one key that contradict each
    /// other are a CorruptCacheError.
    fn join(&self, py: Python<'_>, keys: PyReadonlyArray2<'_, u8>) -> PyResult<Py<PyArray1<i64>>> {
        let keys = rows(&keys)?;
        Ok(array(py, py.detach(|| self.0.join(keys))?))
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

    /// Read rows by number: token counts `[n]` and sums `[n]`, over all tokens of a per-token cache.
    #[expect(clippy::type_complexity, reason = "two arrays")]
    fn read_sums(
        &self,
        py: Python<'_>,
        rows: PyReadonlyArray1<'_, i64>,
    ) -> PyResult<(Py<PyArray1<u32>>, Py<PyArray1<f64>>)> {
        let rows = rows.as_slice()?;
        let (tokens, sums) = py.detach(|| self.0.read_sums(rows))?;
        Ok((array(py, tokens), array(py, sums)))
    }

    /// Read up to `limit` keys above `after`, ascending, each once: keys `[n, 32]`, token counts
    /// `[n]`, log-probs end to end (empty for sums) and sums `[n]` (empty for log-probs).
    #[expect(clippy::type_complexity, reason = "four arrays")]
    fn slice(
        &self,
        py: Python<'_>,
        after: Option<[u8; 32]>,
        limit: usize,
    ) -> PyResult<(
        Py<PyArray2<u8>>,
        Py<PyArray1<u32>>,
        Py<PyArray1<f32>>,
        Py<PyArray1<f64>>,
    )> {
        let Slice {
            keys,
            tokens,
            logps,
            sums,
        } = py.detach(|| self.0.slice(after.as_ref(), limit))?;
        let rows = keys.len();
        Ok((
            matrix(py, keys.into_flattened(), [rows, 32])?,
            array(py, tokens),
            array(py, logps),
            array(py, sums),
        ))
    }
}

/// The folder of one reference: `fingerprint` is the 32 bytes that name it.
///
/// Two records of one key may be `tolerance` nats a token apart (1e-3 where none is given).
#[pyclass(frozen, module = "logratio._rust")]
pub struct CacheFolder {
    cache: Cache,
    fingerprint: [u8; 32],
    sums: bool,
    tolerance: Option<f32>,
}

#[pymethods]
impl CacheFolder {
    #[new]
    #[pyo3(signature = (folder, fingerprint, *, sums=false, tolerance=None))]
    fn new(folder: PathBuf, fingerprint: [u8; 32], sums: bool, tolerance: Option<f32>) -> Self {
        let cache = tolerant(self::folder(folder, fingerprint, sums), tolerance);
        Self {
            cache,
            fingerprint,
            sums,
            tolerance,
        }
    }

    /// Say what the folder holds: seals of shards and every byte of journals are checked.
    fn inspect<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        report(py, py.detach(|| self.cache.inspect())?)
    }

    /// Compare every byte with its checksum, the order of keys, every value, and all records of one
    /// key with each other.
    fn verify<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        report(py, py.detach(|| self.cache.verify())?)
    }

    /// Rewrite shards and idle journals as few shards with each key once; remove leftovers.
    ///
    /// Journals of other hosts are left alone unless `other_hosts` says that nobody writes there.
    #[pyo3(signature = (*, other_hosts=false))]
    fn compact<'py>(&self, py: Python<'py>, other_hosts: bool) -> PyResult<Bound<'py, PyDict>> {
        compacted(py, py.detach(|| self.cache.compact(other_hosts))?)
    }

    /// Turn journals whose writers are gone into shards; other shards stay as they are.
    #[pyo3(signature = (*, other_hosts=false))]
    fn seal_idle<'py>(&self, py: Python<'py>, other_hosts: bool) -> PyResult<Bound<'py, PyDict>> {
        compacted(py, py.detach(|| self.cache.seal_idle(other_hosts))?)
    }

    /// Add the records of other folders of the same reference that this one lacks.
    fn merge<'py>(&self, py: Python<'py>, folders: Vec<PathBuf>) -> PyResult<Bound<'py, PyDict>> {
        let others: Vec<Cache> = folders
            .into_iter()
            .map(|path| tolerant(folder(path, self.fingerprint, self.sums), self.tolerance))
            .collect();
        compacted(py, py.detach(|| self.cache.merge(&others))?)
    }
}

fn report(py: Python<'_>, report: Report) -> PyResult<Bound<'_, PyDict>> {
    let parts = report.parts.iter().map(|part| self::part(py, part));
    let fields = PyDict::new(py);
    fields.set_item("whole", report.is_whole())?;
    fields.set_item("parts", parts.collect::<PyResult<Vec<_>>>()?)?;
    fields.set_item("distinct", report.distinct)?;
    fields.set_item("leftovers", report.leftovers)?;
    fields.set_item("problems", report.problems)?;
    Ok(fields)
}

fn part<'py>(py: Python<'py>, part: &Part) -> PyResult<Bound<'py, PyDict>> {
    let fields = PyDict::new(py);
    fields.set_item("name", &part.name)?;
    fields.set_item("sealed", part.sealed)?;
    fields.set_item("in_use", part.in_use)?;
    fields.set_item("rows", part.rows)?;
    fields.set_item("tokens", part.tokens)?;
    fields.set_item("bytes", part.bytes)?;
    fields.set_item("torn", part.torn)?;
    fields.set_item("problem", &part.problem)?;
    Ok(fields)
}

fn compacted(py: Python<'_>, done: Compacted) -> PyResult<Bound<'_, PyDict>> {
    let fields = PyDict::new(py);
    fields.set_item("completions", done.completions)?;
    fields.set_item("repeats", done.repeats)?;
    fields.set_item("shards", done.shards)?;
    fields.set_item("removed", done.removed)?;
    fields.set_item("in_use", done.in_use)?;
    Ok(fields)
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
    let key = py.detach(|| key::content_key(ids, start))?;
    Ok(PyBytes::new(py, &key))
}

fn rows<'a>(keys: &'a PyReadonlyArray2<'_, u8>) -> PyResult<&'a [key::Key]> {
    if keys.shape()[1] != size_of::<key::Key>() {
        let shape = keys.shape();
        return Err(ArgumentError::new_err(format!(
            "keys must be [n, 32], not {shape:?}"
        )));
    }
    Ok(keys.as_slice()?.as_chunks().0)
}
