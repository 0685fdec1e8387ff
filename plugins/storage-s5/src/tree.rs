//! What lets a part of a blob be checked without the rest of it.
//!
//! BLAKE3 is a tree. Kept are its nodes over groups of 1 MiB: 32 bytes each, 32 KiB for 1 GiB. They merge to the blob's id, so a list of
//! them needs no trust; and a group's bytes hash to its node, whoever sent them.

use blake3::Hasher;
use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

use crate::cid::Id;

/// Bytes of a group: a power of two of BLAKE3's chunks, so that a group is one node of the tree.
pub const GROUP: u64 = 1 << 20;

/// The checkable structure of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    id: Id,
    size: u64,
    /// The nodes; none where the blob is a single group, whose node is the id itself.
    nodes: Vec<ChainingValue>,
}

impl Tree {
    /// Takes nodes from anywhere; `None` where they are not those of this blob.
    pub fn of(id: Id, size: u64, nodes: Vec<ChainingValue>) -> Option<Self> {
        let expected = if size > GROUP { size.div_ceil(GROUP) } else { 0 };
        let fits = nodes.len() as u64 == expected && (nodes.is_empty() || Id::from(root(&nodes)) == id);
        fits.then_some(Self { id, size, nodes })
    }

    pub fn id(&self) -> Id {
        self.id
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn nodes(&self) -> &[ChainingValue] {
        &self.nodes
    }

    /// How many bytes a group has.
    pub fn length(&self, group: u64) -> u64 {
        GROUP.min(self.size - group * GROUP)
    }

    /// Whether these are the bytes of a group.
    pub fn holds(&self, group: u64, bytes: &[u8]) -> bool {
        match self.nodes.get(group as usize) {
            None => Id::from(blake3::hash(bytes)) == self.id,
            Some(node) => bytes.len() as u64 == self.length(group) && node_of(group, bytes) == *node,
        }
    }
}

fn node_of(group: u64, bytes: &[u8]) -> ChainingValue {
    hasher(group).update(bytes).finalize_non_root()
}

fn hasher(group: u64) -> Hasher {
    let mut hasher = Hasher::new();
    hasher.set_input_offset(group * GROUP);
    hasher
}

/// The hash over two or more nodes. The left side of each fork is the largest power of two that leaves something for the right.
fn root(nodes: &[ChainingValue]) -> blake3::Hash {
    let (left, right) = nodes.split_at(nodes.len().next_power_of_two() / 2);
    merge_subtrees_root(&node(left), &node(right), Mode::Hash)
}

fn node(nodes: &[ChainingValue]) -> ChainingValue {
    if let [node] = nodes {
        return *node;
    }
    let (left, right) = nodes.split_at(nodes.len().next_power_of_two() / 2);
    merge_subtrees_non_root(&node(left), &node(right), Mode::Hash)
}

/// Hashes bytes as they come.
#[derive(Debug, Default)]
pub struct Growing {
    hasher: Hasher,
    size: u64,
    nodes: Vec<ChainingValue>,
}

impl Growing {
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let begun = self.size - self.nodes.len() as u64 * GROUP;
            // A full group is closed when more comes: a blob of just one is hashed as a whole.
            if begun == GROUP {
                self.nodes.push(self.hasher.finalize_non_root());
                self.hasher = hasher(self.nodes.len() as u64);
                continue;
            }
            let (now, rest) = bytes.split_at(bytes.len().min((GROUP - begun) as usize));
            self.hasher.update(now);
            self.size += now.len() as u64;
            bytes = rest;
        }
    }

    pub fn finish(mut self) -> Tree {
        if self.nodes.is_empty() {
            return Tree { id: self.hasher.finalize().into(), size: self.size, nodes: Vec::new() };
        }
        self.nodes.push(self.hasher.finalize_non_root());
        Tree { id: root(&self.nodes).into(), size: self.size, nodes: self.nodes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(size: u64) -> Vec<u8> {
        let mut bytes = vec![0; size as usize];
        Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn tree_of_any_size_has_the_id_that_blake3_gives() {
        let bytes = noise(9 * GROUP + 1);
        for size in [0, 1, 1024, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP, 3 * GROUP + 5, 4 * GROUP, 7 * GROUP, 9 * GROUP + 1] {
            let bytes = &bytes[..size as usize];
            let mut growing = Growing::default();
            bytes.chunks(300_007).for_each(|piece| growing.update(piece));
            let tree = growing.finish();
            assert_eq!((tree.id(), tree.size()), (Id::from(blake3::hash(bytes)), size));
            assert_eq!(Tree::of(tree.id(), size, tree.nodes().to_vec()).as_ref(), Some(&tree), "{size}");
            for (group, part) in (0..).zip(bytes.chunks(GROUP as usize)) {
                assert!(tree.holds(group, part), "group {group} of {size}");
                let mut other = part.to_vec();
                other[part.len() / 2] ^= 1;
                assert!(!tree.holds(group, &other) && !tree.holds(group, &part[1..]), "group {group} of {size}");
            }
        }
    }

    #[test]
    fn nodes_of_another_blob_are_refused() {
        let mut growing = Growing::default();
        growing.update(&noise(3 * GROUP));
        let tree = growing.finish();
        let mut nodes = tree.nodes().to_vec();
        nodes.swap(0, 1);
        assert_eq!(Tree::of(tree.id(), tree.size(), nodes.clone()), None);
        nodes.swap(0, 1);
        assert_eq!(Tree::of(tree.id(), 4 * GROUP, nodes), None);
        assert_eq!(Tree::of(tree.id(), tree.size(), Vec::new()), None);
    }
}
