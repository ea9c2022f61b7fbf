//! Errors as Python exceptions, and buffers as numpy arrays.

use std::io;

use numpy::{Element, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::{
    exceptions::{PyIndexError, PyOSError},
    import_exception,
    prelude::*,
};

use crate::Error;

// They are defined in Python, where they derive from the base class of all of the library's own.
import_exception!(logratio.errors, CorruptStoreError);
import_exception!(logratio.errors, CorruptCacheError);
import_exception!(logratio.errors, ArgumentError);

/// The one place where errors change language.
impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Io { path, source } => match source.raw_os_error() {
                Some(errno) => PyOSError::new_err((errno, message(&source), path.into_os_string())),
                None => PyOSError::new_err(text),
            },
            Error::NoSpace {
                path,
                source,
                bytes,
            } => {
                let text = format!("{} ({bytes} bytes more are needed)", message(&source));
                let errno = source.raw_os_error().unwrap_or(0);
                PyOSError::new_err((errno, text, path.into_os_string()))
            }
            Error::CorruptStore { .. } | Error::StoreVersion { .. } => {
                CorruptStoreError::new_err(text)
            }
            Error::CorruptCache { .. } => CorruptCacheError::new_err(text),
            Error::OutOfRange { .. } => PyIndexError::new_err(text),
            Error::Invalid(_) | Error::Closed { .. } => ArgumentError::new_err(text),
        }
    }
}

/// The system's words without the number, which Python prints itself.
fn message(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().into()
}

/// Hands a buffer to numpy as a matrix, without a copy.
pub(super) fn matrix<T: Element>(
    py: Python<'_>,
    values: Vec<T>,
    shape: [usize; 2],
) -> PyResult<Py<PyArray2<T>>> {
    Ok(PyArray1::from_vec(py, values).reshape(shape)?.unbind())
}

/// The rows of a matrix with `COLUMNS` columns that lie one after the other; none for None.
pub(super) fn rows<'a, T: Element, const COLUMNS: usize>(
    name: &str,
    matrix: Option<&'a PyReadonlyArray2<'_, T>>,
) -> PyResult<&'a [[T; COLUMNS]]> {
    let Some(matrix) = matrix else {
        return Ok(&[]);
    };
    let found = matrix.shape()[1];
    if found != COLUMNS {
        let reason = format!("{name} has {found} columns, not {COLUMNS}");
        return Err(Error::Invalid(reason).into());
    }
    // `as_slice` would also take a matrix in Fortran's order, column by column.
    match matrix.as_slice() {
        Ok(flat) if matrix.is_c_contiguous() => Ok(flat.as_chunks().0),
        _ => {
            let reason = format!("{name} is not contiguous: pass numpy.ascontiguousarray({name})");
            Err(Error::Invalid(reason).into())
        }
    }
}

/// Hands a buffer to numpy, without a copy.
pub(super) fn array<T: Element>(py: Python<'_>, values: Vec<T>) -> Py<PyArray1<T>> {
    PyArray1::from_vec(py, values).unbind()
}
