//! `PieceTable` and `PairRules`.

use std::sync::{Mutex, MutexGuard};

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::{prelude::*, pybacked::PyBackedStr, sync::MutexExt};

use super::convert::array;
use crate::{Error, pairs, word_cache::WordCache};

type Encoded = (Py<PyArray1<i32>>, Py<PyArray1<i64>>);

/// Ids of pieces of text that came before, so that only new ones go through the tokenizer.
///
/// Text is cut before every space that follows a visible ASCII character. Right only for tokenizers
/// that never look across such a place: the caller has to know.
#[pyclass(frozen, module = "logratio._rust")]
pub struct PieceTable(Mutex<WordCache>);

#[pymethods]
impl PieceTable {
    /// Make a table that begins anew when it holds `capacity` bytes of text.
    #[new]
    fn new(capacity: usize) -> Self {
        Self(Mutex::new(WordCache::new(capacity)))
    }

    /// Encode texts: ids end to end `[T]`, and where each text's begin `[N+1]`.
    ///
    /// `encode` gets the pieces that are new, as a list, and returns a list of ids for each.
    fn encode(
        &self,
        py: Python<'_>,
        texts: Vec<PyBackedStr>,
        encode: &Bound<'_, PyAny>,
    ) -> PyResult<Encoded> {
        let mut guard = self.lock(py);
        let table = &mut *guard;
        let lookup = py.detach(|| table.look_up(texts.iter().map(|text| &**text)));
        let new: Vec<&str> = table.new_pieces(&lookup).collect();
        if !new.is_empty() {
            let encoded = encode.call1((&new,)).and_then(|ids| ids.extract());
            let learnt = encoded.and_then(|ids: Vec<Vec<i32>>| Ok(table.learn(&lookup, &ids)?));
            learnt.inspect_err(|_| table.forget())?;
        }
        let (ids, offsets) = py.detach(|| table.ids(&lookup));
        Ok((array(py, ids), array(py, offsets)))
    }

    /// Encode rows of a prompt, a chosen and a rejected answer, but for the odd ones.
    ///
    /// Each column is a list of strings, or a string array's UTF-8 bytes and its int64 offsets.
    #[pyo3(signature = (prompts, chosen, rejected, rules, encode))]
    fn encode_pairs(
        &self,
        py: Python<'_>,
        prompts: Column<'_>,
        chosen: Column<'_>,
        rejected: Column<'_>,
        rules: &PairRules,
        encode: &Bound<'_, PyAny>,
    ) -> PyResult<EncodedPairs> {
        let columns = [prompts.texts()?, chosen.texts()?, rejected.texts()?];
        if columns
            .iter()
            .any(|column| column.len() != columns[0].len())
        {
            return Err(Error::Invalid("columns of unequal lengths".into()).into());
        }
        let encode = encode.clone().unbind();
        let mut guard = self.lock(py);
        let table = &mut *guard;
        let found: PyResult<_> = py.detach(|| {
            let rows: Vec<_> = (0..columns[0].len()).map(|at| row(&columns, at)).collect();
            let mut tokenize =
                |new: &[&str]| Python::attach(|py| encode.bind(py).call1((new,))?.extract());
            pairs::encode(table, &rows, &rules.0, &mut tokenize)
        });
        Ok(EncodedPairs::new(py, found?))
    }
}

impl PieceTable {
    /// Held while the tokenizer runs: nobody may clear what a call still needs.
    fn lock(&self, py: Python<'_>) -> MutexGuard<'_, WordCache> {
        match self.0.lock_py_attached(py) {
            Ok(guard) => guard,
            Err(poisoned) => poisoned.into_inner(),
        }
    }
}

/// A column of texts as Python has it.
#[derive(FromPyObject)]
enum Column<'py> {
    Arrow(PyReadonlyArray1<'py, u8>, PyReadonlyArray1<'py, i64>),
    Strings(Vec<PyBackedStr>),
}

impl Column<'_> {
    fn texts(&self) -> PyResult<Texts<'_>> {
        Ok(match self {
            Self::Arrow(bytes, offsets) => Texts::Arrow(bytes.as_slice()?, offsets.as_slice()?),
            Self::Strings(texts) => Texts::Strings(texts),
        })
    }
}

/// A column of texts.
enum Texts<'a> {
    Arrow(&'a [u8], &'a [i64]),
    Strings(&'a [PyBackedStr]),
}

impl<'a> Texts<'a> {
    fn len(&self) -> usize {
        match self {
            Self::Arrow(_, offsets) => offsets.len().saturating_sub(1),
            Self::Strings(texts) => texts.len(),
        }
    }

    /// The text of a row; none where its bytes are no UTF-8, or lie nowhere.
    fn get(&self, row: usize) -> Option<&'a str> {
        match *self {
            Self::Arrow(bytes, offsets) => {
                let [start, end] = [offsets[row], offsets[row + 1]].map(usize::try_from);
                std::str::from_utf8(bytes.get(start.ok()?..end.ok()?)?).ok()
            }
            Self::Strings(texts) => Some(&texts[row]),
        }
    }
}

fn row<'a>([prompt, chosen, rejected]: &[Texts<'a>; 3], at: usize) -> Option<pairs::Row<'a>> {
    Some([prompt.get(at)?, chosen.get(at)?, rejected.get(at)?])
}

/// What the ids of a pair have to be like, and what is put around them.
#[pyclass(frozen, module = "logratio._rust")]
pub struct PairRules(pairs::Rules);

#[pymethods]
impl PairRules {
    /// Put `opening` before a prompt and `ending` behind an answer that do not have it.
    ///
    /// Rows with an id of `special`, a doubled `bos` or `eos`, a prompt above `prompt_budget` or a
    /// text above `max_length` tokens need a closer look.
    #[new]
    #[pyo3(signature = (*, opening, ending, bos, eos, special, prompt_budget, max_length))]
    fn new(
        opening: Vec<i32>,
        ending: Option<i32>,
        bos: Option<i32>,
        eos: Option<i32>,
        mut special: Vec<i32>,
        prompt_budget: usize,
        max_length: usize,
    ) -> Self {
        special.sort_unstable();
        Self(pairs::Rules {
            opening,
            ending,
            bos,
            eos,
            special,
            prompt_budget,
            max_length,
        })
    }
}

/// Pairs as ids, end to end, without the odd ones among the rows.
#[pyclass(frozen, get_all, module = "logratio._rust")]
pub struct EncodedPairs {
    /// Every prompt.
    prompt_ids: Py<PyArray1<i32>>,
    /// Tokens of each prompt: `[G]`.
    prompt_lengths: Py<PyArray1<u32>>,
    /// Chosen, rejected, and so on.
    completion_ids: Py<PyArray1<i32>>,
    /// Tokens of each completion: `[2·G]`.
    completion_lengths: Py<PyArray1<u32>>,
    /// Completions before which the prompt's own ids would have changed: `[G]`.
    moved: Py<PyArray1<u32>>,
    /// Which rows need a closer look and are not among the pairs: `[R]`.
    odd: Py<PyArray1<bool>>,
}

impl EncodedPairs {
    fn new(py: Python<'_>, pairs: pairs::Pairs) -> Self {
        Self {
            prompt_ids: array(py, pairs.prompt_ids),
            prompt_lengths: array(py, pairs.prompt_lengths),
            completion_ids: array(py, pairs.completion_ids),
            completion_lengths: array(py, pairs.completion_lengths),
            moved: array(py, pairs.moved),
            odd: array(py, pairs.odd),
        }
    }
}
