//! The content key: what a cached log-prob belongs to.

use blake3::Hasher;

use crate::{Error, Result};

/// 256 bits that name one completion in its prompt.
pub type Key = [u8; 32];

/// Hashed before everything else, so that a later rule can never give an equal key.
const RULE: &[u8; 16] = b"logratio.key.v1\0";

/// The same for sums, which depend on the tokens that count.
const SUM_RULE: &[u8; 16] = b"logratio.sum.v1\0";

/// The hash of a prompt, which the keys of its completions start from.
#[derive(Clone, Debug)]
pub struct PromptHash(Hasher);

impl PromptHash {
    /// Hashes the prompt of a group once, whatever its number of completions.
    pub fn new(prompt_ids: &[i32]) -> Self {
        Self::by(RULE, prompt_ids)
    }

    /// The same for keys of sums.
    pub fn of_sums(prompt_ids: &[i32]) -> Self {
        Self::by(SUM_RULE, prompt_ids)
    }

    fn by(rule: &[u8; 16], prompt_ids: &[i32]) -> Self {
        let mut hasher = Hasher::new();
        hasher.update(rule);
        hasher.update(&(prompt_ids.len() as u64).to_le_bytes());
        hasher.update(bytemuck::cast_slice(prompt_ids));
        Self(hasher)
    }

    /// The key of one completion of this prompt.
    pub fn key(&self, completion_ids: &[i32]) -> Key {
        let mut hasher = self.0.clone();
        hasher.update(bytemuck::cast_slice(completion_ids));
        hasher.finalize().into()
    }

    /// The key of the sum over the tokens of one completion whose `mask` is not 0, whatever their
    /// weights; to be asked of [`Self::of_sums`].
    pub fn sum_key(&self, completion_ids: &[i32], mask: &[u8]) -> Key {
        let mut hasher = self.0.clone();
        hasher.update(bytemuck::cast_slice(completion_ids));
        if mask.iter().any(|&value| value > 1) {
            let counted: Vec<u8> = mask.iter().map(|&value| u8::from(value != 0)).collect();
            hasher.update(&counted);
        } else {
            hasher.update(mask);
        }
        hasher.finalize().into()
    }
}

/// Hashes one completion in its prompt: BLAKE3 of the 16 bytes `logratio.key.v1\0`, `start` as
/// little-endian u64, and every id as little-endian i32.
///
/// `ids` are the prompt and the completion exactly as fed to the model, `start` is the prompt's
/// length. Nothing else (order, siblings, loss, masks) can change a key.
///
/// ```
/// let key = logratio::content_key::content_key(&[1, 2, 3], 2)?;
/// assert_ne!(key, logratio::content_key::content_key(&[1, 2, 3], 1)?);
/// # Ok::<(), logratio::Error>(())
/// ```
pub fn content_key(ids: &[i32], start: usize) -> Result<Key> {
    if start == 0 || start >= ids.len() {
        let length = ids.len();
        let reason = format!("start {start} leaves no prompt or no completion of {length} ids");
        return Err(Error::Invalid(reason));
    }
    let (prompt, completion) = ids.split_at(start);
    Ok(PromptHash::new(prompt).key(completion))
}
