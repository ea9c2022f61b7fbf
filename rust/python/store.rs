//! `StoreWriter`, `Store` and `Plan`.

use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use numpy::{PyArray1, PyArray2, PyReadonlyArray1};
use pyo3::prelude::*;

use super::{
    array,
    layout::{PaddedLayout, SharedLayout},
    matrix,
};
use crate::{Error, group, layout, plan, store, wire::Hex};

/// Collect groups and seal them as a store, at `path` or in memory.
///
/// With a path, columns are spooled to `<path>.partial` and nameless files beside it; `finish`
/// syncs and renames. An unfinished writer removes its file.
#[pyclass(frozen, module = "logratio._rust")]
pub struct StoreWriter(Mutex<Option<store::StoreWriter>>);

impl StoreWriter {
    fn lock(&self) -> MutexGuard<'_, Option<store::StoreWriter>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn closed() -> Error {
    Error::Closed {
        what: "store writer",
    }
}

#[pymethods]
impl StoreWriter {
    #[new]
    #[pyo3(signature = (path = None))]
    fn new(py: Python<'_>, path: Option<PathBuf>) -> PyResult<Self> {
        let writer = py.detach(|| match &path {
            Some(path) => store::StoreWriter::create(path),
            None => Ok(store::StoreWriter::in_memory()),
        });
        Ok(Self(Mutex::new(Some(writer?))))
    }

    /// Add one prompt and its completions, end to end.
    ///
    /// A refused group (ValueError) leaves the writer as it was; after an OSError it takes no more.
    #[expect(clippy::too_many_arguments, reason = "the columns of a group")]
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
    ) -> PyResult<()> {
        let group = group::Group {
            prompt_ids: prompt_ids.as_slice()?,
            completion_ids: completion_ids.as_slice()?,
            completion_mask: completion_mask.as_slice()?,
            completion_lengths: completion_lengths.as_slice()?,
            roles: roles.as_slice()?,
            file,
            line,
        };
        let push = || self.lock().as_mut().ok_or_else(closed)?.push(&group);
        Ok(py.detach(push)?)
    }

    /// Seal the store with a JSON text of your own and open it.
    #[pyo3(signature = (metadata = "{}"))]
    fn finish(&self, py: Python<'_>, metadata: &str) -> PyResult<Store> {
        let finish = || self.lock().take().ok_or_else(closed)?.finish(metadata);
        Ok(Store(py.detach(finish)?))
    }
}

/// Every group of a dataset in flat, memory-mapped columns.
#[pyclass(frozen, module = "logratio._rust")]
pub struct Store(pub(super) store::Store);

#[pymethods]
impl Store {
    /// Map a sealed store after checking its header, footer, sizes and offsets.
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self(py.detach(|| store::Store::open(&path))?))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// Number of completions.
    #[getter]
    fn completions(&self) -> usize {
        self.0.completions()
    }

    /// Number of tokens, each prompt counted once.
    #[getter]
    fn tokens(&self) -> usize {
        self.0.tokens()
    }

    /// The writer's JSON text.
    #[getter]
    fn metadata(&self) -> &str {
        self.0.metadata()
    }

    /// Hash of the columns, without the metadata, in hex.
    #[getter]
    fn digest(&self) -> String {
        Hex(&self.0.digest()).to_string()
    }

    /// Compare every column with its checksum.
    fn verify(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.0.verify())?)
    }

    /// Tokens of each group, its prompt counted once: `[G]`.
    fn shared_lengths(&self, py: Python<'_>) -> Py<PyArray1<u32>> {
        array(py, py.detach(|| self.0.shared_lengths()))
    }

    /// Tokens of each prompt: `[G]`.
    fn prompt_lengths(&self, py: Python<'_>) -> Py<PyArray1<u32>> {
        array(py, py.detach(|| self.0.prompt_lengths()))
    }

    /// Tokens of each completion: `[N]`.
    fn completion_lengths(&self, py: Python<'_>) -> Py<PyArray1<u32>> {
        array(py, py.detach(|| self.0.completion_lengths()))
    }

    /// Tokens of each completion that count: `[N]`.
    fn counted_lengths(&self, py: Python<'_>) -> Py<PyArray1<u32>> {
        array(py, py.detach(|| self.0.counted_lengths()))
    }

    /// Where the completions of each group begin, and their number: `[G+1]`.
    fn completion_offsets(&self, py: Python<'_>) -> Py<PyArray1<i64>> {
        let offsets = self.0.completion_offsets();
        array(
            py,
            py.detach(|| offsets.iter().map(|&offset| offset as i64).collect()),
        )
    }

    /// Role number of each completion: `[N]`.
    fn roles(&self, py: Python<'_>) -> Py<PyArray1<u8>> {
        array(py, py.detach(|| self.0.roles().to_vec()))
    }

    /// File number and line of each group: `[G]`, `[G]`.
    fn sources(&self, py: Python<'_>) -> (Py<PyArray1<u32>>, Py<PyArray1<u64>>) {
        let (files, lines) = py.detach(|| (self.0.files().to_vec(), self.0.lines().to_vec()));
        (array(py, files), array(py, lines))
    }

    /// Content key of each completion in its prompt: `[N, 32]`.
    fn keys(&self, py: Python<'_>) -> PyResult<Py<PyArray2<u8>>> {
        let keys = py.detach(|| self.0.keys().into_flattened());
        matrix(py, keys, [self.0.completions(), 32])
    }

    /// One group: prompt ids, ids and mask of each completion, role numbers.
    #[expect(clippy::type_complexity, reason = "the shape of a group in Python")]
    fn group(
        &self,
        py: Python<'_>,
        index: i64,
    ) -> PyResult<(
        Py<PyArray1<i32>>,
        Vec<Py<PyArray1<i32>>>,
        Vec<Py<PyArray1<u8>>>,
        Py<PyArray1<u8>>,
    )> {
        let group = self.0.group(index)?;
        let ids = group
            .completions()
            .map(|completion| array(py, completion.ids.to_vec()));
        let masks = group
            .completions()
            .map(|completion| array(py, completion.mask.to_vec()));
        let prompt = array(py, group.prompt().to_vec());
        Ok((
            prompt,
            ids.collect(),
            masks.collect(),
            array(py, group.roles().to_vec()),
        ))
    }

    /// Plan one rank's share of an epoch: updates of groups, cut into micro-batches.
    ///
    /// `order` is "length_grouped" (random updates of similar lengths), "shuffled" or "sorted"
    /// (longest first, nothing random). A micro-batch costs its tokens ("shared") or its rows times
    /// its longest row ("padded"), at most `token_budget`; a group above it stands alone.
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    #[pyo3(signature = (*, order, seed = 0, epoch = 0, groups_per_update, token_budget, layout = "shared", rank = 0, world_size = 1))]
    fn plan(
        &self,
        py: Python<'_>,
        order: &str,
        seed: u64,
        epoch: u64,
        groups_per_update: usize,
        token_budget: usize,
        layout: &str,
        rank: usize,
        world_size: usize,
    ) -> PyResult<Plan> {
        let (order, layout) = (order.parse()?, layout.parse()?);
        let request = plan::Request {
            order,
            seed,
            epoch,
            groups_per_update,
            token_budget,
            layout,
            rank,
            world_size,
        };
        let plan = py.detach(|| plan::plan(&self.0.shapes(), &request))?;
        Ok(Plan {
            order: array(py, plan.order),
            micro_offsets: array(py, plan.micro_offsets),
            update_offsets: array(py, plan.update_offsets),
        })
    }

    /// Lay out groups end to end in one row, without padding.
    fn shared_layout<'py>(
        &self,
        py: Python<'py>,
        groups: PyReadonlyArray1<'py, i64>,
    ) -> PyResult<Bound<'py, SharedLayout>> {
        let groups = groups.as_slice()?;
        SharedLayout::from_rust(py, py.detach(|| layout::Shared::new(&self.0, groups))?)
    }

    /// Lay out groups as right-padded rows, one a completion, completion-major.
    fn padded_layout<'py>(
        &self,
        py: Python<'py>,
        groups: PyReadonlyArray1<'py, i64>,
    ) -> PyResult<Bound<'py, PaddedLayout>> {
        let groups = groups.as_slice()?;
        PaddedLayout::from_rust(py, py.detach(|| layout::Padded::new(&self.0, groups))?)
    }
}

/// One rank's share of an epoch: updates are made of micro-batches, micro-batches of groups.
#[pyclass(frozen, get_all, module = "logratio._rust")]
pub struct Plan {
    /// Group numbers.
    order: Py<PyArray1<i64>>,
    /// Where each micro-batch begins in `order`, and its length: `[M+1]`.
    micro_offsets: Py<PyArray1<i64>>,
    /// Where each update begins in the micro-batches, and their number: `[U+1]`.
    update_offsets: Py<PyArray1<i64>>,
}
