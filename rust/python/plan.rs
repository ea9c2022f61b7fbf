//! `Plan`, and what `Store.plan` is asked for.

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

use super::array;
use crate::{Error, Result, plan, store};

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
pub struct Weights<'py> {
    pub weights: PyReadonlyArray1<'py, f64>,
    pub datasets: PyReadonlyArray1<'py, u32>,
}

impl<'py> Weights<'py> {
    pub fn new(
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
    pub fn new(
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
