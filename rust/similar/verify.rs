//! Compares candidates, with a bound on what a bucket and a group may cost.
//!
//! In a bucket of up to [`SMALL`] groups all pairs are compared that do not hang together already.
//! In a larger one each group is compared with [`SAMPLES`] others that resembled none before them.
//! A group that was compared in vain with [`VAIN`] earlier ones, over all bands, is not looked at
//! again. So the work grows with the number of groups, whatever they hold.

use std::{
    ops::Range,
    sync::atomic::{AtomicU8, Ordering::Relaxed},
};

use super::shingles::{self, Request};
use crate::{Result, parallel, store::Store};

/// Two similar groups.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// The smallest number of a group that links lead to from these two.
    pub cluster: u32,
    /// The earlier group.
    pub first: u32,
    /// The later group.
    pub second: u32,
    /// Jaccard index of their shingles.
    pub similarity: f32,
}

const SMALL: usize = 16;
const SAMPLES: usize = 8;
const VAIN: u8 = 128;

/// How often each group was compared in vain with an earlier one.
///
/// Atomic for the compiler only: in one band a group is in one bucket, which one thread has.
#[derive(Debug)]
pub(super) struct Effort(Vec<AtomicU8>);

impl Effort {
    pub(super) fn new(groups: usize) -> Self {
        Self((0..groups).map(|_| AtomicU8::new(0)).collect())
    }

    fn is_spent(&self, group: u32) -> bool {
        self.0[group as usize].load(Relaxed) >= VAIN
    }

    fn spend(&self, group: u32) {
        let spent = self.0[group as usize].load(Relaxed);
        self.0[group as usize].store(spent.saturating_add(1), Relaxed);
    }
}

/// A group with its shingles.
struct Member {
    group: u32,
    cluster: u32,
    set: Vec<u64>,
}

/// What one thread needs to look into buckets.
struct Search<'a> {
    store: &'a Store,
    request: &'a Request,
    labels: &'a [u32],
    effort: &'a Effort,
    found: Vec<Link>,
}

/// Links between similar groups of one band.
pub(super) fn links(
    store: &Store,
    request: &Request,
    entries: &[u64],
    labels: &[u32],
    effort: &Effort,
) -> Result<Vec<Link>> {
    let parts = parallel::each(cuts(entries, request.threads), |range| {
        let mut search = Search {
            store,
            request,
            labels,
            effort,
            found: Vec::new(),
        };
        for bucket in entries[range].chunk_by(|left, right| left >> 32 == right >> 32) {
            search.bucket(bucket)?;
        }
        Ok(search.found)
    });
    let parts: Result<Vec<_>> = parts.into_iter().collect();
    Ok(parts?.concat())
}

/// Shares of the entries that no bucket straddles.
fn cuts(entries: &[u64], parts: usize) -> Vec<Range<usize>> {
    let begins = |part: usize| {
        let at = entries.len() * part / parts;
        let before = at.checked_sub(1).map(|last| entries[last] >> 32);
        let rest = &entries[at..];
        at + before.map_or(0, |key| rest.partition_point(|entry| entry >> 32 == key))
    };
    (0..parts)
        .map(|part| begins(part)..begins(part + 1))
        .collect()
}

impl Search<'_> {
    fn bucket(&mut self, bucket: &[u64]) -> Result<()> {
        if bucket.len() < 2 {
            return Ok(());
        }
        let groups = bucket.iter().map(|&entry| entry as u32);
        let first = self.labels[bucket[0] as u32 as usize];
        if groups
            .clone()
            .all(|group| self.labels[group as usize] == first)
        {
            return Ok(()); // they hang together already
        }
        self.compare(groups, bucket.len() > SMALL)
    }

    /// Compares each group with those before it; in a large bucket only with samples of them.
    fn compare(&mut self, groups: impl Iterator<Item = u32>, is_large: bool) -> Result<()> {
        let mut earlier: Vec<Member> = Vec::new();
        for group in groups {
            if self.effort.is_spent(group) {
                continue;
            }
            let cluster = self.labels[group as usize];
            if is_large && earlier.iter().any(|other| other.cluster == cluster) {
                continue; // it hangs together with a sample
            }
            let stored = self.store.group(i64::from(group))?;
            let set = shingles::set(stored, self.request.shingle);
            let mut member = Member {
                group,
                cluster,
                set,
            };
            let is_alike = self.meet(&mut member, &mut earlier, is_large);
            if !is_large || (!is_alike && earlier.len() < SAMPLES) {
                earlier.push(member);
            }
        }
        Ok(())
    }

    /// Links a group to similar ones before it; true if there was one.
    fn meet(&mut self, member: &mut Member, earlier: &mut [Member], is_large: bool) -> bool {
        let mut is_alike = false;
        for at in 0..earlier.len() {
            if earlier[at].cluster == member.cluster {
                continue;
            }
            let found = self.link(&earlier[at], member);
            if let Some(link) = found {
                self.found.push(link);
                is_alike = true;
                if is_large {
                    break;
                }
                let (old, new) = (member.cluster, earlier[at].cluster);
                member.cluster = new;
                earlier
                    .iter_mut()
                    .filter(|other| other.cluster == old)
                    .for_each(|other| other.cluster = new);
            }
        }
        is_alike
    }

    fn link(&self, earlier: &Member, later: &Member) -> Option<Link> {
        let threshold = self.request.threshold;
        let (short, long) = (earlier.set.len(), later.set.len());
        if !shingles::reaches(short.min(long), short, long, threshold) {
            return None; // too unlike in size, at no cost
        }
        let Some(similarity) = shingles::similarity(&earlier.set, &later.set, threshold) else {
            self.effort.spend(later.group);
            return None;
        };
        Some(Link {
            cluster: 0, // known when all links are
            first: earlier.group,
            second: later.group,
            similarity,
        })
    }
}

/// Union-find over groups; a tree's root is its smallest group.
#[derive(Debug)]
pub(super) struct Clusters {
    parents: Vec<u32>,
    links: Vec<Link>,
}

impl Clusters {
    pub(super) fn new(groups: usize) -> Self {
        Self {
            parents: (0..groups as u32).collect(),
            links: Vec::new(),
        }
    }

    /// Takes a link unless its groups hang together already.
    pub(super) fn join(&mut self, link: Link) {
        let (left, right) = (self.root(link.first), self.root(link.second));
        if left != right {
            self.parents[left.max(right) as usize] = left.min(right);
            self.links.push(link);
        }
    }

    /// The root of every group.
    pub(super) fn labels(&mut self) -> Vec<u32> {
        // A parent is never larger than its child, so one pass in order finds every root.
        for index in 0..self.parents.len() {
            self.parents[index] = self.parents[self.parents[index] as usize];
        }
        self.parents.clone()
    }

    pub(super) fn into_links(mut self) -> Vec<Link> {
        let labels = self.labels();
        for link in &mut self.links {
            link.cluster = labels[link.first as usize];
        }
        let place = |link: &Link| (link.cluster, link.second, link.first);
        self.links.sort_unstable_by_key(place);
        self.links
    }

    fn root(&mut self, mut group: u32) -> u32 {
        while self.parents[group as usize] != group {
            let grandparent = self.parents[self.parents[group as usize] as usize];
            self.parents[group as usize] = grandparent;
            group = grandparent;
        }
        group
    }
}
