//! What is done to a whole folder of a cache: looked at, checked, compacted, merged.

use std::path::PathBuf;

use pyo3::{prelude::*, types::PyDict};

use super::cache::{folder, tolerant};
use crate::cache::{Cache, Compacted, Part, Report};

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
