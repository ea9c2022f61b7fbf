//! Many groups at once, end to end.

use crate::{Error, Result, group::Group};

/// `G` groups of `N` completions in all: borrowed columns, one group after the other.
#[derive(Clone, Copy, Debug)]
pub struct Bulk<'a> {
    /// Ids of prompt 0, prompt 1, …: `[ΣP]`.
    pub prompt_ids: &'a [i32],
    /// Tokens of each prompt: `[G]`.
    pub prompt_lengths: &'a [u32],
    /// Ids of completion 0, completion 1, …: `[ΣC]`.
    pub completion_ids: &'a [i32],
    /// 1 where a completion's token counts, else 0: `[ΣC]`.
    pub completion_mask: &'a [u8],
    /// Tokens of each completion: `[N]`.
    pub completion_lengths: &'a [u32],
    /// Completions of each group: `[G]`.
    pub group_sizes: &'a [u32],
    /// Number of the role of each completion: `[N]`.
    pub roles: &'a [u8],
    /// Number of the source file of each group: `[G]`.
    pub files: &'a [u32],
    /// Line in the source file of each group: `[G]`.
    pub lines: &'a [u64],
}

impl<'a> Bulk<'a> {
    /// The groups, each found right by [`Group::check`].
    pub fn groups(&self) -> Result<Vec<Group<'a>>> {
        self.check_sums()?;
        let (mut prompts, mut ids, mut mask) =
            (self.prompt_ids, self.completion_ids, self.completion_mask);
        let (mut lengths, mut roles) = (self.completion_lengths, self.roles);
        let numbers = self.prompt_lengths.iter().zip(self.group_sizes);
        let sources = self.files.iter().zip(self.lines);
        let cut = |((&prompt, &size), (&file, &line)): ((&u32, &u32), (&u32, &u64))| {
            let completion_lengths = take(&mut lengths, size as usize);
            let tokens = sum(completion_lengths);
            Group {
                prompt_ids: take(&mut prompts, prompt as usize),
                completion_ids: take(&mut ids, tokens),
                completion_mask: take(&mut mask, tokens),
                completion_lengths,
                roles: take(&mut roles, size as usize),
                file,
                line,
            }
        };
        let groups: Vec<_> = numbers.zip(sources).map(cut).collect();
        for (index, group) in groups.iter().enumerate() {
            let named = |error| Error::Invalid(format!("group {index}: {error}"));
            group.check().map_err(named)?;
        }
        Ok(groups)
    }

    /// Refuses columns that do not belong together; where one ends early, no group can be named.
    fn check_sums(&self) -> Result<()> {
        let groups = self.group_sizes.len();
        let completions = sum(self.group_sizes);
        let (prompts, tokens) = (sum(self.prompt_lengths), sum(self.completion_lengths));
        let columns = [
            ("prompt_lengths", self.prompt_lengths.len(), groups),
            ("files", self.files.len(), groups),
            ("lines", self.lines.len(), groups),
            (
                "completion_lengths",
                self.completion_lengths.len(),
                completions,
            ),
            ("roles", self.roles.len(), completions),
            ("prompt_ids", self.prompt_ids.len(), prompts),
            ("completion_ids", self.completion_ids.len(), tokens),
            ("completion_mask", self.completion_mask.len(), tokens),
        ];
        match columns
            .into_iter()
            .find(|(_, found, expected)| found != expected)
        {
            None => Ok(()),
            Some((name, found, expected)) => Err(Error::Invalid(format!(
                "{name} has {found} values, but the other columns say {expected}"
            ))),
        }
    }
}

fn sum(lengths: &[u32]) -> usize {
    lengths.iter().map(|&length| length as usize).sum()
}

/// Cuts `count` values, which are there, off the front.
fn take<'a, T>(values: &mut &'a [T], count: usize) -> &'a [T] {
    let (taken, left) = values.split_at(count);
    *values = left;
    taken
}
