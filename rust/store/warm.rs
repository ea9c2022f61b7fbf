//! What many groups will be read from, touched ahead.

use std::hint::black_box;

use bytemuck::{NoUninit, Pod, bytes_of, try_cast_slice};

use super::{Store, columns::Column};

/// Fewer groups than this lie in the cache anyway, or are read sooner than their misses overlap.
const FEW: usize = 8;

impl Store {
    /// Touches the places that groups `numbers` begin at, column by column.
    ///
    /// A group of a shuffled epoch lies anywhere, and each of its columns is a miss that leads to the
    /// next. One group after the other waits for every one of them; here those of many groups are
    /// under way at the same time. What is read is neither checked nor used.
    pub fn warm(&self, numbers: &[i64]) {
        if numbers.len() < FEW {
            return;
        }
        let prompts: &[u64] = self.unchecked(Column::PromptOffsets);
        let groups: &[u64] = self.unchecked(Column::GroupOffsets);
        let offsets: &[u64] = self.unchecked(Column::CompletionOffsets);
        let roles: &[u8] = self.unchecked(Column::Roles);
        let mask: &[u8] = self.unchecked(Column::Mask);
        let tokens: &[i32] = self.unchecked(Column::Tokens);
        touch(numbers, |number| at(prompts, number) ^ at(groups, number));
        touch(numbers, |number| {
            let first = at(groups, number);
            at(offsets, first) ^ byte_at(roles, first)
        });
        touch(numbers, |number| {
            let start = at(offsets, at(groups, number));
            byte_at(mask, start) ^ byte_at(tokens, start.wrapping_add(at(prompts, number)))
        });
    }

    fn unchecked<T: Pod>(&self, column: Column) -> &[T] {
        let place = self.frame.places.columns[column as usize].clone();
        try_cast_slice(&self.map[place]).unwrap_or_default()
    }
}

fn touch(numbers: &[i64], read: impl Fn(u64) -> u64) {
    let values = numbers.iter().map(|number| read(number.cast_unsigned()));
    black_box(values.fold(0, |all, value| all ^ value));
}

fn at(column: &[u64], index: u64) -> u64 {
    column.get(index as usize).copied().unwrap_or_default()
}

fn byte_at<T: NoUninit>(column: &[T], index: u64) -> u64 {
    let item = column.get(index as usize);
    item.map_or(0, |item| u64::from(bytes_of(item)[0]))
}
