//! `SharedLayout`, `TreeLayout`, `PaddedLayout` and `CandidateLayout`.

use numpy::{PyArray1, PyArray2, PyArrayDescr, PyArrayMethods, PyReadonlyArray1};
use pyo3::{
    exceptions::PyAttributeError,
    prelude::*,
    sync::PyOnceLock,
    types::{PyDict, PyType},
};

use super::convert::{self, matrix};
use crate::{
    Error,
    layout::{Batch, Candidates, Dtype, Entry, Field, Options, Table},
    store,
};

/// The arrays of a batch, views of one buffer: what is scored is flat and group by group, equal in
/// both layouts.
#[pyclass(frozen, subclass, module = "logratio._rust")]
pub struct Layout {
    /// The buffer that holds every array: bytes.
    #[pyo3(get)]
    arena: Py<PyArray1<u8>>,
    table: Table,
}

/// A class whose arrays are attributes: what it has besides, then the name and the field of each.
macro_rules! arrays {
    ($class:ident { $($methods:tt)* } $($name:ident: $field:ident,)*) => {
        #[pymethods]
        impl $class {
            $($methods)*
            $(
                #[getter]
                fn $name<'py>(this: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
                    array(this.as_any().cast()?, Field::$field)
                }
            )*
        }
    };
}

arrays! {
    Layout {
        /// Bytes of the buffer that are in use, from its beginning on.
        #[getter]
        fn nbytes(&self) -> usize {
            self.table.bytes()
        }

        fn __repr__(this: &Bound<'_, Self>) -> PyResult<String> {
            let name = this.get_type().name()?;
            let table = &this.get().table;
            let shown = |field: Field| {
                let entry = table.get(field)?;
                Some(format!("{} {:?}", field.name(), shape(entry)))
            };
            let fields = [Field::Groups, Field::Completions, Field::InputIds];
            let arrays: Vec<_> = fields.into_iter().filter_map(shown).collect();
            Ok(format!("{name}({})", arrays.join(", ")))
        }

        /// Place of each array: name to dtype, first byte, shape.
        #[getter]
        fn table<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
            let table = PyDict::new(py);
            for entry in self.table.entries() {
                let place = (entry.dtype().name(), entry.offset, shape(entry));
                table.set_item(entry.field.name(), place)?;
            }
            Ok(table)
        }
    }
    input_ids: InputIds,
    attention_mask: AttentionMask,
    position_ids: PositionIds,
    token_mask: TokenMask,
    segment_ids: SegmentIds,
    logit_index: LogitIndex,
    target_ids: TargetIds,
    completion_mask: CompletionMask,
    completion_of: CompletionOf,
    completion_offsets: CompletionOffsets,
    prompt_lengths: PromptLengths,
    completion_lengths: CompletionLengths,
    group_sizes: GroupSizes,
    roles: Roles,
    groups: Groups,
    completions: Completions,
}

arrays! {
    SharedLayout {}
    cu_seqlens_q: CuSeqlensQ,
    cu_seqlens_k: CuSeqlensK,
    key_index: KeyIndex,
    max_seqlens: MaxSeqlens,
}

arrays! {
    TreeLayout {}
    cu_seqlens_q: CuSeqlensQ,
    cu_seqlens_k: CuSeqlensK,
    key_index: KeyIndex,
    max_seqlens: MaxSeqlens,
}

/// The array of that field, if it was laid out.
fn array<'py>(layout: &Bound<'py, Layout>, field: Field) -> PyResult<Bound<'py, PyAny>> {
    let this = layout.get();
    let Some(entry) = this.table.get(field) else {
        let reason = format!("{} was not laid out: name it in `fields`", field.name());
        return Err(PyAttributeError::new_err(reason));
    };
    view(this.arena.bind(layout.py()), entry)
}

fn shape(entry: &Entry) -> Vec<usize> {
    entry.rows.into_iter().chain([entry.width]).collect()
}

/// `numpy.ndarray(shape, dtype, buffer, offset)`: keeps the buffer alive, copies nothing.
fn view<'py>(arena: &Bound<'py, PyArray1<u8>>, entry: &Entry) -> PyResult<Bound<'py, PyAny>> {
    static NDARRAY: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let ndarray = NDARRAY.import(arena.py(), "numpy", "ndarray")?;
    let dtype = descriptor(arena.py(), entry.dtype());
    match entry.rows {
        Some(rows) => ndarray.call1(((rows, entry.width), dtype, arena, entry.offset)),
        None => ndarray.call1((entry.width, dtype, arena, entry.offset)),
    }
}

fn descriptor(py: Python<'_>, dtype: Dtype) -> Bound<'_, PyArrayDescr> {
    match dtype {
        Dtype::Int64 => numpy::dtype::<i64>(py),
        Dtype::Int32 => numpy::dtype::<i32>(py),
        Dtype::Bool => numpy::dtype::<bool>(py),
        Dtype::Uint8 => numpy::dtype::<u8>(py),
    }
}

/// Groups end to end in one row: prompt, completion 1, …, completion K, next group, ….
#[pyclass(frozen, extends = Layout, module = "logratio._rust")]
pub struct SharedLayout;

/// Groups as a tree in one row: what they begin with alike is there once.
#[pyclass(frozen, extends = Layout, module = "logratio._rust")]
pub struct TreeLayout;

/// One row a completion, completion-major: completion 0 of every group, then completion 1, ….
#[pyclass(frozen, extends = Layout, module = "logratio._rust")]
pub struct PaddedLayout;

impl Layout {
    /// Lays out `groups` in the buffer that `arena` is or makes, or in a fresh one.
    pub fn new<'py>(
        store: &store::Store,
        groups: &PyReadonlyArray1<'py, i64>,
        arena: Option<&Bound<'py, PyAny>>,
        options: Options<'_>,
    ) -> PyResult<Self> {
        let (py, groups) = (groups.py(), groups.as_slice()?);
        let batch = py.detach(|| Batch::new(store, groups, options))?;
        let bytes = batch.table().bytes();
        let arena = match arena {
            None => PyArray1::zeros(py, bytes, false),
            Some(made) if made.is_callable() => made.call1((bytes,))?.extract()?,
            Some(given) => given.extract()?,
        };
        let mut buffer = arena.try_readwrite().map_err(|_| unwritable())?;
        let slice = buffer.as_slice_mut()?;
        py.detach(|| batch.fill(slice))?;
        drop(buffer);
        Ok(Self {
            arena: arena.unbind(),
            table: batch.table().clone(),
        })
    }
}

fn unwritable() -> Error {
    Error::Invalid("the buffer is read-only, or another thread is filling it".into())
}

/// The arrays that are asked for.
pub fn fields(names: Option<Vec<String>>) -> PyResult<Vec<Field>> {
    let names = names.unwrap_or_default();
    Ok(names
        .iter()
        .map(|name| name.parse())
        .collect::<Result<_, _>>()?)
}

/// Inputs of the exported graph: prompts and candidates apart.
#[pyclass(frozen, get_all, module = "logratio._rust")]
pub struct CandidateLayout {
    /// Left-padded prompts: `[G, P]`.
    prompt_ids: Py<PyArray2<i64>>,
    /// 1 on tokens: `[G, P]`.
    prompt_mask: Py<PyArray2<i64>>,
    /// Right-padded candidates: `[N, C]`.
    candidate_ids: Py<PyArray2<i64>>,
    /// 1 on tokens: `[N, C]`.
    candidate_mask: Py<PyArray2<i64>>,
    /// Prompt of each candidate: `[N]`.
    group: Py<PyArray1<i64>>,
    /// Flat position in `N·C` of each token to score, 0 in padding: `[K, chunk]`.
    token_index: Py<PyArray2<i64>>,
    /// Candidate of each token to score, N in padding: `[K, chunk]`.
    token_row: Py<PyArray2<i64>>,
}

/// Lay out prompts and the candidates of each for the exported graph.
#[pyfunction]
#[pyo3(signature = (prompts, candidates, chunk = 128))]
pub fn candidate_layout(
    py: Python<'_>,
    prompts: Vec<PyReadonlyArray1<'_, i32>>,
    candidates: Vec<Vec<PyReadonlyArray1<'_, i32>>>,
    chunk: usize,
) -> PyResult<CandidateLayout> {
    let prompts = slices(&prompts)?;
    let candidates: Vec<_> = candidates
        .iter()
        .map(|of| slices(of))
        .collect::<PyResult<_>>()?;
    let layout = py.detach(|| Candidates::new(&prompts, &candidates, chunk))?;
    let rows = layout.group.len();
    let chunks = [layout.token_index.len() / chunk, chunk];
    Ok(CandidateLayout {
        prompt_ids: matrix(py, layout.prompt_ids, [prompts.len(), layout.prompt_width])?,
        prompt_mask: matrix(py, layout.prompt_mask, [prompts.len(), layout.prompt_width])?,
        candidate_ids: matrix(py, layout.candidate_ids, [rows, layout.candidate_width])?,
        candidate_mask: matrix(py, layout.candidate_mask, [rows, layout.candidate_width])?,
        group: convert::array(py, layout.group),
        token_index: matrix(py, layout.token_index, chunks)?,
        token_row: matrix(py, layout.token_row, chunks)?,
    })
}

fn slices<'a>(arrays: &'a [PyReadonlyArray1<'_, i32>]) -> PyResult<Vec<&'a [i32]>> {
    Ok(arrays
        .iter()
        .map(PyReadonlyArray1::as_slice)
        .collect::<Result<_, _>>()?)
}
