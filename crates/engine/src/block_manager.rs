//! Who holds which block of the paged cache, and which unheld blocks still hold a prefix worth keeping.
//!
//! A block is *held* (counted by `num_owners`), or *free*; a free block whose contents have a name is
//! *cached* and can be taken back by that name until its turn to be reused comes. All free blocks form one
//! list in order of reuse, threaded through the blocks themselves; block 0, the padding block that nobody
//! holds, is the list's end and beginning:
//!
//! ```text
//! block 0 ─next─► blank ─► blank ─► cached, least recently used ─► ... ─► cached, just freed ─next─► block 0
//!                 └ allocate() takes here             release() puts named blocks here ┘
//! ```
//!
//! Only full blocks, which nobody writes any more, get a name; so only those are ever shared, and no copy on
//! write is needed. This file knows nothing of sequences or of who should be preempted.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use crate::block_hash::{AlreadyHashed, BlockHash};

/// The padding block, which nobody holds: the sentinel of the list of free blocks.
const PADDING_BLOCK: u32 = 0;

/// The blocks of one cache.
#[derive(Debug)]
pub(crate) struct BlockManager {
    blocks: Vec<Block>,
    by_hash: HashMap<BlockHash, u32, BuildHasherDefault<AlreadyHashed>>,
    num_free: usize,
    num_cached: usize,
    keep_freed: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Block {
    num_owners: u32,
    /// The contents' name; `by_hash` leads back here.
    hash: Option<BlockHash>,
    /// Neighbours in the list of free blocks; meaningless while the block is held.
    previous: u32,
    next: u32,
}

impl BlockManager {
    /// Makes `num_blocks` blocks, the padding block included. With `keep_freed`, named blocks stay findable
    /// after their last owner has gone.
    pub(crate) fn new(num_blocks: u32, keep_freed: bool) -> Self {
        let mut manager = Self {
            blocks: vec![Block::default(); num_blocks as usize],
            by_hash: HashMap::default(),
            num_free: 0,
            num_cached: 0,
            keep_freed,
        };
        (1..num_blocks).for_each(|block| manager.link_after(manager.blocks[0].previous, block));
        manager
    }

    /// Blocks that can be allocated now, cached ones included.
    pub(crate) fn num_free(&self) -> usize {
        self.num_free
    }

    /// Free blocks that still hold a prefix.
    pub(crate) fn num_cached(&self) -> usize {
        self.num_cached
    }

    /// How many sequences hold `block`.
    pub(crate) fn num_owners(&self, block: u32) -> u32 {
        self.blocks[block as usize].num_owners
    }

    /// Whether nobody holds `block`.
    pub(crate) fn is_free(&self, block: u32) -> bool {
        self.num_owners(block) == 0
    }

    /// Takes the free block that is least worth keeping; `None` if all are held.
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        let block = self.blocks[PADDING_BLOCK as usize].next;
        if block == PADDING_BLOCK {
            return None;
        }
        self.unlink(block);
        if self.blocks[block as usize].hash.is_some() {
            self.num_cached -= 1;
            self.forget(block);
        }
        self.blocks[block as usize].num_owners = 1;
        Some(block)
    }

    /// Blocks that hold the longest known prefix of a chain of names, in order.
    pub(crate) fn find_prefix<'a>(&'a self, hashes: &'a [BlockHash]) -> impl Iterator<Item = u32> + 'a {
        hashes.iter().map_while(|hash| self.by_hash.get(hash).copied())
    }

    /// Adds an owner to a named block, held or cached.
    pub(crate) fn share(&mut self, block: u32) {
        assert!(self.blocks[block as usize].hash.is_some(), "only full blocks are shared");
        if self.is_free(block) {
            self.unlink(block);
            self.num_cached -= 1;
        }
        self.blocks[block as usize].num_owners += 1;
    }

    /// Names a held block that has just become full. If another block has that name already, this one stays
    /// nameless: its contents are the same.
    pub(crate) fn name(&mut self, block: u32, hash: BlockHash) {
        assert!(!self.is_free(block) && self.blocks[block as usize].hash.is_none());
        if let std::collections::hash_map::Entry::Vacant(vacant) = self.by_hash.entry(hash) {
            vacant.insert(block);
            self.blocks[block as usize].hash = Some(hash);
        }
    }

    /// Takes one owner from each block of a table, and empties it. The last blocks of a sequence are reused
    /// before its first, which more prompts may begin with.
    pub(crate) fn release(&mut self, block_table: &mut Vec<u32>) {
        for block in block_table.drain(..).rev() {
            assert!(!self.is_free(block), "a block is released once per owner");
            self.blocks[block as usize].num_owners -= 1;
            if self.is_free(block) {
                self.free(block);
            }
        }
    }

    fn free(&mut self, block: u32) {
        if !self.keep_freed {
            self.forget(block);
        }
        if self.blocks[block as usize].hash.is_some() {
            self.num_cached += 1;
            self.link_after(self.blocks[PADDING_BLOCK as usize].previous, block);
        } else {
            self.link_after(PADDING_BLOCK, block);
        }
    }

    fn forget(&mut self, block: u32) {
        if let Some(hash) = self.blocks[block as usize].hash.take() {
            self.by_hash.remove(&hash);
        }
    }

    fn link_after(&mut self, previous: u32, block: u32) {
        let next = self.blocks[previous as usize].next;
        self.blocks[block as usize].previous = previous;
        self.blocks[block as usize].next = next;
        self.blocks[previous as usize].next = block;
        self.blocks[next as usize].previous = block;
        self.num_free += 1;
    }

    fn unlink(&mut self, block: u32) {
        let Block { previous, next, .. } = self.blocks[block as usize];
        self.blocks[previous as usize].next = next;
        self.blocks[next as usize].previous = previous;
        self.num_free -= 1;
    }

    /// Checks that free and held blocks are all blocks, that owners are counted, and that names lead where
    /// they should, given the tables of all sequences.
    ///
    /// # Panics
    /// If not.
    pub(crate) fn check_integrity<'a>(&self, block_tables: impl Iterator<Item = &'a [u32]>) {
        let mut num_owners = vec![0; self.blocks.len()];
        block_tables.flatten().for_each(|&block| num_owners[block as usize] += 1);
        assert_eq!(num_owners[PADDING_BLOCK as usize], 0, "nobody holds the padding block");
        for (block, &expected) in num_owners.iter().enumerate() {
            assert_eq!(self.blocks[block].num_owners, expected, "owners of block {block}");
        }

        let mut is_listed = vec![false; self.blocks.len()];
        let mut block = self.blocks[PADDING_BLOCK as usize].next;
        while block != PADDING_BLOCK {
            assert!(!std::mem::replace(&mut is_listed[block as usize], true), "block {block} is free twice");
            assert!(self.is_free(block), "block {block} is free and held");
            block = self.blocks[block as usize].next;
        }
        let num_held = num_owners.iter().filter(|&&owners| owners > 0).count();
        let num_listed = is_listed.iter().filter(|&&listed| listed).count();
        assert_eq!(num_listed, self.num_free);
        assert_eq!(num_held + num_listed, self.blocks.len() - 1, "free and held blocks are all blocks");

        let names = self.blocks.iter().filter(|block| block.hash.is_some());
        assert_eq!(names.count(), self.by_hash.len(), "every name leads to a block");
        assert!(self.by_hash.iter().all(|(hash, &block)| self.blocks[block as usize].hash == Some(*hash)));
        let cached = self.by_hash.values().filter(|&&block| self.is_free(block));
        assert_eq!(cached.count(), self.num_cached);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_hash::{BlockHasher, Scope};

    fn names<const N: usize>() -> [BlockHash; N] {
        let hasher = BlockHasher::new();
        let root = hasher.root(Scope::Salt(None));
        std::array::from_fn(|i| hasher.child(root, &[i as u32]))
    }

    fn allocate(manager: &mut BlockManager, count: usize) -> Vec<u32> {
        (0..count).map(|_| manager.allocate().unwrap()).collect()
    }

    #[test]
    fn every_block_but_the_padding_block_is_given_out_once() {
        let mut manager = BlockManager::new(5, true);
        let mut table = allocate(&mut manager, 4);
        assert_eq!((manager.allocate(), manager.num_free()), (None, 0));
        manager.check_integrity([table.as_slice()].into_iter());
        table.sort();
        assert_eq!(table, [1, 2, 3, 4]);
        manager.release(&mut table);
        assert_eq!((manager.num_free(), manager.num_cached(), table.len()), (4, 0, 0));
        manager.check_integrity([].into_iter());
    }

    #[test]
    fn a_freed_prefix_is_found_until_its_block_is_reused_least_recently_used_first() {
        let [a, b, c] = names();
        let mut manager = BlockManager::new(4, true);
        let table = allocate(&mut manager, 3);
        table.iter().zip([a, b, c]).for_each(|(&block, hash)| manager.name(block, hash));
        // c is freed first; then the sequence of a and b, whose tail goes before its head.
        manager.release(&mut vec![table[2]]);
        manager.release(&mut vec![table[0], table[1]]);
        assert_eq!((manager.num_free(), manager.num_cached()), (3, 3));

        let evicted = allocate(&mut manager, 2);
        assert_eq!(evicted, [table[2], table[1]]);
        assert_eq!(manager.find_prefix(&[a, b]).collect::<Vec<_>>(), [table[0]]);
        assert_eq!(manager.find_prefix(&[b, a]).count(), 0, "a prefix begins at the beginning");
        manager.share(table[0]);
        assert_eq!((manager.num_free(), manager.num_cached()), (0, 0));
        manager.check_integrity([evicted.as_slice(), &table[..1]].into_iter());
    }

    #[test]
    fn a_shared_block_is_free_when_its_last_owner_leaves() {
        let [a] = names();
        let mut manager = BlockManager::new(3, true);
        let block = manager.allocate().unwrap();
        manager.name(block, a);
        manager.share(block);
        manager.release(&mut vec![block]);
        assert!(!manager.is_free(block));
        manager.release(&mut vec![block]);
        assert!(manager.is_free(block));
        manager.check_integrity([].into_iter());
    }

    #[test]
    fn of_two_equal_blocks_one_has_the_name_and_blank_blocks_are_reused_first() {
        let [a] = names();
        let mut manager = BlockManager::new(4, true);
        let mut table = allocate(&mut manager, 3);
        let (named, twin) = (table[0], table[1]);
        manager.name(named, a);
        manager.name(twin, a);
        assert_eq!(manager.find_prefix(&[a]).collect::<Vec<_>>(), [named]);
        manager.release(&mut table);
        assert_eq!(manager.num_cached(), 1);
        assert!(!allocate(&mut manager, 2).contains(&named));
        assert_eq!(manager.allocate(), Some(named));
        assert_eq!(manager.find_prefix(&[a]).count(), 0);
    }

    #[test]
    fn without_a_prefix_cache_names_last_as_long_as_owners() {
        let [a] = names();
        let mut manager = BlockManager::new(3, false);
        let block = manager.allocate().unwrap();
        manager.name(block, a);
        manager.share(block);
        manager.release(&mut vec![block]);
        assert_eq!(manager.find_prefix(&[a]).count(), 1);
        manager.release(&mut vec![block]);
        assert_eq!((manager.find_prefix(&[a]).count(), manager.num_cached()), (0, 0));
        manager.check_integrity([].into_iter());
    }
}
