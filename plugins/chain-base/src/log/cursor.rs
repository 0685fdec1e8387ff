//! Where a reading of the chain stands, in a form that finds its way back after a reorganisation without any other memory.

use thiserror::Error;

/// A block's or a transaction's hash, or a topic.
pub type Hash = [u8; 32];

/// A block that was seen: its number and its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    pub number: u64,
    pub hash: Hash,
}

/// How many of the newest points are kept whatever their distance: most reorganisations end among them.
const NEAR: usize = 8;
/// Up to this distance one point is kept for each power of two; beyond it a single one, so that no reorganisation of a practical depth
/// costs more than a few times what it has undone.
const FAR: u64 = 1024;
/// More points than `thin` ever leaves.
const MOST_POINTS: usize = 32;
const LONGEST_TEXT: usize = 4096;
const VERSION: &str = "c1";

/// Everything up to a log of a block, or up to the block's end, has been told.
///
/// Its text is `c1:<number>:<hash>:<index of the log, or end>` and then `:<number>.<hash>` for each point of the ladder, newest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    at: Point,
    /// The last log of the block that was told; `None`: all of them were.
    index: Option<u64>,
    /// Earlier blocks of the same chain, newest first. Everything in them has been told.
    ladder: Vec<Point>,
}

/// Why a text is no cursor.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CursorError {
    #[error("a cursor has at most {LONGEST_TEXT} bytes, this has {0}")]
    TooLong(usize),
    #[error("a cursor of this plugin begins with `{VERSION}:`")]
    Version,
    #[error(
        "a cursor is `{VERSION}:<number>:<hash>:<index or end>` and then `:<number>.<hash>`, newest first: this is cut off or altered"
    )]
    Form,
}

impl Cursor {
    /// The place after log `index` of block `at`, or after all its logs; `earlier` are blocks of the same chain in any order, of which
    /// those below `at` are thinned to a ladder.
    pub(super) fn new(at: Point, index: Option<u64>, earlier: impl IntoIterator<Item = Point>) -> Self {
        Self { at, index, ladder: thin(at.number, earlier) }
    }

    /// The block that it is in.
    pub fn at(&self) -> Point {
        self.at
    }

    /// The last log of that block that was told; `None`: all of them were.
    pub fn index(&self) -> Option<u64> {
        self.index
    }

    /// Earlier blocks of the same chain, newest first.
    pub(super) fn ladder(&self) -> &[Point] {
        &self.ladder
    }

    /// The end of the ladder's block number `rung`, with what lies below it.
    pub(super) fn back_to(&self, rung: usize) -> Option<Self> {
        let at = *self.ladder.get(rung)?;
        Some(Self { at, index: None, ladder: self.ladder[rung + 1..].to_vec() })
    }
}

impl std::fmt::Display for Cursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{VERSION}:{}:", self.at.number)?;
        hex(f, &self.at.hash)?;
        match self.index {
            Some(index) => write!(f, ":{index}")?,
            None => f.write_str(":end")?,
        }
        for point in &self.ladder {
            write!(f, ":{}.", point.number)?;
            hex(f, &point.hash)?;
        }
        Ok(())
    }
}

impl std::str::FromStr for Cursor {
    type Err = CursorError;

    fn from_str(text: &str) -> Result<Self, CursorError> {
        if text.len() > LONGEST_TEXT {
            return Err(CursorError::TooLong(text.len()));
        }
        let mut parts = text.split(':');
        if parts.next() != Some(VERSION) {
            return Err(CursorError::Version);
        }
        let number = number(parts.next())?;
        let hash = hash(parts.next())?;
        let index = match parts.next() {
            Some("end") => None,
            index => Some(self::number(index)?),
        };
        let at = Point { number, hash };
        let mut ladder = Vec::new();
        let mut above = at.number;
        for part in parts {
            let (number, hash) = part.split_once('.').ok_or(CursorError::Form)?;
            let point = Point { number: self::number(Some(number))?, hash: self::hash(Some(hash))? };
            if point.number >= above || ladder.len() == MOST_POINTS {
                return Err(CursorError::Form);
            }
            above = point.number;
            ladder.push(point);
        }
        Ok(Self { at, index, ladder })
    }
}

/// Decimal digits as `u64` is printed: no sign, no leading zero, so that one place has one text.
fn number(text: Option<&str>) -> Result<u64, CursorError> {
    let text = text.ok_or(CursorError::Form)?;
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if plain { text.parse().map_err(|_| CursorError::Form) } else { Err(CursorError::Form) }
}

/// 64 hexadecimal digits in lower case.
fn hash(text: Option<&str>) -> Result<Hash, CursorError> {
    let digits = text.ok_or(CursorError::Form)?.as_bytes();
    let mut hash = Hash::default();
    if digits.len() != 2 * hash.len() {
        return Err(CursorError::Form);
    }
    for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Ok(hash)
}

fn digit(character: u8) -> Result<u8, CursorError> {
    match character {
        b'0'..=b'9' => Ok(character - b'0'),
        b'a'..=b'f' => Ok(character - b'a' + 10),
        _ => Err(CursorError::Form),
    }
}

/// Written in one piece: a cursor is made for each log, and byte by byte this was most of the work.
fn hex(f: &mut std::fmt::Formatter<'_>, hash: &Hash) -> std::fmt::Result {
    let digits = hash.iter().flat_map(|byte| [byte >> 4, byte & 0xf]);
    let text: String = digits.map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)])).collect();
    f.write_str(&text)
}

/// Keeps the newest points and, of those behind, the oldest in each range of distances that begins at a power of two.
///
/// The oldest, since the cursor moves on: the point that is kept grows old until it falls into the next range, and only then does a
/// newer one take its place. Keeping the newest would replace it each time, and nothing would ever become old. A range can be empty
/// for a while, so a reorganisation undoes at worst about eight times its depth.
fn thin(below: u64, points: impl IntoIterator<Item = Point>) -> Vec<Point> {
    let mut points: Vec<Point> = points.into_iter().filter(|point| point.number < below).collect();
    points.sort_unstable_by_key(|point| std::cmp::Reverse(point.number));
    points.dedup_by_key(|point| point.number);
    let far = points.split_off(points.len().min(NEAR));
    let mut kept = points;
    let mut range = None;
    for point in far {
        let distance = below - point.number;
        let this = distance.min(2 * FAR).ilog2();
        let beyond = this == (2 * FAR).ilog2();
        match (kept.last_mut(), range == Some(this)) {
            // Beyond the last range there is no next one to grow into: the newest stays.
            (Some(last), true) if !beyond => *last = point,
            (_, true) => {}
            (_, false) => kept.push(point),
        }
        range = Some(this);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(number: u64) -> Point {
        let mut hash = [0xab; 32];
        hash[..8].copy_from_slice(&number.to_be_bytes());
        Point { number, hash }
    }

    #[test]
    fn a_cursor_survives_its_text_and_stays_small() {
        let top = u64::MAX - 1;
        for (at, index) in [(top, Some(u64::MAX)), (top, None), (0, Some(0)), (9, None)] {
            let cursor = Cursor::new(point(at), index, (0..5_000).map(|back| point(at.saturating_sub(back + 1))));
            let text = cursor.to_string();
            assert!(text.len() < 4096, "{} bytes", text.len());
            assert_eq!(text.parse(), Ok(cursor));
        }
    }

    #[test]
    fn what_is_not_exactly_a_cursor_is_refused() {
        let text = Cursor::new(point(40), Some(3), (20..40).map(point)).to_string();
        let hash = text.split(':').nth(2).unwrap().to_owned();
        assert!(text.parse::<Cursor>().is_ok());
        for cut in 0..text.len() {
            // Cut between two points of the ladder it is a shorter ladder; anywhere else it is none.
            let at_a_point = text[cut..].starts_with(':') && text[..cut].matches(':').count() >= 3;
            assert_eq!(text[..cut].parse::<Cursor>().is_ok(), at_a_point, "{}", &text[..cut]);
        }
        for wrong in [
            text.to_uppercase(),
            format!(" {text}"),
            format!("{text}\n"),
            format!("{text}:"),
            text.replacen("c1", "c2", 1),
            text.replacen(":40:", ":040:", 1),
            text.replacen(":40:", ":+40:", 1),
            text.replacen(":40:", ":-40:", 1),
            text.replacen(":40:", ":20:", 1),
            text.replacen(":40:", ":18446744073709551616:", 1),
            text.replacen(":3:", "::", 1),
            text.replacen(":3:", ":last:", 1),
            text.replacen(&hash, &hash[1..], 1),
            text.replacen(&hash, &format!("{}é", &hash[..62]), 1),
            format!("c1:1:{hash}:end:1.{hash}"),
            "x".repeat(5_000),
        ] {
            assert!(wrong.parse::<Cursor>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_ladder_stays_dense_near_and_reaches_far_however_it_grows() {
        for step in [1, 2, 3, 7] {
            let mut cursor = Cursor::new(point(0), None, []);
            let mut at = 0;
            while at < 20_000 {
                at += step;
                cursor = Cursor::new(point(at), None, cursor.ladder().iter().copied().chain([cursor.at()]).collect::<Vec<_>>());
                assert!(cursor.ladder().len() <= 20);
            }
            let distances: Vec<u64> = cursor.ladder().iter().map(|point| at - point.number).collect();
            assert_eq!(distances[..8], (1..=8).map(|n| n * step).collect::<Vec<_>>());
            for pair in distances[7..].windows(2) {
                assert!(pair[1] <= 8 * pair[0] + step, "a gap in {distances:?}");
            }
            assert!(distances.last() >= Some(&FAR), "{distances:?}");
        }
    }

    #[test]
    fn a_ladder_of_far_points_keeps_its_newest_and_one_behind() {
        let cursor = Cursor::new(point(100_000), None, (1..40).map(|n| point(n * 2_000)));
        let numbers: Vec<u64> = cursor.ladder().iter().map(|point| point.number / 2_000).collect();
        assert_eq!(numbers, [39, 38, 37, 36, 35, 34, 33, 32, 31]);
    }

    #[test]
    fn going_back_keeps_what_lies_below() {
        let cursor = Cursor::new(point(40), Some(3), (20..40).map(point));
        let back = cursor.back_to(2).unwrap();
        assert_eq!((back.at(), back.index(), back.ladder()), (point(37), None, &cursor.ladder()[3..]));
        assert_eq!(cursor.back_to(cursor.ladder().len()), None);
    }
}
