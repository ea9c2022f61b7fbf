//! The groups of one batch: how much room they need, and which array is filled by what.

use bytemuck::cast_slice_mut;

use super::{
    fields::{Field, Options, Table},
    padded::Rows,
    shared,
    targets::BatchGroups,
    tree::Tree,
};
use crate::{Error, Result, group::Layout, store::Store};

/// Groups of a store, found and measured, to be laid out.
#[derive(Debug)]
pub struct Batch<'a> {
    groups: BatchGroups<'a>,
    /// `T`.
    width: usize,
    /// The groups as a tree, in that layout.
    tree: Option<Tree<'a>>,
    options: Options<'a>,
    table: Table,
}

impl<'a> Batch<'a> {
    /// Finds `numbers` in `store`; refuses groups and options that cannot be laid out.
    pub fn new(store: &'a Store, numbers: &'a [i64], options: Options<'a>) -> Result<Self> {
        let mut groups = BatchGroups::find(store, numbers)?;
        let tree = (options.layout == Layout::Tree).then(|| Tree::of(&groups.groups));
        let sizes = &mut groups.sizes;
        if let Some(tree) = &tree {
            (sizes.tokens, sizes.keys) = (tree.tokens(), tree.keys());
            sizes.most_queries = tree.most_queries();
        }
        let width = options.width(match options.layout {
            Layout::Shared | Layout::Tree => sizes.tokens,
            Layout::Padded => sizes.longest,
        })?;
        let mut batch = Self {
            groups,
            width,
            tree,
            options,
            table: Table::default(),
        };
        batch.lay()?;
        Ok(batch)
    }

    fn lay(&mut self) -> Result<()> {
        let Options { layout, fields, .. } = self.options;
        if let Some(field) = fields.iter().find(|field| !field.is_in(layout)) {
            let name = match layout {
                Layout::Tree => "tree",
                Layout::Shared | Layout::Padded => "padded",
            };
            let reason = format!("the {name} layout has no {}", field.name());
            return Err(Error::Invalid(reason));
        }
        if layout != Layout::Padded && self.groups.sizes.keys + self.width > i32::MAX as usize {
            let reason = "a batch holds at most 2^31-1 tokens and keys";
            return Err(Error::Invalid(reason.into()));
        }
        if fields.is_empty() {
            Field::defaults(layout).for_each(|field| self.push(field));
        } else {
            let wanted = |field: &Field| fields.contains(field);
            let fields = Field::ALL.into_iter().filter(wanted);
            fields.for_each(|field| self.push(field));
        }
        Ok(())
    }

    fn push(&mut self, field: Field) {
        let sizes = self.groups.sizes;
        let rows = match self.options.layout {
            Layout::Shared | Layout::Tree => None,
            Layout::Padded => Some(sizes.completions),
        };
        match field {
            Field::InputIds
            | Field::AttentionMask
            | Field::PositionIds
            | Field::TokenMask
            | Field::SegmentIds => self.table.push(field, rows, self.width),
            Field::LogitIndex | Field::TargetIds | Field::CompletionMask | Field::CompletionOf => {
                self.table.push(field, None, sizes.targets);
            }
            Field::CompletionLengths | Field::Roles | Field::Completions => {
                self.table.push(field, None, sizes.completions);
            }
            Field::PromptLengths | Field::GroupSizes | Field::Groups => {
                self.table.push(field, None, self.groups.numbers.len());
            }
            Field::CompletionOffsets => self.table.push(field, None, sizes.completions + 1),
            Field::CuSeqlensQ | Field::CuSeqlensK => {
                let filler = usize::from(self.filler() > 0);
                let sequences = match &self.tree {
                    Some(tree) => tree.runs(),
                    None => self.groups.numbers.len() + sizes.completions,
                };
                self.table.push(field, None, sequences + filler + 1);
            }
            Field::KeyIndex => self.table.push(field, None, sizes.keys + self.filler()),
            Field::MaxSeqlens => self.table.push(field, None, 2),
        }
    }

    /// Of each sequence of queries: tokens that it sees before its own, and its own.
    fn sequences(&self) -> Vec<(usize, usize)> {
        match &self.tree {
            Some(tree) => tree.sequences().collect(),
            None => shared::sequences(&self.groups).collect(),
        }
    }

    /// Tokens that fill the one row of the shared layout up to its width.
    fn filler(&self) -> usize {
        self.width - self.groups.sizes.tokens
    }

    /// The arrays to fill, and where each begins.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Fills the first [`Table::bytes`] bytes of `arena`; their content is overwritten.
    pub fn fill(&self, arena: &mut [u8]) -> Result<()> {
        let parts = self.table.split(arena)?;
        match self.options.layout {
            Layout::Shared | Layout::Tree => {
                for (field, bytes) in parts {
                    match &self.tree {
                        Some(tree) => self.fill_tree(tree, field, bytes),
                        None => self.fill_shared(field, bytes),
                    }
                }
            }
            Layout::Padded => {
                let rows = Rows::new(&self.groups, self.width, self.options.side);
                for (field, bytes) in parts {
                    self.fill_padded(&rows, field, bytes);
                }
            }
        }
        Ok(())
    }

    fn fill_shared(&self, field: Field, bytes: &mut [u8]) {
        let (groups, filler) = (&self.groups, self.filler());
        let pad = i64::from(self.options.pad_id);
        match field {
            Field::InputIds => shared::input_ids(groups, pad, cast_slice_mut(bytes)),
            Field::AttentionMask => shared::attention_mask(groups, cast_slice_mut(bytes)),
            Field::PositionIds => shared::position_ids(groups, cast_slice_mut(bytes)),
            Field::TokenMask => shared::token_mask(groups, cast_slice_mut(bytes)),
            Field::SegmentIds => shared::segment_ids(&self.sequences(), cast_slice_mut(bytes)),
            Field::LogitIndex => shared::logit_index(groups, cast_slice_mut(bytes)),
            Field::CuSeqlensQ => {
                shared::cu_seqlens_q(&self.sequences(), filler, cast_slice_mut(bytes));
            }
            Field::CuSeqlensK => {
                shared::cu_seqlens_k(&self.sequences(), filler, cast_slice_mut(bytes));
            }
            Field::KeyIndex => shared::key_index(groups, cast_slice_mut(bytes)),
            Field::MaxSeqlens => shared::max_seqlens(groups.sizes, filler, cast_slice_mut(bytes)),
            _ => self.fill_targets(field, bytes),
        }
    }

    fn fill_tree(&self, tree: &Tree<'_>, field: Field, bytes: &mut [u8]) {
        let pad = i64::from(self.options.pad_id);
        match field {
            Field::InputIds => tree.input_ids(pad, cast_slice_mut(bytes)),
            Field::PositionIds => tree.position_ids(cast_slice_mut(bytes)),
            Field::LogitIndex => tree.logit_index(cast_slice_mut(bytes)),
            Field::KeyIndex => tree.key_index(cast_slice_mut(bytes)),
            _ => self.fill_shared(field, bytes), // by its sequences
        }
    }

    fn fill_padded(&self, rows: &Rows<'_>, field: Field, bytes: &mut [u8]) {
        let pad = i64::from(self.options.pad_id);
        match field {
            Field::InputIds => rows.input_ids(pad, cast_slice_mut(bytes)),
            Field::AttentionMask => rows.attention_mask(cast_slice_mut(bytes)),
            Field::PositionIds => rows.position_ids(cast_slice_mut(bytes)),
            Field::TokenMask => rows.token_mask(cast_slice_mut(bytes)),
            Field::SegmentIds => rows.segment_ids(cast_slice_mut(bytes)),
            Field::LogitIndex => rows.logit_index(cast_slice_mut(bytes)),
            _ => self.fill_targets(field, bytes),
        }
    }

    fn fill_targets(&self, field: Field, bytes: &mut [u8]) {
        match field {
            Field::TargetIds => self.groups.target_ids(cast_slice_mut(bytes)),
            Field::CompletionMask => self.groups.completion_mask(bytes),
            Field::CompletionOf => self.groups.completion_of(cast_slice_mut(bytes)),
            Field::CompletionOffsets => self.groups.completion_offsets(cast_slice_mut(bytes)),
            Field::PromptLengths => self.groups.prompt_lengths(cast_slice_mut(bytes)),
            Field::CompletionLengths => self.groups.completion_lengths(cast_slice_mut(bytes)),
            Field::GroupSizes => self.groups.group_sizes(cast_slice_mut(bytes)),
            Field::Roles => self.groups.roles(bytes),
            Field::Groups => cast_slice_mut(bytes).copy_from_slice(self.groups.numbers),
            Field::Completions => self.groups.completions(cast_slice_mut(bytes)),
            _ => unreachable!("every other field belongs to a layout"),
        }
    }
}
