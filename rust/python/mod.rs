//! The Python face of the crate: the only folder that names `pyo3`. It translates and decides nothing.
#![allow(clippy::needless_pass_by_value)] // pyo3 extracts arguments into owned values
#![allow(clippy::doc_markdown)] // these are the docstrings of Python

mod cache;
mod convert;
mod layout;
mod store;
mod word_cache;
mod writer;

use pyo3::pymodule;

/// Groups, plans, layouts and the reference cache, in Rust.
#[pymodule(gil_used = false)]
mod _rust {
    use pyo3::{prelude::*, types::PyTuple};

    use crate::{
        group::{ROLES, VALUES},
        python::convert::{CorruptCacheError, CorruptStoreError},
    };

    #[pymodule_export]
    use crate::python::{
        cache::{CacheFolder, CacheReader, CacheWriter, content_key},
        layout::{
            CandidateLayout, Layout, PaddedLayout, SharedLayout, TreeLayout, candidate_layout,
        },
        store::{Census, Plan, Store, near_duplicates},
        word_cache::{EncodedPairs, PairRules, PieceTable},
        writer::StoreWriter,
    };

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let py = module.py();
        module.add("CorruptStoreError", py.get_type::<CorruptStoreError>())?;
        module.add("CorruptCacheError", py.get_type::<CorruptCacheError>())?;
        module.add("ROLES", PyTuple::new(py, ROLES)?)?;
        module.add("VALUES", PyTuple::new(py, VALUES)?)
    }
}
