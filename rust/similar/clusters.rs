//! Which groups hang together.

use super::Link;

/// A forest of groups; a tree's root is its smallest group.
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
