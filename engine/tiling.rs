//! Which tile of the prefill product (kernels/gemm.cu) suits a shape: a model of its time, in clocks of one SM of an H100.
//! Tiles are dealt to the SMs in waves, so a tile that fills the last wave beats a larger one that does not. Knows no device
//! and no buffer.

/// How a product is cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    /// Columns of w's product in a tile; its rows are [`TILE_ROWS`].
    pub columns: u32,
    /// Blocks that share a strip of w by multicast: 1 or 2, above each other.
    pub cluster: u32,
}

pub const TILE_ROWS: u32 = 128;
/// All widths of tiles; not every epilogue has a kernel for each.
pub const WIDTHS: [u32; 5] = [96, 128, 160, 192, 256];

/// Values of k in a stage of the pipeline.
const STAGE_K: u64 = 64;
/// bf16 multiply-adds of an SM in a clock.
const TENSOR_RATE: u64 = 2048;
/// Bytes that L2 gives in a clock, to all SMs together and to one.
const L2_RATE: u64 = 5120;
const L2_RATE_OF_ONE: u64 = 64;
/// From the launch to the first product.
const START: u64 = 1500;
/// Per tile, while the tensor cores of the SM are idle: the accumulators through shared memory; fences and barriers.
const RESULT_PER_COLUMN: u64 = 6;
const RESULT: u64 = 600;

/// A product [rows][n] = [rows][k] [n][k]^T.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    pub rows: u32,
    pub n: u32,
    pub k: u32,
}

impl Tiling {
    /// Groups of `cluster` tiles that cover the result.
    pub fn groups(self, product: Product) -> u32 {
        product.rows.div_ceil(TILE_ROWS * self.cluster) * product.n.div_ceil(self.columns)
    }

    /// Clocks of the whole product, if its operands come from L2 (which they do when it is bound by arithmetic).
    pub fn clocks(self, product: Product, processors: u32) -> u64 {
        let (rows, columns, cluster) = (TILE_ROWS as u64, self.columns as u64, self.cluster as u64);
        let tensor = rows * columns * STAGE_K / TENSOR_RATE;
        let groups = self.groups(product).min(processors / self.cluster) as u64;
        let loads = (rows + columns / cluster) * STAGE_K * 2 / L2_RATE_OF_ONE.min(L2_RATE / (groups * cluster));
        let tile = (product.k as u64).div_ceil(STAGE_K) * tensor.max(loads) + RESULT + RESULT_PER_COLUMN * columns;
        let waves = self.groups(product).div_ceil(processors / self.cluster) as u64;
        START + waves * tile
    }
}

/// The tiling with the least clocks; of equals, the widest. `pairs`: whether clusters may be used.
pub fn choose(product: Product, widths: impl Iterator<Item = u32>, processors: u32, pairs: bool) -> Tiling {
    let pairs = pairs && product.rows > TILE_ROWS && processors > 1;
    let of_width = |columns| [2, 1].map(|cluster| Tiling { columns, cluster });
    let all = widths.flat_map(of_width).filter(|t| pairs || t.cluster == 1);
    all.min_by_key(|t| (t.clocks(product, processors), std::cmp::Reverse(t.columns))).expect("there are tiles")
}
