//! What a loss of power leaves of a disk.

use std::{collections::BTreeSet, sync::Arc};

use super::{Inode, State, chance::Chance};

const SECTOR: usize = 512;

impl State {
    pub fn lose_power(&self, chance: &mut Chance) -> Self {
        let mut names = self.durable.clone();
        let all = chance.below(4); // all, none, or each for itself
        for change in &self.changes {
            let kept = all == 0 || (all > 1 && chance.flip());
            let both_names = kept && change.sets.len() > 1 && chance.below(4) == 0;
            for (path, inode) in change.sets.iter().filter(|_| kept) {
                match inode {
                    Some(inode) => names.insert(path.clone(), *inode),
                    None if both_names => None,
                    None => names.remove(path),
                };
            }
        }
        let used: BTreeSet<u64> = names.values().copied().collect();
        let found = |inode: u64| (inode, self.inodes[&inode].lose_power(chance));
        Self {
            inodes: used.into_iter().map(found).collect(),
            folders: self.folders.clone(),
            durable: names.clone(),
            names,
            acknowledged: self.acknowledged,
            handles: self.handles,
            ..Self::default()
        }
    }
}

impl Inode {
    fn lose_power(&self, chance: &mut Chance) -> Self {
        let length = self.bytes.len();
        let mut bytes = self.bytes.to_vec();
        let (all, cut) = (chance.below(8), chance.below(4));
        for start in (self.synced / SECTOR * SECTOR..length).step_by(SECTOR) {
            let sector = &mut bytes[start.max(self.synced)..length.min(start + SECTOR)];
            match if all == 0 { 0 } else { chance.below(3) } {
                0 => {}
                1 => sector.fill(0),
                _ => sector.fill_with(|| chance.next() as u8),
            }
        }
        if cut < 2 {
            let longest = length - self.synced;
            let kept = if cut == 0 {
                0
            } else {
                chance.below(longest + 1)
            };
            bytes.truncate(self.synced + kept);
        }
        Self {
            synced: bytes.len(),
            bytes: Arc::new(bytes),
            forgotten: false,
        }
    }
}
