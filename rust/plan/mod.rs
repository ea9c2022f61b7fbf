//! Which groups share an update and a micro-batch, in which order, on which rank.

mod order;
mod packing;
mod request;

use packing::Packer;
pub use request::{Mixture, Order, Request, dataset_of};

use crate::{Result, group::Shape, parallel};

/// One rank's share of an epoch.
///
/// Updates are made of micro-batches, micro-batches of groups. A rank gets no micro-batch of an
/// update that has fewer groups than there are ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Numbers of the groups.
    pub order: Vec<i64>,
    /// Where each micro-batch begins in `order`, and its length: `[M+1]`.
    pub micro_offsets: Vec<i64>,
    /// Where each update begins in the micro-batches, and their number: `[U+1]`.
    pub update_offsets: Vec<i64>,
}

/// Plans one epoch over groups of these `shapes`.
///
/// Over all ranks every group comes exactly once (a mixture: as often as its dataset draws it), in
/// the same updates whatever the number of ranks: a position is an epoch and an update.
///
/// Memory: about 24 bytes a group, besides `shapes` and the plan itself.
///
/// ```
/// use logratio::{group::Shape, plan::{Order, Request, plan}};
///
/// let shapes = [5, 9, 7].map(|prompt| Shape::new(prompt, [1, 2].into_iter()));
/// let plan = plan(&shapes, &Request::new(Order::Sorted, 2, 24))?;
/// assert_eq!(plan.order, [1, 2, 0]); // 12 + 10 tokens fit in 24; 8 is the next update
/// assert_eq!(plan.micro_offsets, [0, 2, 3]);
/// assert_eq!(plan.update_offsets, [0, 1, 2]);
/// # Ok::<(), logratio::Error>(())
/// ```
pub fn plan(shapes: &[Shape], request: &Request<'_>) -> Result<Plan> {
    request.check(shapes.len())?;
    let mut order = order::epoch(shapes, request);
    let size = request.groups_per_update.min(order.len().max(1));
    let parts = parallel::parts(&mut order, size, |part| {
        let mut packer = Packer::new(shapes, request);
        let mut updates = part.chunks_mut(size);
        updates.try_for_each(|update| packer.pack(update))?;
        Ok((packer.sizes, packer.counts))
    });
    let mut plan = Plan {
        order: Vec::with_capacity(order.len().div_ceil(request.world_size)),
        micro_offsets: vec![0],
        update_offsets: vec![0],
    };
    let mut updates = order.chunks(size);
    for part in parts {
        let (sizes, counts): (Vec<u32>, Vec<u32>) = part?;
        let mut sizes = sizes.into_iter();
        for (count, update) in counts.into_iter().zip(&mut updates) {
            plan.push(update, sizes.by_ref().take(count as usize));
        }
    }
    Ok(plan)
}

impl Plan {
    /// Adds an update whose groups come first in `update`, in micro-batches of these `sizes`.
    fn push(&mut self, update: &[u32], sizes: impl Iterator<Item = u32>) {
        let mut end = 0;
        for size in sizes {
            end += size as usize;
            self.micro_offsets.push((self.order.len() + end) as i64);
        }
        self.order
            .extend(update[..end].iter().map(|&group| i64::from(group)));
        self.update_offsets
            .push(self.micro_offsets.len() as i64 - 1);
    }
}
