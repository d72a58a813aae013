//! The work list of attn_prefill: chunks of query tokens cut into tiles, longest first, so that the blocks that draw from it
//! finish together. A pure function. Must not know devices.

use crate::kernels::params::{ATTN_PREFILL_ROWS_D64, ATTN_PREFILL_ROWS_D128, PAGE_TOKENS, PrefillTile};

/// Where a chunk of one sequence lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRows {
    pub slot: u32,
    /// Row of the batch of its first token.
    pub first_row: u32,
    pub tokens: u32,
    /// Position of its first token in the sequence.
    pub position: u32,
}

/// Query tokens in a tile of heads of `head_dim` elements, `group` query heads (1 to 16) to each KV head.
pub fn prefill_tile_tokens(head_dim: u32, group: u32) -> u32 {
    assert!((1..=16).contains(&group), "attn_prefill takes 1 to 16 query heads per KV head, not {group}");
    let rows = if head_dim == 64 { ATTN_PREFILL_ROWS_D64 } else { ATTN_PREFILL_ROWS_D128 };
    rows / group
}

/// Tiles of at most `prefill_tile_tokens`. A tile costs as much as it sees tiles of keys; among equals those of one sequence
/// stay together, so that blocks that run at a time read the same keys from L2.
pub fn prefill_tiles(chunks: &[ChunkRows], head_dim: u32, group: u32) -> Vec<PrefillTile> {
    let per_tile = prefill_tile_tokens(head_dim, group);
    let mut tiles = Vec::new();
    for chunk in chunks {
        for start in (0..chunk.tokens).step_by(per_tile as usize) {
            tiles.push(PrefillTile {
                first_row: (chunk.first_row + start) as i32,
                tokens: (chunk.tokens - start).min(per_tile) as i32,
                position: (chunk.position + start) as i32,
                slot: chunk.slot as i32,
            });
        }
    }
    tiles.sort_by_key(|tile| std::cmp::Reverse(key_tiles(tile)));
    tiles
}

/// Tiles of two pages of keys that a tile of queries sees.
fn key_tiles(tile: &PrefillTile) -> u32 {
    ((tile.position + tile.tokens) as u32).div_ceil(2 * PAGE_TOKENS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_in_one_tile_and_long_tiles_come_first() {
        let chunk = |slot, first_row, tokens, position| ChunkRows { slot, first_row, tokens, position };
        let chunks = [chunk(3, 0, 1, 700), chunk(1, 1, 300, 0), chunk(2, 301, 18, 64), chunk(5, 319, 19, 4981)];
        for (head_dim, group) in (1..=16).flat_map(|group| [(64, group), (128, group)]) {
            let rows = if head_dim == 64 { 192 } else { 128 };
            let tiles = prefill_tiles(&chunks, head_dim, group);
            let mut seen = vec![None; 338];
            for tile in &tiles {
                assert!(tile.tokens >= 1 && tile.tokens as u32 * group <= rows);
                for i in 0..tile.tokens {
                    let before = seen[(tile.first_row + i) as usize].replace((tile.slot, tile.position + i));
                    assert_eq!(before, None, "group {group}: row {} is in two tiles", tile.first_row + i);
                }
            }
            for c in chunks {
                for i in 0..c.tokens {
                    let expected = Some((c.slot as i32, (c.position + i) as i32));
                    assert_eq!(seen[(c.first_row + i) as usize], expected, "group {group}");
                }
            }
            assert!(tiles.windows(2).all(|t| key_tiles(&t[0]) >= key_tiles(&t[1])));
        }
    }

    #[test]
    fn a_group_that_does_not_divide_the_tile_leaves_rows_idle() {
        let tiles = prefill_tiles(&[ChunkRows { slot: 1, first_row: 0, tokens: 19, position: 0 }], 128, 7);
        assert_eq!(tiles.iter().map(|t| t.tokens).collect::<Vec<_>>(), [18, 1]);
    }

    #[test]
    fn tiles_of_equal_cost_stay_with_their_sequence() {
        let chunk = |slot, first_row| ChunkRows { slot, first_row, tokens: 128, position: 896 };
        let tiles = prefill_tiles(&[chunk(1, 0), chunk(2, 128)], 128, 4);
        assert_eq!(tiles.iter().map(|t| t.slot).collect::<Vec<_>>(), [1, 1, 1, 1, 2, 2, 2, 2]);
    }
}
