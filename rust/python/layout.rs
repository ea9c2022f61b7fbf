//! `SharedLayout`, `PaddedLayout` and `CandidateLayout`.

use numpy::{PyArray1, PyArray2, PyReadonlyArray1};
use pyo3::prelude::*;

use super::{array, matrix};
use crate::layout::{Candidates, Padded, Shared, Targets};

/// What is scored, flat and group by group, equal in both layouts.
#[pyclass(frozen, get_all, subclass, module = "logratio._rust")]
pub struct Layout {
    /// Tokens of each prompt: `[G]`.
    prompt_lengths: Py<PyArray1<i64>>,
    /// Tokens of each completion: `[N]`.
    completion_lengths: Py<PyArray1<i64>>,
    /// Completions of each group: `[G]`.
    group_sizes: Py<PyArray1<i64>>,
    /// Flat position whose hidden state predicts each target: `[S]`.
    logit_index: Py<PyArray1<i64>>,
    /// Token to predict: `[S]`.
    target_ids: Py<PyArray1<i64>>,
    /// Whether a target counts: `[S]`.
    completion_mask: Py<PyArray1<bool>>,
    /// Where the targets of each completion begin, and their number: `[N+1]`.
    completion_offsets: Py<PyArray1<i64>>,
    /// Role number of each completion: `[N]`.
    roles: Py<PyArray1<u8>>,
    /// Number of each group in the store: `[G]`.
    groups: Py<PyArray1<i64>>,
    /// Row number of each completion in the store: `[N]`.
    completions: Py<PyArray1<i64>>,
}

impl Layout {
    fn from_rust(py: Python<'_>, targets: Targets) -> Self {
        Self {
            prompt_lengths: array(py, targets.prompt_lengths),
            completion_lengths: array(py, targets.completion_lengths),
            group_sizes: array(py, targets.group_sizes),
            logit_index: array(py, targets.logit_index),
            target_ids: array(py, targets.target_ids),
            completion_mask: array(py, targets.completion_mask),
            completion_offsets: array(py, targets.completion_offsets),
            roles: array(py, targets.roles),
            groups: array(py, targets.groups),
            completions: array(py, targets.completions),
        }
    }
}

/// Groups end to end in one row, no padding: prompt, completion 1, …, completion K, next group, ….
#[pyclass(frozen, get_all, extends = Layout, module = "logratio._rust")]
pub struct SharedLayout {
    /// Token ids: `[T]`.
    input_ids: Py<PyArray1<i64>>,
    /// Positions, from the prompt's length on again for every completion: `[T]`.
    position_ids: Py<PyArray1<i64>>,
}

impl SharedLayout {
    pub fn from_rust(py: Python<'_>, layout: Shared) -> PyResult<Bound<'_, Self>> {
        let own = Self {
            input_ids: array(py, layout.input_ids),
            position_ids: array(py, layout.position_ids),
        };
        let base = Layout::from_rust(py, layout.targets);
        Bound::new(py, PyClassInitializer::from(base).add_subclass(own))
    }
}

/// Right-padded rows, completion-major: completion 0 of every group, then completion 1, ….
#[pyclass(frozen, get_all, extends = Layout, module = "logratio._rust")]
pub struct PaddedLayout {
    /// Token ids, 0 in padding: `[N, T]`.
    input_ids: Py<PyArray2<i64>>,
    /// 1 on tokens, 0 in padding: `[N, T]`.
    attention_mask: Py<PyArray2<i64>>,
    /// Positions, 0 in padding: `[N, T]`.
    position_ids: Py<PyArray2<i64>>,
}

impl PaddedLayout {
    pub fn from_rust(py: Python<'_>, layout: Padded) -> PyResult<Bound<'_, Self>> {
        let shape = [layout.rows, layout.width];
        let own = Self {
            input_ids: matrix(py, layout.input_ids, shape)?,
            attention_mask: matrix(py, layout.attention_mask, shape)?,
            position_ids: matrix(py, layout.position_ids, shape)?,
        };
        let base = Layout::from_rust(py, layout.targets);
        Bound::new(py, PyClassInitializer::from(base).add_subclass(own))
    }
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
        group: array(py, layout.group),
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
