//! `PieceTable`.

use std::sync::Mutex;

use numpy::PyArray1;
use pyo3::{prelude::*, pybacked::PyBackedStr, sync::MutexExt};

use super::array;
use crate::pieces;

type Encoded = (Py<PyArray1<i32>>, Py<PyArray1<i64>>);

/// Ids of pieces of text that came before, so that only new ones go through the tokenizer.
///
/// Text is cut before every space that follows a visible ASCII character. Right only for tokenizers
/// that never look across such a place: the caller has to know.
#[pyclass(frozen, module = "logratio._rust")]
pub struct PieceTable(Mutex<pieces::PieceTable>);

#[pymethods]
impl PieceTable {
    /// Make a table that begins anew when it holds `capacity` bytes of text.
    #[new]
    fn new(capacity: usize) -> Self {
        Self(Mutex::new(pieces::PieceTable::new(capacity)))
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
        // Held while `encode` runs: nobody may clear what this call still needs.
        let mut guard = match self.0.lock_py_attached(py) {
            Ok(guard) => guard,
            Err(poisoned) => poisoned.into_inner(),
        };
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
}
