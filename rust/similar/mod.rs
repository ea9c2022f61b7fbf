//! Groups that are nearly the same: `MinHash` over token shingles, verified by exact Jaccard.
//!
//! A shingle is a window of tokens in a prompt or in a completion; a group is the set of all of its
//! shingles, whichever completion is chosen. Two groups are similar where the Jaccard index of their sets is at
//! least the threshold. Candidates are groups that agree in a band of `MinHash` values; bands are
//! made four at a time, so that memory is some 40 bytes a group however many bands there are (and 40
//! more for each group that has a twin), and the work in a bucket is bounded, so that a million equal
//! prompts are no million squared. Nothing depends on the number of threads.

mod shingles;
mod verify;

use shingles::Bands;
pub use shingles::Request;
pub use verify::Link;
use verify::{Clusters, Effort};

use crate::{Error, Result, store::Store};

/// Finds the clusters of similar groups, as the links that hold them together.
///
/// Links make a spanning forest: a cluster of `n` groups has `n - 1` links, each a verified pair,
/// sorted by cluster and then by its later group. A pair at the threshold shares a band with a
/// probability of 0.995 or more, so that few are missed; none is reported that is not similar.
pub fn near_duplicates(store: &Store, request: &Request) -> Result<Vec<Link>> {
    check(store, request)?;
    let bands = Bands::catching(request.threshold);
    let mut clusters = Clusters::new(store.len());
    let effort = Effort::new(store.len());
    for first in (0..bands.count).step_by(shingles::AT_ONCE) {
        let keys = bands.keys(store, request, first)?;
        for band in 0..bands.together(first) {
            let own = keys.iter().skip(band).step_by(bands.together(first));
            let entries = shingles::sorted(own.copied());
            let labels = clusters.labels();
            let found = verify::links(store, request, &entries, &labels, &effort)?;
            for link in found {
                clusters.join(link);
            }
        }
    }
    Ok(clusters.into_links())
}

fn check(store: &Store, request: &Request) -> Result<()> {
    let reason = if !(request.threshold > 0.0 && request.threshold <= 1.0) {
        format!("threshold is {}, not in (0, 1]", request.threshold)
    } else if request.shingle == 0 {
        "a shingle has at least one token".into()
    } else if request.threads == 0 {
        "threads is 0".into()
    } else if u32::try_from(store.len()).is_err() {
        format!("{} groups are more than 2^32-1", store.len())
    } else {
        return Ok(());
    };
    Err(Error::Invalid(reason))
}
