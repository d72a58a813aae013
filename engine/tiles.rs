//! The work list of attn_prefill: chunks of query tokens cut into tiles, longest first, so that the blocks that share them
//! out finish together. A pure function. Must not know devices.

use crate::kernels::params::{ATTN_PREFILL_ROWS, PrefillTile};

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

/// Tiles of at most `ATTN_PREFILL_ROWS / group` tokens, where `group` is the number of query heads per KV head (at most 16).
/// The cost of a tile grows with the keys it sees, so the latest positions come first.
pub fn prefill_tiles(chunks: &[ChunkRows], group: u32) -> Vec<PrefillTile> {
    assert!((1..=16).contains(&group), "attn_prefill takes 1 to 16 query heads per KV head, not {group}");
    let per_tile = ATTN_PREFILL_ROWS / group;
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
    tiles.sort_by_key(|tile| std::cmp::Reverse(tile.position + tile.tokens));
    tiles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_in_one_tile_and_long_tiles_come_first() {
        let chunk = |slot, first_row, tokens, position| ChunkRows { slot, first_row, tokens, position };
        let chunks = [chunk(3, 0, 1, 700), chunk(1, 1, 300, 0), chunk(2, 301, 18, 64), chunk(5, 319, 19, 4981)];
        for group in 1..=16 {
            let tiles = prefill_tiles(&chunks, group);
            let mut seen = vec![None; 338];
            for tile in &tiles {
                assert!(tile.tokens >= 1 && tile.tokens as u32 * group <= ATTN_PREFILL_ROWS);
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
            assert!(tiles.windows(2).all(|t| t[0].position + t[0].tokens >= t[1].position + t[1].tokens));
        }
    }

    #[test]
    fn a_group_that_does_not_divide_the_tile_leaves_rows_idle() {
        let tiles = prefill_tiles(&[ChunkRows { slot: 1, first_row: 0, tokens: 19, position: 0 }], 7);
        assert_eq!(tiles.iter().map(|t| t.tokens).collect::<Vec<_>>(), [1, 18]);
    }
}
