//! Pairs of plain text to ids, many at once.
//!
//! This does what the tokenizer's Python half does to a row, for rows that need no warning, no
//! truncation and no error. Every other row is called odd and left to Python. A row may be called odd
//! without need, but a row that needs a message is always called odd.

use crate::{
    Result,
    word_cache::{Lookup, WordCache, last_piece},
};

/// Ids of new pieces of text, in their order.
pub type Encode<'a, E> = dyn FnMut(&[&str]) -> std::result::Result<Vec<Vec<i32>>, E> + 'a;

/// A row's prompt, chosen and rejected.
pub type Row<'a> = [&'a str; 3];

/// What ids have to be like, and what is put around them.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Put before a prompt that does not begin with it.
    pub opening: Vec<i32>,
    /// Appended to an answer that does not end with it.
    pub ending: Option<i32>,
    /// The beginning-of-text token.
    pub bos: Option<i32>,
    /// The end-of-text token.
    pub eos: Option<i32>,
    /// Tokens that no ordinary text holds, in order.
    pub special: Vec<i32>,
    /// Most tokens of a prompt.
    pub prompt_budget: usize,
    /// Most tokens of a prompt and one completion.
    pub max_length: usize,
}

/// The rows that are not odd, end to end.
#[derive(Debug, Default)]
pub struct Pairs {
    /// Every prompt.
    pub prompt_ids: Vec<i32>,
    /// Tokens of each prompt.
    pub prompt_lengths: Vec<u32>,
    /// Chosen, rejected, and so on.
    pub completion_ids: Vec<i32>,
    /// Tokens of each completion.
    pub completion_lengths: Vec<u32>,
    /// Completions of each row before which the prompt's own ids would have changed.
    pub moved: Vec<u32>,
    /// For each row that came in, whether it is left out.
    pub odd: Vec<bool>,
}

/// Encodes rows; `None` is one that is no text.
pub fn encode<E: From<crate::Error>>(
    table: &mut WordCache,
    rows: &[Option<Row<'_>>],
    rules: &Rules,
    tokenize: &mut Encode<'_, E>,
) -> std::result::Result<Pairs, E> {
    let odd = rows.iter().map(|row| row.is_none_or(is_odd));
    let odd: Vec<bool> = odd.collect();
    let sound: Vec<Row<'_>> = rows.iter().zip(&odd).filter_map(sound_one).collect();
    let mut joined = Joined::look_up(table, &sound);
    learn(table, &joined.lookup, tokenize)?;
    joined.find_moved(table);
    let alone = joined.look_up_alone(table, &sound);
    learn(table, &alone, tokenize)?;
    let mut pairs = Pairs {
        odd,
        ..Pairs::default()
    };
    joined.write(table, &alone, rules, &mut pairs);
    Ok(pairs)
}

fn sound_one<'a>((row, &odd): (&Option<Row<'a>>, &bool)) -> Option<Row<'a>> {
    row.filter(|_| !odd)
}

fn learn<E: From<crate::Error>>(
    table: &mut WordCache,
    lookup: &Lookup,
    tokenize: &mut Encode<'_, E>,
) -> std::result::Result<(), E> {
    let new: Vec<&str> = table.new_pieces(lookup).collect();
    if new.is_empty() {
        return Ok(());
    }
    let learnt = tokenize(&new).and_then(|ids| {
        let result: Result<()> = table.learn(lookup, &ids);
        result.map_err(E::from)
    });
    learnt.inspect_err(|_| table.forget())
}

/// Whether a row's text, before it is encoded, needs a closer look.
fn is_odd([prompt, chosen, rejected]: Row<'_>) -> bool {
    let answers = [chosen, rejected];
    prompt.is_empty()
        || chosen == rejected
        || answers.into_iter().any(is_blank)
        || answers.into_iter().all(|answer| answer.starts_with(prompt))
        || [prompt, chosen, rejected]
            .iter()
            .any(|text| text.contains('\0'))
}

fn is_blank(text: &str) -> bool {
    text.chars().all(|c| c.is_whitespace() || c.is_control())
}

/// Each row's prompt, the end of it that an answer could change, and both answers joined to that end.
struct Joined {
    /// Four texts a row.
    lookup: Lookup,
    /// Two of each row.
    moved: Vec<bool>,
    /// Tokens of the prompt's end, which an unmoved completion begins with.
    ends: Vec<usize>,
}

const TEXTS: usize = 4;

impl Joined {
    fn look_up(table: &mut WordCache, rows: &[Row<'_>]) -> Self {
        let mut lookup = table.begin();
        let mut text = String::new();
        for [prompt, answers @ ..] in rows {
            let end = &prompt[last_piece(prompt)..];
            table.add_text(&mut lookup, prompt);
            table.add_text(&mut lookup, end);
            for answer in answers {
                text.clear();
                text.push_str(end);
                text.push_str(answer);
                table.add_text(&mut lookup, &text);
            }
        }
        Self {
            lookup,
            moved: Vec::new(),
            ends: Vec::new(),
        }
    }

    fn rows(&self) -> usize {
        self.lookup.len() / TEXTS
    }

    /// Finds the answers that change the ids of the prompt's end.
    fn find_moved(&mut self, table: &WordCache) {
        let (mut end, mut whole) = (Vec::new(), Vec::new());
        for row in 0..self.rows() {
            end.clear();
            table.append_ids(&self.lookup, row * TEXTS + 1, &mut end);
            self.ends.push(end.len());
            for side in 0..2 {
                whole.clear();
                table.append_ids(&self.lookup, row * TEXTS + 2 + side, &mut whole);
                self.moved.push(!whole.starts_with(&end));
            }
        }
    }

    /// Looks up the answers that have to be encoded on their own.
    fn look_up_alone(&self, table: &mut WordCache, rows: &[Row<'_>]) -> Lookup {
        let mut lookup = table.go_on();
        let answers = rows.iter().flat_map(|row| &row[1..]);
        for (answer, _) in answers.zip(&self.moved).filter(|&(_, &moved)| moved) {
            table.add_text(&mut lookup, answer);
        }
        lookup
    }

    /// Writes the rows that the rules let pass as they are, and calls the others odd.
    fn write(&self, table: &WordCache, alone: &Lookup, rules: &Rules, pairs: &mut Pairs) {
        let places: Vec<usize> = (0..pairs.odd.len()).filter(|&at| !pairs.odd[at]).collect();
        let (mut row, mut next_alone) = (Encoded::default(), 0);
        for (number, at) in places.into_iter().enumerate() {
            row.clear();
            table.append_ids(&self.lookup, number * TEXTS, &mut row.prompt);
            for (side, ids) in row.sides.iter_mut().enumerate() {
                if self.moved[number * 2 + side] {
                    table.append_ids(alone, next_alone, ids);
                    next_alone += 1;
                } else {
                    table.append_ids(&self.lookup, number * TEXTS + 2 + side, ids);
                    ids.drain(..self.ends[number]);
                }
            }
            let moved = self.moved[number * 2..][..2].iter().filter(|&&moved| moved);
            if row.holds(&rules.special) || !row.fit(rules) {
                pairs.odd[at] = true;
            } else {
                pairs.push(&row, moved.count() as u32);
            }
        }
    }
}

/// A row as ids.
#[derive(Default)]
struct Encoded {
    prompt: Vec<i32>,
    sides: [Vec<i32>; 2],
}

impl Encoded {
    fn clear(&mut self) {
        self.prompt.clear();
        self.sides.iter_mut().for_each(Vec::clear);
    }

    /// Whether an id is one of `special`, which are in order.
    fn holds(&self, special: &[i32]) -> bool {
        let Some(&first) = special.first() else {
            return false;
        };
        let mut ids = self.prompt.iter().chain(self.sides.iter().flatten());
        ids.any(|id| *id >= first && special.binary_search(id).is_ok())
    }

    /// Adds opening and ending to the ids; true if the row then keeps the rules.
    fn fit(&mut self, rules: &Rules) -> bool {
        if self.sides.iter().any(Vec::is_empty) {
            return false;
        }
        if !self.prompt.starts_with(&rules.opening) {
            self.prompt.splice(0..0, rules.opening.iter().copied());
        }
        let room = rules.max_length.saturating_sub(self.prompt.len());
        for ids in &mut self.sides {
            if let Some(ending) = rules.ending.filter(|ending| ids.last() != Some(ending)) {
                ids.push(ending);
            }
        }
        self.prompt_fits(rules)
            && self.sides[0] != self.sides[1]
            && self
                .sides
                .iter()
                .all(|ids| self.completion_fits(ids, room, rules))
    }

    fn prompt_fits(&self, rules: &Rules) -> bool {
        let doubled = matches!(self.prompt[..], [a, b, ..] if a == b && Some(a) == rules.bos);
        !self.prompt.is_empty() && self.prompt.len() <= rules.prompt_budget && !doubled
    }

    fn completion_fits(&self, ids: &[i32], room: usize, rules: &Rules) -> bool {
        let ends_twice = matches!(ids, [.., a, b] if a == b && Some(*a) == rules.eos);
        let begins_twice = self.prompt.len() == 1
            && Some(self.prompt[0]) == rules.bos
            && Some(ids[0]) == rules.bos;
        ids.len() <= room && !ends_twice && !begins_twice
    }
}

impl Pairs {
    fn push(&mut self, row: &Encoded, moved: u32) {
        self.prompt_ids.extend_from_slice(&row.prompt);
        self.prompt_lengths.push(row.prompt.len() as u32);
        for ids in &row.sides {
            self.completion_ids.extend_from_slice(ids);
            self.completion_lengths.push(ids.len() as u32);
        }
        self.moved.push(moved);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Letters are their code, but for "ab", which is one token: 1.
    fn letters(texts: &[&str]) -> Vec<Vec<i32>> {
        let ids = |text: &str| {
            text.replace("ab", "\u{1}")
                .chars()
                .map(|c| c as i32)
                .collect()
        };
        texts.iter().map(|text| ids(text)).collect()
    }

    fn encoded(rows: &[Row<'_>], rules: &Rules) -> Pairs {
        let rows: Vec<_> = rows.iter().map(|&row| Some(row)).collect();
        let mut table = WordCache::new(1 << 20);
        let found: Result<_> = encode(&mut table, &rows, rules, &mut |new| Ok(letters(new)));
        found.expect("letters")
    }

    fn rules() -> Rules {
        Rules {
            opening: vec![7],
            ending: Some(8),
            bos: Some(7),
            eos: Some(8),
            special: vec![2],
            prompt_budget: 4,
            max_length: 6,
        }
    }

    #[test]
    fn an_answer_that_changes_the_prompt_is_encoded_alone() {
        let pairs = encoded(&[["xa", "b", "c"]], &rules());
        assert_eq!(pairs.prompt_ids, [7, 120, 97]);
        assert_eq!(pairs.completion_ids, [98, 8, 99, 8]);
        assert_eq!((&pairs.moved[..], &pairs.odd[..]), (&[1][..], &[false][..]));
    }

    #[test]
    fn rows_with_something_to_tell_are_odd() {
        let odd = [
            ["", "a", "b"],
            ["x", "a", "a"],
            ["x", " ", "b"],
            ["x", "\u{1c}", "b"],
            ["x", "xa", "xb"],
            ["x", "a\0", "b"],
            ["x", "\u{2}", "b"],
            ["xyzuv", "a", "b"],
            ["x", "abcdef", "b"],
            ["x", "\u{8}\u{8}", "b"],
            ["\u{7}\u{7}", "a", "b"],
            ["\u{7}", "\u{7}", "b"],
        ];
        for row in odd {
            let pairs = encoded(&[["x", "a", "b"], row], &rules());
            assert_eq!(pairs.odd, [false, true], "{row:?}");
            assert_eq!(pairs.prompt_lengths, [2]);
        }
    }

    #[test]
    fn what_the_tokenizer_raises_is_handed_on_and_nothing_is_remembered() {
        let mut table = WordCache::new(1 << 20);
        let rows = [Some(["x", "a", "b"])];
        let mut broken = |_: &[&str]| Err(crate::Error::Invalid("no".into()));
        assert!(encode(&mut table, &rows, &rules(), &mut broken).is_err());
        let again: Result<_> = encode(&mut table, &rows, &rules(), &mut |new| Ok(letters(new)));
        assert!(again.is_ok());
    }
}
