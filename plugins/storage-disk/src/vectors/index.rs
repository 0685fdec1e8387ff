//! An approximate index in memory: row numbers by direction. It may be lost at any time, for all of it can be made from the rows.

use std::path::Path;

use usearch::{IndexOptions, MetricKind, ScalarKind};

use super::error::{Result, VectorError};

/// Links of a node of the graph, and how many nodes are looked at while one is added or looked for.
const CONNECTIVITY: usize = 16;
const EXPANSION_ADD: usize = 128;
const EXPANSION_SEARCH: usize = 112;

/// Bytes that a row takes besides its numbers: links, and the way from a row's number to its place.
const ROW_OVERHEAD: u64 = 350;

/// A graph of directions in 16-bit numbers. What it finds is looked at once more with the exact ones.
pub struct Index {
    native: usearch::Index,
    /// Searches that may run at once.
    searches: usize,
}

impl Index {
    pub fn new(dimensions: usize, searches: usize) -> Result<Self> {
        let options = IndexOptions {
            dimensions,
            // Of directions, which all have the length 1, the inner product is the cosine, for a third of the work.
            metric: MetricKind::IP,
            // Faster than half precision with every kernel that usearch chooses from; what is rounded more is looked at again anyway.
            quantization: ScalarKind::BF16,
            connectivity: CONNECTIVITY,
            expansion_add: EXPANSION_ADD,
            expansion_search: EXPANSION_SEARCH,
            multi: false,
        };
        let index = Self { native: usearch::Index::new(&options).map_err(VectorError::index)?, searches };
        index.reserve(0)?;
        Ok(index)
    }

    /// The memory that an index of so many rows takes, about.
    pub fn estimate(rows: u64, dimensions: u64) -> u64 {
        rows.saturating_mul(2 * dimensions + ROW_OVERHEAD)
    }

    /// Room for so many rows. Nothing may run on the index meanwhile.
    fn reserve(&self, rows: usize) -> Result<()> {
        self.native.reserve_capacity_and_threads(rows, self.searches).map_err(VectorError::index)
    }

    /// Adds a row, or does nothing where it is there already.
    pub fn add(&mut self, row: u64, numbers: &[f32]) -> Result<()> {
        if self.native.contains(row) {
            return Ok(());
        }
        let size = self.native.size();
        if size >= self.native.capacity() {
            self.reserve((size * 2).max(1024))?;
        }
        self.native.add(row, numbers).map_err(VectorError::index)
    }

    /// Removes a row, if it is there.
    pub fn remove(&mut self, row: u64) -> Result<()> {
        self.native.remove(row).map(drop).map_err(VectorError::index)
    }

    /// Rows that are among the nearest, in no order that one should rely on.
    pub fn search(&self, numbers: &[f32], wanted: usize) -> Result<Vec<u64>> {
        Ok(self.native.search(numbers, wanted).map_err(VectorError::index)?.keys)
    }

    pub fn len(&self) -> usize {
        self.native.size()
    }

    /// Writes the index to a file, and says how long the file must be. It is not forced to the disk.
    pub fn save(&self, path: &Path) -> Result<u64> {
        self.native.save(utf8(path)?).map_err(VectorError::index)?;
        Ok(self.native.serialized_length() as u64)
    }

    /// Reads what [`Index::save`] wrote. The file is trusted: whoever calls this has compared its checksum.
    pub fn load(path: &Path, dimensions: usize, searches: usize) -> Result<Self> {
        let index = Self::new(dimensions, searches)?;
        index.native.load(utf8(path)?).map_err(VectorError::index)?;
        if index.native.dimensions() != dimensions {
            return Err(VectorError::Index(format!("it is of vectors of {} numbers", index.native.dimensions())));
        }
        index.reserve(index.native.size())?;
        Ok(index)
    }
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| VectorError::Index(format!("the path {} is not UTF-8", path.display())))
}
