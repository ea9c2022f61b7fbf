//! `near_duplicates` and `Census`.

use numpy::{PyArray1, PyArray2};
use pyo3::prelude::*;

use super::{array, matrix, store::Store};
use crate::{census, similar};

const THREADS: usize = 2;

/// Similar groups: links `[M, 2]`, the Jaccard index of each `[M]`, the cluster of each `[M]`.
type Links = (Py<PyArray2<i64>>, Py<PyArray1<f32>>, Py<PyArray1<i64>>);

/// Find groups that are nearly the same: links `[M, 2]`, their similarity `[M]`, their cluster `[M]`.
///
/// Two groups are similar where the sets of their windows of `shingle` tokens have a Jaccard index of
/// `threshold` or more; whoever is chosen. A link is a verified pair, the earlier group first. Links
/// make a spanning forest: a cluster of n groups has n - 1, and its number is its smallest group's.
/// They are sorted by cluster, then by their later group, and are the same in every run.
///
/// Raises ValueError where the threshold is not in (0, 1] or the shingle is 0.
#[pyfunction]
#[pyo3(signature = (store, threshold = 0.8, shingle = 5))]
pub fn near_duplicates(
    py: Python<'_>,
    store: &Store,
    threshold: f64,
    shingle: usize,
) -> PyResult<Links> {
    let request = similar::Request {
        threshold,
        shingle,
        threads: similar::threads(THREADS),
    };
    let links = py.detach(|| similar::near_duplicates(&store.0, &request))?;
    let ends = links.iter().flat_map(|link| [link.first, link.second]);
    Ok((
        matrix(py, ends.map(i64::from).collect(), [links.len(), 2])?,
        array(py, links.iter().map(|link| link.similarity).collect()),
        array(py, links.iter().map(|link| link.cluster.into()).collect()),
    ))
}

/// Which tokens a store uses, and how its completions begin and end.
#[pyclass(frozen, get_all, module = "logratio._rust")]
pub struct Census {
    /// How often each id stands in a prompt (once a group) or a completion: `[V]`.
    uses: Py<PyArray1<i64>>,
    /// How many completions each id ends: `[V]`.
    ends: Py<PyArray1<i64>>,
    /// Tokens whose id is 2^22 or above, which no vocabulary has.
    beyond: u64,
    /// Groups of two completions or more.
    compared: u64,
    /// Of these, groups whose completions all begin with one token.
    same_start: u64,
    /// Tokens that all completions of a compared group begin with, added up.
    common: u64,
}

#[pymethods]
impl Census {
    #[new]
    fn new(py: Python<'_>, store: &Store) -> PyResult<Self> {
        let threads = similar::threads(THREADS);
        let census = py.detach(|| census::Census::of(&store.0, threads))?;
        let signed = |counts: Vec<u64>| counts.into_iter().map(|count| count as i64).collect();
        Ok(Self {
            uses: array(py, signed(census.uses)),
            ends: array(py, signed(census.ends)),
            beyond: census.beyond,
            compared: census.compared,
            same_start: census.same_start,
            common: census.common,
        })
    }
}
