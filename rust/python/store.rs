//! `Store`, and what is computed from one: `Plan`, `Census`, `near_duplicates`.

use std::path::PathBuf;

use numpy::{PyArray1, PyArray2, PyReadonlyArray1};
use pyo3::prelude::*;

use super::{
    convert::{array, matrix},
    layout::{Layout, PaddedLayout, SharedLayout, TreeLayout, fields as chosen},
};
use crate::{
    Error, Result,
    file_format::Hex,
    group::{self, VALUES},
    layout, parallel, plan, prefix_tree, similar, store,
    token_counts::TokenCounts,
};

/// Threads for work over a whole store.
const THREADS: usize = 2;

/// Every group of a dataset in flat, memory-mapped columns.
///
/// Any method that reads raises CorruptStoreError where a block does not match its checksum or
/// offsets are impossible. A store at a path is pickled by its path and digest.
#[pyclass(frozen, module = "logratio._rust")]
pub struct Store(pub(super) store::Store);

impl Store {
    pub fn of(store: store::Store) -> Self {
        Self(store)
    }
}

#[pymethods]
impl Store {
    /// Map a sealed store after checking header, footer and sizes; with `digest`, that one only.
    #[staticmethod]
    #[pyo3(signature = (path, digest = None))]
    fn open(py: Python<'_>, path: PathBuf, digest: Option<&str>) -> PyResult<Self> {
        let store = py.detach(|| match digest {
            Some(digest) => store::Store::open_known(&path, digest),
            None => store::Store::open(&path),
        });
        Ok(Self(store?))
    }

    /// The store is found again by its path, and must have the same digest there.
    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, (PathBuf, String))> {
        let Some(path) = self.0.path() else {
            let reason = "a store in memory cannot be pickled: give its writer a path";
            return Err(Error::Invalid(reason.into()).into());
        };
        let open = py.get_type::<Self>().getattr("open")?;
        Ok((open, (path.into(), self.digest())))
    }

    /// Where it was opened, absolute; None in memory.
    #[getter]
    fn path(&self) -> Option<PathBuf> {
        self.0.path().map(Into::into)
    }

    /// A new store, at `path` or in memory, of the groups for which `keep` (`[G]`) holds.
    #[pyo3(signature = (keep, path = None, metadata = "{}"))]
    fn select(
        &self,
        py: Python<'_>,
        keep: PyReadonlyArray1<'_, bool>,
        path: Option<PathBuf>,
        metadata: &str,
    ) -> PyResult<Self> {
        let keep = keep.as_slice()?;
        let select = || self.0.select(keep, path.as_deref(), metadata);
        Ok(Self(py.detach(select)?))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn __repr__(&self) -> String {
        let (groups, completions) = (self.0.len(), self.0.completions());
        let place = match self.0.path() {
            Some(path) => format!("\"{}\"", path.display()),
            None => "in memory".into(),
        };
        let tokens = self.0.tokens();
        format!("Store({groups} groups, {completions} completions, {tokens} tokens, {place})")
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
    fn metadata(&self) -> PyResult<&str> {
        Ok(self.0.metadata()?)
    }

    /// Hash of the columns, without the metadata, in hex.
    #[getter]
    fn digest(&self) -> String {
        Hex(&self.0.digest()).to_string()
    }

    /// Compare every block with its checksum, and every value with what it may be.
    fn verify(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.0.verify())?)
    }

    /// Tokens of each group, its prompt counted once: `[G]`.
    fn shared_lengths(&self, py: Python<'_>) -> PyResult<Py<PyArray1<u32>>> {
        Ok(array(py, py.detach(|| self.0.shared_lengths())?))
    }

    /// Tokens of each prompt: `[G]`.
    fn prompt_lengths(&self, py: Python<'_>) -> PyResult<Py<PyArray1<u32>>> {
        Ok(array(py, py.detach(|| self.0.prompt_lengths())?))
    }

    /// Tokens of each completion: `[N]`.
    fn completion_lengths(&self, py: Python<'_>) -> PyResult<Py<PyArray1<u32>>> {
        Ok(array(py, py.detach(|| self.0.completion_lengths())?))
    }

    /// Tokens of each completion that count: `[N]`.
    fn counted_lengths(&self, py: Python<'_>) -> PyResult<Py<PyArray1<u32>>> {
        Ok(array(py, py.detach(|| self.0.counted_lengths())?))
    }

    /// Where the completions of each group begin, and their number: `[G+1]`.
    fn completion_offsets(&self, py: Python<'_>) -> PyResult<Py<PyArray1<i64>>> {
        let copy = || -> Result<Vec<i64>> {
            let offsets = self.0.completion_offsets()?;
            Ok(offsets.iter().map(|&offset| offset as i64).collect())
        };
        Ok(array(py, py.detach(copy)?))
    }

    /// Role number of each completion: `[N]`.
    fn roles(&self, py: Python<'_>) -> PyResult<Py<PyArray1<u8>>> {
        Ok(array(py, py.detach(|| self.0.roles().map(<[u8]>::to_vec))?))
    }

    /// Values of each completion in the order of VALUES, NaN where there is none: `[N, 4]`.
    fn values(&self, py: Python<'_>) -> PyResult<Py<PyArray2<f32>>> {
        let values = py.detach(|| self.0.values().map(|values| values.as_flattened().to_vec()))?;
        matrix(py, values, [self.0.completions(), VALUES.len()])
    }

    /// File number and line of each group: `[G]`, `[G]`.
    #[expect(clippy::type_complexity, reason = "two arrays")]
    fn sources(&self, py: Python<'_>) -> PyResult<(Py<PyArray1<u32>>, Py<PyArray1<u64>>)> {
        let copy = || Ok((self.0.files()?.to_vec(), self.0.lines()?.to_vec()));
        let (files, lines) = py.detach(copy).map_err(|error: Error| PyErr::from(error))?;
        Ok((array(py, files), array(py, lines)))
    }

    /// Whether tokens have weights other than 0 and 1: then `mask` numbers them.
    #[getter]
    fn is_weighted(&self) -> bool {
        self.0.is_weighted()
    }

    /// The mask of completions (int64 `[n]`), end to end: 0, 1, or the number of a weight, from 2.
    fn mask(&self, completions: PyReadonlyArray1<'_, i64>) -> PyResult<Py<PyArray1<u8>>> {
        let (py, completions) = (completions.py(), completions.as_slice()?);
        Ok(array(py, py.detach(|| self.0.mask(completions))?))
    }

    /// Content key of each completion in its prompt: `[N, 32]`.
    fn keys(&self, py: Python<'_>) -> PyResult<Py<PyArray2<u8>>> {
        let keys = py.detach(|| self.0.keys())?.into_flattened();
        matrix(py, keys, [self.0.completions(), 32])
    }

    /// Key of the sum over the tokens of each completion that count: `[N, 32]`.
    fn sum_keys(&self, py: Python<'_>) -> PyResult<Py<PyArray2<u8>>> {
        let keys = py.detach(|| self.0.sum_keys())?.into_flattened();
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
        let group = py.detach(|| self.0.group(index))?;
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
    /// (longest first, nothing random). A micro-batch holds at most `token_budget` tokens
    /// ("shared"; "tree": what its groups begin with alike counts once, and such groups come
    /// together), or rows times its longest row ("padded"); a larger group has one for itself.
    /// With `weights` of datasets and the dataset of each file, an epoch mixes them by weight.
    /// Ranks are balanced by tokens + `attention_cost` × token pairs that attend; 1/(6 × hidden
    /// size) estimates operations.
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    #[pyo3(signature = (
        *, order, seed = 0, epoch = 0, groups_per_update, token_budget, layout = "shared", rank = 0,
        world_size = 1, weights = None, datasets = None, attention_cost = 0.0
    ))]
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
        weights: Option<PyReadonlyArray1<'_, f64>>,
        datasets: Option<PyReadonlyArray1<'_, u32>>,
        attention_cost: f64,
    ) -> PyResult<Plan> {
        let request = plan::Request {
            order: order.parse()?,
            seed,
            epoch,
            groups_per_update,
            token_budget,
            layout: layout.parse()?,
            rank,
            world_size,
            mixture: None,
            attention_cost,
            store: None,
        };
        let mixture = Weights::new(weights, datasets)?;
        Plan::new(py, &self.0, request, mixture.as_ref())
    }

    /// Lay out groups end to end in one row.
    ///
    /// `arena` is the buffer to fill, uint8, or makes one when it is called with the bytes needed;
    /// without it a fresh one is made. `fields` are the arrays to lay out, else what training reads.
    /// The width is what the groups need, a multiple of `multiple_of`, or `width`.
    #[pyo3(signature = (groups, *, arena = None, fields = None, multiple_of = 1, width = None, pad_id = 0))]
    fn shared_layout<'py>(
        &self,
        groups: PyReadonlyArray1<'py, i64>,
        arena: Option<Bound<'py, PyAny>>,
        fields: Option<Vec<String>>,
        multiple_of: usize,
        width: Option<usize>,
        pad_id: i32,
    ) -> PyResult<Bound<'py, SharedLayout>> {
        let options = layout::Options {
            multiple_of,
            width,
            pad_id,
            fields: &chosen(fields)?,
            ..layout::Options::new(group::Layout::Shared)
        };
        let base = Layout::new(&self.0, &groups, arena.as_ref(), options)?;
        let whole = PyClassInitializer::from(base).add_subclass(SharedLayout);
        Bound::new(groups.py(), whole)
    }

    /// Lay out groups as a tree in one row: what they begin with alike is there once.
    ///
    /// Arguments as in `shared_layout`.
    #[pyo3(signature = (groups, *, arena = None, fields = None, multiple_of = 1, width = None, pad_id = 0))]
    fn tree_layout<'py>(
        &self,
        groups: PyReadonlyArray1<'py, i64>,
        arena: Option<Bound<'py, PyAny>>,
        fields: Option<Vec<String>>,
        multiple_of: usize,
        width: Option<usize>,
        pad_id: i32,
    ) -> PyResult<Bound<'py, TreeLayout>> {
        let options = layout::Options {
            multiple_of,
            width,
            pad_id,
            fields: &chosen(fields)?,
            ..layout::Options::new(group::Layout::Tree)
        };
        let base = Layout::new(&self.0, &groups, arena.as_ref(), options)?;
        let whole = PyClassInitializer::from(base).add_subclass(TreeLayout);
        Bound::new(groups.py(), whole)
    }

    /// Tokens of the tree of each list of groups.
    ///
    /// `groups` are the lists end to end, `offsets` (`[B+1]`) where each begins, and their end.
    fn tree_tokens(
        &self,
        groups: PyReadonlyArray1<'_, i64>,
        offsets: PyReadonlyArray1<'_, i64>,
    ) -> PyResult<Py<PyArray1<u64>>> {
        let (py, groups, offsets) = (groups.py(), groups.as_slice()?, offsets.as_slice()?);
        Ok(array(
            py,
            py.detach(|| prefix_tree::count(&self.0, groups, offsets))?,
        ))
    }

    /// The groups in an order in which those that share a beginning are neighbours.
    fn tree_order(&self, groups: PyReadonlyArray1<'_, i64>) -> PyResult<Py<PyArray1<i64>>> {
        let (py, groups) = (groups.py(), groups.as_slice()?);
        Ok(array(
            py,
            py.detach(|| prefix_tree::order(&self.0, groups))?,
        ))
    }

    /// How many of the first `groups` make a tree of at most `budget` tokens, and one at least.
    fn tree_fit(&self, groups: PyReadonlyArray1<'_, i64>, budget: u64) -> PyResult<usize> {
        let (py, groups) = (groups.py(), groups.as_slice()?);
        Ok(py.detach(|| prefix_tree::fit(&self.0, groups, budget))?)
    }

    /// Where micro-batches of at most `budget` tokens begin in groups in the order of the tree, and
    /// their number: `[B+1]`.
    fn tree_cuts(
        &self,
        groups: PyReadonlyArray1<'_, i64>,
        budget: u64,
    ) -> PyResult<Py<PyArray1<i64>>> {
        let (py, groups) = (groups.py(), groups.as_slice()?);
        Ok(array(
            py,
            py.detach(|| prefix_tree::cut(&self.0, groups, budget))?,
        ))
    }

    /// Lay out groups as padded rows, one a completion, completion-major.
    ///
    /// `side` is where the padding is, "left" or "right"; the rest as in `shared_layout`.
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    #[pyo3(signature = (groups, *, arena = None, fields = None, side = "right", multiple_of = 1, width = None, pad_id = 0))]
    fn padded_layout<'py>(
        &self,
        groups: PyReadonlyArray1<'py, i64>,
        arena: Option<Bound<'py, PyAny>>,
        fields: Option<Vec<String>>,
        side: &str,
        multiple_of: usize,
        width: Option<usize>,
        pad_id: i32,
    ) -> PyResult<Bound<'py, PaddedLayout>> {
        let options = layout::Options {
            side: side.parse()?,
            multiple_of,
            width,
            pad_id,
            fields: &chosen(fields)?,
            ..layout::Options::new(group::Layout::Padded)
        };
        let base = Layout::new(&self.0, &groups, arena.as_ref(), options)?;
        let whole = PyClassInitializer::from(base).add_subclass(PaddedLayout);
        Bound::new(groups.py(), whole)
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

/// The weight of each dataset, and the dataset of each file.
struct Weights<'py> {
    weights: PyReadonlyArray1<'py, f64>,
    datasets: PyReadonlyArray1<'py, u32>,
}

impl<'py> Weights<'py> {
    fn new(
        weights: Option<PyReadonlyArray1<'py, f64>>,
        datasets: Option<PyReadonlyArray1<'py, u32>>,
    ) -> PyResult<Option<Self>> {
        match (weights, datasets) {
            (Some(weights), Some(datasets)) => Ok(Some(Self { weights, datasets })),
            (None, None) => Ok(None),
            _ => {
                let reason = "weights and datasets come together or not at all";
                Err(Error::Invalid(reason.into()).into())
            }
        }
    }
}

impl Plan {
    fn new(
        py: Python<'_>,
        store: &store::Store,
        request: plan::Request<'_>,
        mixture: Option<&Weights<'_>>,
    ) -> PyResult<Self> {
        let mixture = mixture
            .map(|given| PyResult::Ok((given.weights.as_slice()?, given.datasets.as_slice()?)))
            .transpose()?;
        let plan = py.detach(|| planned(store, request, mixture))?;
        Ok(Self {
            order: array(py, plan.order),
            micro_offsets: array(py, plan.micro_offsets),
            update_offsets: array(py, plan.update_offsets),
        })
    }
}

fn planned(
    store: &store::Store,
    request: plan::Request<'_>,
    mixture: Option<(&[f64], &[u32])>,
) -> Result<plan::Plan> {
    let shapes = store.shapes()?;
    let request = plan::Request {
        store: Some(store),
        ..request
    };
    let Some((weights, datasets)) = mixture else {
        return plan::plan(&shapes, &request);
    };
    let dataset_of = plan::dataset_of(store.files()?, datasets)?;
    let mixture = Some(plan::Mixture {
        weights,
        dataset_of: &dataset_of,
    });
    plan::plan(&shapes, &plan::Request { mixture, ..request })
}

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
        threads: parallel::threads(THREADS),
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
    /// How often each id occurs in a prompt (once a group) or a completion: `[V]`.
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
        let threads = parallel::threads(THREADS);
        let counts = py.detach(|| TokenCounts::of(&store.0, threads))?;
        let signed = |counts: Vec<u64>| counts.into_iter().map(|count| count as i64).collect();
        Ok(Self {
            uses: array(py, signed(counts.uses)),
            ends: array(py, signed(counts.ends)),
            beyond: counts.beyond,
            compared: counts.compared,
            same_start: counts.same_start,
            common: counts.common,
        })
    }
}
