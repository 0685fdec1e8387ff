//! The trace of an answer: a tree over all of its tokens, and the draw of those that are proven.
//!
//! A node hands in the root together with its answer. The hash of a later block, which nobody knows by then, says at which positions it
//! must prove that the committed state leads to the token. `HeadVerifier.sol` computes the same.
//!
//! - A leaf is `keccak256(0x00 || position || token || state)`, the numbers as words of 32 bytes.
//! - Two neighbours make `keccak256(0x01 || left || right)`. The last of an odd number goes up a level as it is.
//! - A path has, from the leaves up, the neighbour of each level where there is one.
//! - Draw number i is `keccak256(block hash || subject || i) mod tokens`, as one number of 256 bits.

use crate::wire::{PROOF_BYTES, Word, keccak, word_of};

/// The longest path: that of 2^32 leaves.
const MOST_LEVELS: usize = 32;

/// What is committed to at one position of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    pub position: u32,
    pub token: u32,
    /// The commitment of the state before the head.
    pub state: Word,
}

/// A leaf with its path and the proof that the head chooses its token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opening {
    pub leaf: Leaf,
    pub path: Vec<Word>,
    pub proof: Vec<u8>,
}

impl Leaf {
    fn hash(&self) -> Word {
        let words = [word_of(self.position.into()), word_of(self.token.into()), self.state];
        keccak(&[&[0][..], &words.concat()].concat())
    }
}

fn node(left: &Word, right: &Word) -> Word {
    keccak(&[&[1][..], left, right].concat())
}

fn level_above(level: &[Word]) -> Vec<Word> {
    level.chunks(2).map(|pair| if let [left, right] = pair { node(left, right) } else { pair[0] }).collect()
}

/// The root of the tree; `None` without a leaf. The leaves are in order of position, from 0 on.
pub fn root(leaves: &[Leaf]) -> Option<Word> {
    let mut level: Vec<Word> = leaves.iter().map(Leaf::hash).collect();
    while level.len() > 1 {
        level = level_above(&level);
    }
    level.first().copied()
}

/// The path from a leaf to the root; `None` for a position that has no leaf.
pub fn path(leaves: &[Leaf], position: u32) -> Option<Vec<Word>> {
    let mut at = usize::try_from(position).ok().filter(|at| *at < leaves.len())?;
    let mut level: Vec<Word> = leaves.iter().map(Leaf::hash).collect();
    let mut path = Vec::new();
    while level.len() > 1 {
        path.extend(level.get(at ^ 1));
        level = level_above(&level);
        at /= 2;
    }
    Some(path)
}

/// Whether a leaf is one of `tokens` under this root.
pub fn leads(leaf: &Leaf, path: &[Word], tokens: u64, root: &Word) -> bool {
    let (mut at, mut count, mut hash) = (u64::from(leaf.position), tokens, leaf.hash());
    if at >= count {
        return false;
    }
    let mut path = path.iter();
    while count > 1 {
        if at ^ 1 < count {
            let Some(neighbour) = path.next() else { return false };
            hash = if at % 2 == 0 { node(&hash, neighbour) } else { node(neighbour, &hash) };
        }
        at /= 2;
        count = count.div_ceil(2);
    }
    path.next().is_none() && hash == *root
}

/// The positions that are to be proven, in order of their draw. One may come twice. None where there are no tokens.
pub fn draw(block: &Word, subject: &Word, samples: u32, tokens: u32) -> Vec<u32> {
    let one = |number: u32| {
        let hash = keccak(&[&block[..], subject, &word_of(number.into())].concat());
        hash.iter().fold(0, |rest: u64, byte| (rest << 8 | u64::from(*byte)) % u64::from(tokens)) as u32
    };
    if tokens == 0 { Vec::new() } else { (0..samples).map(one).collect() }
}

/// The openings in order of the draw, as the contract takes them for a proof: `abi.encode(Opening[])`, an opening being
/// `(uint256 position, uint256 token, bytes32 state, bytes32[] path, bytes proof)`.
pub fn encode(openings: &[Opening]) -> Vec<u8> {
    let (mut places, mut bodies) = (Vec::new(), Vec::new());
    for Opening { leaf, path, proof } in openings {
        places.extend(word_of((openings.len() * 32 + bodies.len()) as u64));
        // Five words come first, then the path with its length, then the proof with its own.
        let fixed = [
            word_of(leaf.position.into()),
            word_of(leaf.token.into()),
            leaf.state,
            word_of(160),
            word_of(192 + path.len() as u64 * 32),
        ];
        bodies.extend(
            [fixed.concat(), word_of(path.len() as u64).to_vec(), path.concat(), word_of(proof.len() as u64).to_vec()].concat(),
        );
        bodies.extend(proof);
        bodies.resize(bodies.len().next_multiple_of(32), 0);
    }
    [&word_of(32)[..], &word_of(openings.len() as u64), &places, &bodies].concat()
}

/// Openings from what [`encode`] makes of so many; `None` for anything else. What is read is bounded before it is read: parts of a stranger's
/// bytes may name the same place many times.
pub fn decode(bytes: &[u8], count: usize) -> Option<Vec<Opening>> {
    let word = |at: usize| -> Option<Word> { bytes.get(at..at.checked_add(32)?)?.try_into().ok() };
    let number = |at: usize| -> Option<usize> {
        let word = word(at)?;
        let (high, low) = word.split_at(28);
        high.iter().all(|byte| *byte == 0).then(|| u32::from_be_bytes([low[0], low[1], low[2], low[3]]) as usize)
    };
    number(32).filter(|there| *there == count)?;
    let opening = |at: usize| {
        let begin = number(64 + at * 32)?.checked_add(64)?;
        let leaf = Leaf { position: number(begin)? as u32, token: number(begin + 32)? as u32, state: word(begin + 64)? };
        let length = number(begin + 160).filter(|length| *length <= MOST_LEVELS)?;
        let path = (0..length).map(|step| word(begin + 192 + step * 32)).collect::<Option<Vec<_>>>()?;
        let proof_at = begin + 192 + length * 32;
        number(proof_at).filter(|length| *length == PROOF_BYTES)?;
        let proof = bytes.get(proof_at + 32..proof_at + 32 + PROOF_BYTES)?.to_vec();
        Some(Opening { leaf, path, proof })
    };
    let openings = (0..count).map(opening).collect::<Option<Vec<_>>>()?;
    // There is one way to write them.
    (encode(&openings) == bytes).then_some(openings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openings_read_back_and_nothing_else_does() {
        let leaves = leaves(5);
        let opening = |position: u32| Opening {
            leaf: leaves[position as usize],
            path: path(&leaves, position).unwrap(),
            proof: vec![7; 256],
        };
        for openings in [vec![], vec![opening(0)], vec![opening(4), opening(1), opening(4)]] {
            let bytes = encode(&openings);
            let count = openings.len();
            assert_eq!(decode(&bytes, count).as_ref(), Some(&openings));
            assert_eq!(decode(&bytes, count + 1), None);
            for at in 0..bytes.len() {
                let mut changed = bytes.clone();
                changed[at] ^= 0x41;
                assert_ne!(decode(&changed, count).as_ref(), Some(&openings), "byte {at}");
                assert_eq!(decode(&bytes[..at], count), None);
            }
            assert_eq!(decode(&[&bytes[..], &[0; 32]].concat(), count), None);
        }
    }

    #[test]
    fn places_that_are_named_many_times_are_not_read_many_times() {
        // Every opening begins at the same place, and its path is as long as the file. Read before it is compared, that is the square of
        // its size: 320 GB for 6 MB.
        let words = 200_000;
        let mut bytes = vec![0; words * 32];
        let mut put = |at: usize, number: usize| bytes[at + 24..at + 32].copy_from_slice(&(number as u64).to_be_bytes());
        let count = words / 2;
        put(0, 32);
        put(32, count);
        for at in 0..count {
            put(64 + at * 32, count * 32);
        }
        put(64 + count * 32 + 160, words / 2 - 10);
        for expected in [4, count] {
            assert_eq!(decode(&bytes, expected), None);
        }
    }

    fn leaves(count: u32) -> Vec<Leaf> {
        (0..count).map(|position| Leaf { position, token: position * 7, state: [position as u8; 32] }).collect()
    }

    #[test]
    fn every_leaf_leads_to_the_root_and_nothing_else_does() {
        for count in [1, 2, 3, 4, 5, 6, 7, 8, 11, 13] {
            let leaves = leaves(count);
            let (root, tokens) = (root(&leaves).unwrap(), u64::from(count));
            for leaf in &leaves {
                let path = path(&leaves, leaf.position).unwrap();
                assert!(leads(leaf, &path, tokens, &root));
                assert!(!leads(&Leaf { token: leaf.token + 1, ..*leaf }, &path, tokens, &root));
                assert!(!leads(&Leaf { position: leaf.position ^ 1, ..*leaf }, &path, tokens, &root));
                assert!(!leads(&Leaf { position: leaf.position + count, ..*leaf }, &path, tokens, &root));
                assert!(!leads(&Leaf { state: [0xee; 32], ..*leaf }, &path, tokens, &root));
                assert!(!leads(leaf, &[&path[..], &[[0; 32]]].concat(), tokens, &root));
                for at in 0..path.len() {
                    let mut other = path.clone();
                    other[at][0] ^= 1;
                    assert!(!leads(leaf, &other, tokens, &root));
                    other.remove(at);
                    assert!(!leads(leaf, &other, tokens, &root));
                }
            }
            assert_eq!(path(&leaves, count), None);
        }
        assert_eq!(root(&[]), None);
    }

    #[test]
    fn draws_differ_by_block_subject_and_number_and_stay_in_range() {
        let draws = draw(&[1; 32], &[2; 32], 64, 1000);
        assert!(draws.iter().all(|position| *position < 1000));
        assert_ne!(draws, draw(&[3; 32], &[2; 32], 64, 1000));
        assert_ne!(draws, draw(&[1; 32], &[3; 32], 64, 1000));
        assert!(draws.iter().collect::<std::collections::HashSet<_>>().len() > 50);
        assert_eq!(draw(&[1; 32], &[2; 32], 3, 1), [0; 3]);
        assert!(draw(&[1; 32], &[2; 32], 3, 0).is_empty());
    }
}
