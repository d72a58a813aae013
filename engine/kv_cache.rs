//! K and V of all sequences in device memory: pools of pages, one pair per layer, and the block table that says which page
//! holds which tokens of a slot. Must not know who decides that.

use crate::Result;
use crate::batch::{PageCopy, PageEntry};
use crate::device::{Buffer, Device, TensorMapSpec};
use crate::kernels::params::{PAGE_TOKENS, TensorMap};
use crate::ops::{Heads, KvScales, KvType, Pages};

pub struct KvCache {
    layers: Vec<Layer>,
    kind: KvType,
    /// [slots][max_pages] i32. What is not set points at page 0, which belongs to nobody.
    block_table: Buffer,
    max_pages: u32,
    /// Of K, or V, of one layer, bytes.
    page_bytes: usize,
}

struct Layer {
    k: Buffer,
    v: Buffer,
    scales: KvScales,
    k_map: TensorMap,
    v_map: TensorMap,
}

impl KvCache {
    /// Bytes of one page in all layers.
    pub fn page_bytes(layers: usize, heads: Heads, kind: KvType) -> u64 {
        layers as u64 * 2 * (heads.kv * PAGE_TOKENS * heads.dim) as u64 * kind.bytes()
    }

    /// Bytes of the block table.
    pub fn table_bytes(slots: u32, max_pages: u32) -> u64 {
        u64::from(slots) * u64::from(max_pages) * 4
    }

    /// `scales`: of each layer, for fp8. `max_pages`: of one sequence.
    pub fn new(
        device: &Device,
        heads: Heads,
        kind: KvType,
        scales: &[KvScales],
        pages: u32,
        slots: u32,
        max_pages: u32,
    ) -> Result<KvCache> {
        let (page, kv) = (PAGE_TOKENS as u64, heads.kv as u64);
        // TMA moves pairs of bytes, whatever they mean.
        let row_bytes = heads.dim as u64 * kind.bytes();
        let pairs = row_bytes / 2;
        let pool = || -> Result<(Buffer, TensorMap)> {
            let buffer = device.alloc((pages as u64 * kv * page * row_bytes) as usize)?;
            // Attention multiplies the unused tokens of a page by 0: they must be finite.
            device.fill(&buffer, 0, buffer.bytes(), 0)?;
            let map = device.tensor_map(&TensorMapSpec {
                address: buffer.address(),
                dims: [pairs, page, kv, pages as u64],
                strides: [2, row_bytes, page * row_bytes, kv * page * row_bytes],
                r#box: [pairs.min(64) as u32, PAGE_TOKENS, 1, 1],
                swizzle: true,
            })?;
            Ok((buffer, map))
        };
        let layer = |scales: &KvScales| -> Result<Layer> {
            let ((k, k_map), (v, v_map)) = (pool()?, pool()?);
            let scales = if kind == KvType::Fp8 { *scales } else { KvScales::default() };
            Ok(Layer { k, v, scales, k_map, v_map })
        };
        let layers = scales.iter().map(layer).collect::<Result<_>>()?;
        let block_table = device.alloc((slots * max_pages) as usize * 4)?;
        device.fill(&block_table, 0, block_table.bytes(), 0)?;
        let page_bytes = (kv * page * row_bytes) as usize;
        Ok(KvCache { layers, kind, block_table, max_pages, page_bytes })
    }

    pub fn layer(&self, index: usize) -> Pages<'_> {
        let Layer { k, v, scales, k_map, v_map } = &self.layers[index];
        Pages {
            k,
            v,
            kind: self.kind,
            scales: *scales,
            k_map: *k_map,
            v_map: *v_map,
            block_table: &self.block_table,
            max_pages: self.max_pages,
        }
    }

    /// Enters pages into the block table, in stream order.
    pub fn set_pages(&self, device: &Device, entries: &[PageEntry]) -> Result<()> {
        for run in entries.chunk_by(|a, b| a.slot == b.slot && a.index + 1 == b.index) {
            let pages: Vec<i32> = run.iter().map(|e| e.page as i32).collect();
            assert!(run[0].index as usize + pages.len() <= self.max_pages as usize, "more pages than a sequence has");
            let at = (run[0].slot * self.max_pages + run[0].index) as usize * 4;
            device.upload(&self.block_table, at, bytemuck::cast_slice(&pages))?;
        }
        Ok(())
    }

    /// Copies whole pages, in stream order.
    pub fn copy_pages(&self, device: &Device, copies: &[PageCopy]) -> Result<()> {
        for (copy, layer) in copies.iter().flat_map(|copy| self.layers.iter().map(move |layer| (copy, layer))) {
            let at = |page: u32| page as usize * self.page_bytes;
            for pool in [&layer.k, &layer.v] {
                device.copy(pool, at(copy.from), at(copy.to), self.page_bytes)?;
            }
        }
        Ok(())
    }
}
