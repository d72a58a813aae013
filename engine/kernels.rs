//! The kernel table: pairs each kernel's name with its params struct and block size, once. bindgen's prototypes make a wrong
//! pair a compile error, and [`Kernel::launch`] takes no other params than the kernel's own. Knows no device and no model.
//!
//! A new kernel is a .cu file (build.rs finds it), its prototype in params.h, and a line here.

use crate::device::{AlignedWords, KernelEntry, Launch};
use std::ffi::c_void;
use std::marker::PhantomData;

/// kernels/params.h in Rust, made by bindgen: structs, constants and prototypes, with their layout asserted. Padding is
/// explicit, so that a params struct is initialised to its last byte: `..Default::default()`.
#[allow(non_camel_case_types, clippy::missing_safety_doc)]
pub mod params {
    include!(concat!(env!("OUT_DIR"), "/params.rs"));
}

// `CUBINS`: (name of the .cu file, machine code for sm_90a). Empty without the feature `cuda`.
include!(concat!(env!("OUT_DIR"), "/cubins.rs"));

/// A kernel that takes `Params`.
pub struct Kernel<Params> {
    entry: KernelEntry,
    params: PhantomData<fn(Params)>,
}

impl<Params: Copy> Kernel<Params> {
    /// A launch without cluster, shared memory or programmatic dependence, moving and computing nothing; the caller sets the
    /// fields that differ: `Launch { shared_bytes: 1024, ..KERNEL.launch(grid, params) }`.
    pub fn launch(&'static self, grid: [u32; 3], params: Params) -> Launch {
        const { assert!(align_of::<Params>() <= align_of::<AlignedWords>()) };
        let mut words =
            vec![AlignedWords([0; 8]); size_of::<Params>().div_ceil(size_of::<AlignedWords>())].into_boxed_slice();
        // SAFETY: the words are as large and as aligned as Params. Params is a bindgen struct without implicit padding, so
        // every byte is initialised.
        unsafe { words.as_mut_ptr().cast::<Params>().write(params) };
        Launch { kernel: &self.entry, grid, cluster: 1, shared_bytes: 0, pdl: false, params: words, bytes: 0, flops: 0 }
    }
}

type Function = unsafe extern "C" fn(*const c_void);

/// For each line `name: Params, THREADS;` of what the module `abi` declares a static `NAME: Kernel<Params>`; and all of them
/// in `ALL`.
macro_rules! kernels {
    ($abi:ident; $($name:ident: $Params:ident, $THREADS:ident;)*) => { pastey::paste! {
        $(
            pub static [<$name:upper>]: Kernel<$abi::$Params> = Kernel {
                entry: KernelEntry {
                    name: match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                        Ok(name) => name,
                        Err(_) => unreachable!(),
                    },
                    threads: $abi::$THREADS,
                    params_bytes: size_of::<$abi::$Params>(),
                    params_align: align_of::<$abi::$Params>(),
                    host: erase::<$abi::$Params>($abi::[<host_ $name>]),
                    checked: erase::<$abi::$Params>($abi::[<checked_ $name>]),
                },
                params: PhantomData,
            };
        )*

        /// Every kernel, in the order of the table.
        pub static ALL: &[&KernelEntry] = &[$(&[<$name:upper>].entry),*];
    } };
}

const fn erase<Params>(function: unsafe extern "C" fn(*const Params)) -> Function {
    // SAFETY: the two types differ in what a thin pointer points to; whoever calls it passes a Params.
    unsafe { std::mem::transmute(function) }
}

kernels! {
    params;
    rope_append_d64: RopeParams, ROPE_THREADS;
    rope_append_d128: RopeParams, ROPE_THREADS;
    attn_prefill_d64: AttnPrefillParams, ATTN_PREFILL_THREADS_D64;
    attn_prefill_d128: AttnPrefillParams, ATTN_PREFILL_THREADS_D128;
    attn_prefill_d64_fp8: AttnPrefillParams, ATTN_PREFILL_THREADS_D64;
    attn_prefill_d128_fp8: AttnPrefillParams, ATTN_PREFILL_THREADS_D128;
    attn_decode_d64: AttnDecodeParams, ATTN_DECODE_THREADS;
    attn_decode_d128: AttnDecodeParams, ATTN_DECODE_THREADS;
    attn_decode_d64_fp8: AttnDecodeParams, ATTN_DECODE_THREADS;
    attn_decode_d128_fp8: AttnDecodeParams, ATTN_DECODE_THREADS;
    embed: EmbedParams, EMBED_THREADS;
    rms_norm: NormParams, NORM_THREADS;
    rms_norm_fp8: NormParams, NORM_THREADS;
    rms_norm_summed_fp8: NormParams, NORM_THREADS;
    quantise: QuantiseParams, QUANTISE_THREADS;
    quantise_weight: QuantiseWeightParams, QUANTISE_THREADS;
    rms_norm_summed: NormParams, NORM_THREADS;
    gemm_n96: GemmParams, GEMM_THREADS;
    gemm_n128: GemmParams, GEMM_THREADS;
    gemm_n160: GemmParams, GEMM_THREADS;
    gemm_n192: GemmParams, GEMM_THREADS;
    gemm_n256: GemmParams, GEMM_THREADS;
    gemm_bias_n96: GemmParams, GEMM_THREADS;
    gemm_bias_n128: GemmParams, GEMM_THREADS;
    gemm_bias_n160: GemmParams, GEMM_THREADS;
    gemm_bias_n192: GemmParams, GEMM_THREADS;
    gemm_bias_n256: GemmParams, GEMM_THREADS;
    gemm_residual_n96: GemmParams, GEMM_THREADS;
    gemm_residual_n128: GemmParams, GEMM_THREADS;
    gemm_residual_n160: GemmParams, GEMM_THREADS;
    gemm_residual_n192: GemmParams, GEMM_THREADS;
    gemm_residual_n256: GemmParams, GEMM_THREADS;
    gemm_silu_n128: GemmParams, GEMM_THREADS;
    gemm_silu_n192: GemmParams, GEMM_THREADS;
    gemm_silu_n256: GemmParams, GEMM_THREADS;
    gemm_fp8_n96: GemmParams, GEMM_THREADS;
    gemm_fp8_n128: GemmParams, GEMM_THREADS;
    gemm_fp8_n192: GemmParams, GEMM_THREADS;
    gemm_fp8_bias_n96: GemmParams, GEMM_THREADS;
    gemm_fp8_bias_n128: GemmParams, GEMM_THREADS;
    gemm_fp8_bias_n192: GemmParams, GEMM_THREADS;
    gemm_fp8_residual_n96: GemmParams, GEMM_THREADS;
    gemm_fp8_residual_n128: GemmParams, GEMM_THREADS;
    gemm_fp8_residual_n192: GemmParams, GEMM_THREADS;
    gemm_fp8_silu_n128: GemmParams, GEMM_THREADS;
    gemm_fp8_silu_n192: GemmParams, GEMM_THREADS;
    gemv_norm_m8: GemvParams, GEMV_THREADS;
    gemv_norm_m16: GemvParams, GEMV_THREADS;
    gemv_norm_m32: GemvParams, GEMV_THREADS;
    gemv_norm_m64: GemvParams, GEMV_THREADS;
    gemv_norm_rope_m8: GemvParams, GEMV_THREADS;
    gemv_norm_rope_m16: GemvParams, GEMV_THREADS;
    gemv_norm_rope_m32: GemvParams, GEMV_THREADS;
    gemv_norm_rope_m64: GemvParams, GEMV_THREADS;
    gemv_norm_silu_m8: GemvParams, GEMV_THREADS;
    gemv_norm_silu_m16: GemvParams, GEMV_THREADS;
    gemv_norm_silu_m32: GemvParams, GEMV_THREADS;
    gemv_norm_silu_m64: GemvParams, GEMV_THREADS;
    gemv_m8: GemvParams, GEMV_THREADS;
    gemv_m16: GemvParams, GEMV_THREADS;
    gemv_m32: GemvParams, GEMV_THREADS;
    gemv_m64: GemvParams, GEMV_THREADS;
    gemv_rope_m8: GemvParams, GEMV_THREADS;
    gemv_rope_m16: GemvParams, GEMV_THREADS;
    gemv_rope_m32: GemvParams, GEMV_THREADS;
    gemv_rope_m64: GemvParams, GEMV_THREADS;
    gemv_silu_m8: GemvParams, GEMV_THREADS;
    gemv_silu_m16: GemvParams, GEMV_THREADS;
    gemv_silu_m32: GemvParams, GEMV_THREADS;
    gemv_silu_m64: GemvParams, GEMV_THREADS;
    gemv_norm_logits_m8: GemvParams, GEMV_THREADS;
    gemv_norm_logits_m16: GemvParams, GEMV_THREADS;
    gemv_norm_logits_m32: GemvParams, GEMV_THREADS;
    gemv_norm_logits_m64: GemvParams, GEMV_THREADS;
    gemv_residual_m8: GemvParams, GEMV_THREADS;
    gemv_residual_m16: GemvParams, GEMV_THREADS;
    gemv_residual_m32: GemvParams, GEMV_THREADS;
    gemv_residual_m64: GemvParams, GEMV_THREADS;
    gemv_logits_m8: GemvParams, GEMV_THREADS;
    gemv_logits_m16: GemvParams, GEMV_THREADS;
    gemv_logits_m32: GemvParams, GEMV_THREADS;
    gemv_logits_m64: GemvParams, GEMV_THREADS;
    gemv_fp8_norm_m8: GemvParams, GEMV_THREADS;
    gemv_fp8_norm_m16: GemvParams, GEMV_THREADS;
    gemv_fp8_norm_m32: GemvParams, GEMV_THREADS;
    gemv_fp8_m64: GemvParams, GEMV_THREADS;
    gemv_fp8_norm_rope_m8: GemvParams, GEMV_THREADS;
    gemv_fp8_norm_rope_m16: GemvParams, GEMV_THREADS;
    gemv_fp8_norm_rope_m32: GemvParams, GEMV_THREADS;
    gemv_fp8_rope_m64: GemvParams, GEMV_THREADS;
    gemv_fp8_norm_silu_m8: GemvParams, GEMV_THREADS;
    gemv_fp8_norm_silu_m16: GemvParams, GEMV_THREADS;
    gemv_fp8_norm_silu_m32: GemvParams, GEMV_THREADS;
    gemv_fp8_silu_m64: GemvParams, GEMV_THREADS;
    gemv_fp8_residual_m8: GemvParams, GEMV_THREADS;
    gemv_fp8_residual_m16: GemvParams, GEMV_THREADS;
    gemv_fp8_residual_m32: GemvParams, GEMV_THREADS;
    gemv_fp8_residual_m64: GemvParams, GEMV_THREADS;
    add_residual: AddResidualParams, UNFUSED_THREADS;
    silu_mul: SiluMulParams, UNFUSED_THREADS;
    sample: SampleParams, SAMPLE_THREADS;
    decode_loop: DecodeLoopParams, DECODE_LOOP_THREADS;
    random_normal: RandomParams, RANDOM_THREADS;
}

/// The kernels that prove the SIMT machine (kernels/simt/planted): for the tests alone, and for no GPU.
pub mod planted {
    use super::{Kernel, KernelEntry, PhantomData, erase};

    /// kernels/simt/planted/planted.h in Rust.
    #[allow(non_camel_case_types, clippy::missing_safety_doc)]
    pub mod abi {
        include!(concat!(env!("OUT_DIR"), "/planted.rs"));
    }

    kernels! {
        abi;
        missing_sync_threads: PlantedParams, PLANTED_THREADS;
        shared_race: PlantedParams, PLANTED_THREADS;
        global_race: PlantedParams, PLANTED_THREADS;
        flag_without_fence: PlantedParams, PLANTED_THREADS;
        shared_out_of_bounds: PlantedParams, PLANTED_THREADS;
        global_out_of_bounds: PlantedParams, PLANTED_THREADS;
        uninitialised_shared: PlantedParams, PLANTED_THREADS;
        divergent_shuffle: PlantedParams, PLANTED_THREADS;
        divergent_sync_threads: PlantedParams, PLANTED_THREADS;
        partial_setmaxnreg: PlantedParams, PLANTED_THREADS;
        launch_dependents_before_pdl_wait: PlantedParams, PLANTED_THREADS;
        read_before_pdl_wait: PlantedParams, PLANTED_THREADS;
        early_exit: PlantedParams, PLANTED_THREADS;
        lost_arrive: PlantedParams, PLANTED_THREADS;
        missing_mbarrier_wait: PlantedParams, PLANTED_THREADS;
        early_release: PlantedParams, PLANTED_THREADS;
        transaction_underflow: PlantedParams, PLANTED_THREADS;
        transaction_overflow: PlantedParams, PLANTED_THREADS;
        missing_proxy_fence: PlantedParams, PLANTED_THREADS;
        overwritten_store_source: PlantedParams, PLANTED_THREADS;
        missing_cp_async_wait: PlantedParams, PLANTED_THREADS;
        cp_async_at_exit: PlantedParams, PLANTED_THREADS;
        missing_wgmma_wait: PlantedParams, PLANTED_THREADS;
        overwritten_a_registers: PlantedParams, PLANTED_THREADS;
        wrong_swizzle: PlantedParams, PLANTED_THREADS;
        wrong_stride: PlantedParams, PLANTED_THREADS;
        unfenced_operand: PlantedParams, PLANTED_THREADS;
        release_before_wgmma_wait: PlantedParams, PLANTED_THREADS;
        everybody_waits: PlantedParams, PLANTED_THREADS;
        load_box: PlantedParams, PLANTED_THREADS;
        store_box: PlantedParams, PLANTED_THREADS;
        matrix_fragments: PlantedParams, PLANTED_THREADS;
        mma_fragments: PlantedParams, PLANTED_THREADS;
        wgmma_n8: PlantedParams, PLANTED_THREADS;
        wgmma_n64: PlantedParams, PLANTED_THREADS;
        wgmma_n96: PlantedParams, PLANTED_THREADS;
        wgmma_n256: PlantedParams, PLANTED_THREADS;
        wgmma_e4m3: PlantedParams, PLANTED_THREADS;
        cluster_exchange: PlantedParams, PLANTED_THREADS;
        cluster_arrivals: PlantedParams, PLANTED_THREADS;
        cp_async_copy: PlantedParams, PLANTED_THREADS;
        bulk_copy: PlantedParams, PLANTED_THREADS;
        named_barriers: PlantedParams, PLANTED_THREADS;
        collectives: PlantedParams, PLANTED_THREADS;
        grid_barrier: PlantedParams, PLANTED_THREADS;
        barriers_alone: PlantedParams, PLANTED_THREADS;
    }
}

/// The state machine of kernels/budget.cuh without a sampler around it: for the tests and the simulated device.
pub mod budget {
    use super::params::{self, Budget, PoolString};

    pub struct Machine {
        state: Budget,
        pool: Vec<i32>,
    }

    /// What the sampler must know before the draw.
    pub struct Step {
        pub forced: Option<i32>,
        pub mask_end: bool,
        pub mask_eos: bool,
    }

    impl Machine {
        /// `pool` holds every string of `state`.
        pub fn new(state: Budget, pool: Vec<i32>) -> Machine {
            let strings = [state.start, state.end, state.close, state.end_string, state.inject];
            let holds = |s: &PoolString| s.offset as usize + s.length as usize <= pool.len();
            assert!(strings.iter().chain(&state.ignore_strings).all(holds), "a string outside of the pool");
            Machine { state, pool }
        }

        pub fn state(&self) -> &Budget {
            &self.state
        }

        /// As if the budget had been that from the beginning.
        pub fn set_max_thinking(&mut self, tokens: i32) {
            self.state.max_thinking = tokens;
        }

        pub fn before(&mut self) -> Step {
            let mut step = [0; 3];
            // SAFETY: the pool holds every string, and the step has room for three.
            unsafe { params::simt_budget_before(&mut self.state, self.pool.as_ptr(), step.as_mut_ptr()) };
            Step { forced: (step[0] >= 0).then_some(step[0]), mask_end: step[1] != 0, mask_eos: step[2] != 0 }
        }

        /// What is emitted in place of a drawn token; `None`: draw again with the end set masked.
        pub fn after(&mut self, token: i32, is_eos: bool) -> Option<i32> {
            // SAFETY: the pool holds every string.
            let token = unsafe { params::simt_budget_after(&mut self.state, self.pool.as_ptr(), token, is_eos.into()) };
            (token >= 0).then_some(token)
        }

        /// Gives the token's flags.
        pub fn emit(&mut self, token: i32, traits: u8) -> u32 {
            // SAFETY: the pool holds every string.
            unsafe { params::simt_budget_emit(&mut self.state, self.pool.as_ptr(), token, traits) }
        }

        /// The token that would complete the end now.
        pub fn completing(&self) -> Option<i32> {
            // SAFETY: the pool holds every string.
            let token = unsafe { params::simt_budget_completing(&self.state, self.pool.as_ptr()) };
            (token >= 0).then_some(token)
        }
    }
}
