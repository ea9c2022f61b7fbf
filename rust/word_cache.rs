//! A cache from words to token ids, for tokenizers whose tokens never cross a word boundary.
//!
//! A byte-level tokenizer splits text before it merges bytes, and none of its usual patterns
//! matches across the place between a visible character and a following space. Text is cut at
//! those places; most pieces are words that came before, so their ids are looked up, and only new
//! ones go through the tokenizer. Which tokenizers split so is decided by the caller.

use hashbrown::{DefaultHashBuilder, HashTable};
use std::{hash::BuildHasher, ops::Range};

use crate::{Error, Result};

/// Longer pieces hardly come twice: they are encoded each time.
const LONGEST: usize = 48;

/// Ids of pieces seen before. It is cleared when it holds `capacity` bytes of text.
#[derive(Debug)]
pub struct WordCache {
    capacity: usize,
    hasher: DefaultHashBuilder,
    known: HashTable<u32>,
    text: String,
    ids: Vec<i32>,
    pieces: Vec<Piece>,
}

/// Where a piece's text and its ids are.
#[derive(Clone, Debug)]
struct Piece {
    text: Range<usize>,
    ids: Range<usize>,
}

/// Texts as piece numbers: what is known and what has to be encoded.
#[derive(Debug)]
pub struct Lookup {
    /// Numbers of the pieces, text after text.
    pieces: Vec<u32>,
    /// Where each text's pieces begin, and their number.
    offsets: Vec<usize>,
    /// The first number that has no ids yet.
    first_new: usize,
}

impl Lookup {
    /// Texts that were added.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl WordCache {
    /// An empty table.
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity,
            hasher: DefaultHashBuilder::default(),
            known: HashTable::new(),
            text: String::new(),
            ids: Vec::new(),
            pieces: Vec::new(),
        }
    }

    /// Cuts `texts` and looks their pieces up. Earlier lookups are invalid from here on.
    pub fn look_up<'a>(&mut self, texts: impl IntoIterator<Item = &'a str>) -> Lookup {
        let mut lookup = self.begin();
        for text in texts {
            self.add_text(&mut lookup, text);
        }
        lookup
    }

    /// Begins a lookup of no texts. Earlier ones are invalid from here on.
    pub fn begin(&mut self) -> Lookup {
        if self.text.len() > self.capacity {
            *self = Self::new(self.capacity);
        }
        self.go_on()
    }

    /// Begins a further lookup; earlier ones stay valid.
    pub fn go_on(&self) -> Lookup {
        Lookup {
            pieces: Vec::new(),
            offsets: vec![0],
            first_new: self.pieces.len(),
        }
    }

    /// Cuts a text and looks its pieces up.
    pub fn add_text(&mut self, lookup: &mut Lookup, text: &str) {
        for piece in cut(text) {
            let number = self.number_of(piece);
            lookup.pieces.push(number);
        }
        lookup.offsets.push(lookup.pieces.len());
    }

    fn number_of(&mut self, piece: &str) -> u32 {
        if piece.len() > LONGEST {
            return self.add(piece);
        }
        let hash = self.hasher.hash_one(piece);
        let same = |&number: &u32| self.text_of(number) == piece;
        if let Some(&number) = self.known.find(hash, same) {
            return number;
        }
        let number = self.add(piece);
        let (hasher, text, pieces) = (&self.hasher, &self.text, &self.pieces);
        self.known.insert_unique(hash, number, |&number| {
            hasher.hash_one(&text[pieces[number as usize].text.clone()])
        });
        number
    }

    fn add(&mut self, piece: &str) -> u32 {
        let start = self.text.len();
        self.text.push_str(piece);
        self.pieces.push(Piece {
            text: start..self.text.len(),
            ids: 0..0,
        });
        self.pieces.len() as u32 - 1
    }

    fn text_of(&self, number: u32) -> &str {
        &self.text[self.pieces[number as usize].text.clone()]
    }

    /// The pieces of `lookup` that have no ids yet.
    pub fn new_pieces(&self, lookup: &Lookup) -> impl Iterator<Item = &str> {
        let new = &self.pieces[lookup.first_new..];
        new.iter().map(|piece| &self.text[piece.text.clone()])
    }

    /// Takes the ids of [`WordCache::new_pieces`], in their order.
    pub fn learn(&mut self, lookup: &Lookup, encoded: &[Vec<i32>]) -> Result<()> {
        let new = &mut self.pieces[lookup.first_new..];
        if new.len() != encoded.len() {
            let (wanted, found) = (new.len(), encoded.len());
            return Err(Error::Invalid(format!(
                "ids of {found} pieces for {wanted}"
            )));
        }
        for (piece, ids) in new.iter_mut().zip(encoded) {
            let start = self.ids.len();
            self.ids.extend_from_slice(ids);
            piece.ids = start..self.ids.len();
        }
        Ok(())
    }

    /// Forgets the new pieces: their ids could not be had.
    pub fn forget(&mut self) {
        *self = Self::new(self.capacity);
    }

    /// The ids of every text, end to end, and where each begins.
    pub fn ids(&self, lookup: &Lookup) -> (Vec<i32>, Vec<i64>) {
        let mut ids = Vec::new();
        let mut offsets = Vec::with_capacity(lookup.offsets.len());
        offsets.push(0);
        for text in 0..lookup.len() {
            self.append_ids(lookup, text, &mut ids);
            offsets.push(ids.len() as i64);
        }
        (ids, offsets)
    }

    /// Appends the ids of one text.
    pub fn append_ids(&self, lookup: &Lookup, text: usize, ids: &mut Vec<i32>) {
        let range = lookup.offsets[text]..lookup.offsets[text + 1];
        for &number in &lookup.pieces[range] {
            ids.extend_from_slice(&self.ids[self.pieces[number as usize].ids.clone()]);
        }
    }
}

/// Cuts a text before every space that follows a visible ASCII character.
fn cut(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = end_of_first(rest.as_bytes());
        let (piece, others) = rest.split_at(end);
        rest = others;
        Some(piece)
    })
}

/// Where the last piece of a text begins: all before it stays as it is, whatever follows the text.
pub fn last_piece(text: &str) -> usize {
    let bytes = text.as_bytes();
    let is_cut = |&at: &usize| bytes[at] == b' ' && bytes[at - 1].is_ascii_graphic();
    (1..bytes.len()).rev().find(is_cut).unwrap_or(0)
}

fn end_of_first(bytes: &[u8]) -> usize {
    let mut from = 1;
    while let Some(found) = bytes[from..].iter().position(|&byte| byte == b' ') {
        let space = from + found;
        if bytes[space - 1].is_ascii_graphic() {
            return space;
        }
        from = space + 1;
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_between_a_visible_character_and_a_space() {
        let pieces: Vec<_> = cut("Hi there,  you\n\nme é x").collect();
        assert_eq!(pieces, ["Hi", " there,", "  you\n\nme", " é x"]);
        assert_eq!(cut("").count(), 0);
        assert_eq!(cut("  a").collect::<Vec<_>>(), ["  a"]);
    }

    #[test]
    fn what_was_learnt_is_not_asked_again() {
        let mut table = WordCache::new(1 << 20);
        let lookup = table.look_up(["a b a", " b"]);
        let new: Vec<_> = table.new_pieces(&lookup).map(str::to_owned).collect();
        assert_eq!(new, ["a", " b", " a"]);
        let ids = [vec![1], vec![2, 3], vec![4]];
        table.learn(&lookup, &ids).expect("three pieces");
        assert!(table.learn(&lookup, &ids[..2]).is_err());
        assert_eq!(table.ids(&lookup), (vec![1, 2, 3, 4, 2, 3], vec![0, 4, 6]));
        let again = table.look_up([" a b"]);
        assert_eq!(table.new_pieces(&again).count(), 0);
        assert_eq!(table.ids(&again), (vec![4, 2, 3], vec![0, 3]));
    }

    #[test]
    fn a_full_table_begins_anew() {
        let mut table = WordCache::new(4);
        for text in ["one two", "three four"] {
            let lookup = table.look_up([text]);
            assert_eq!(table.new_pieces(&lookup).count(), 2);
            table.learn(&lookup, &[vec![1], vec![2]]).expect("two");
            assert_eq!(table.ids(&lookup).0, [1, 2]);
        }
    }
}
