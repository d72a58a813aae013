//! Runs steps: a [`Batch`] becomes launches, on a GPU as one graph per decode bucket. Steps are enqueued and never waited for
//! one by one; what they made is read from the ring later. Must not know requests, text, or why a batch is what it is.

use crate::batch::{Batch, PrefillChunk, Score, Scoring, TokenEvent, Work};
use crate::config::ModelConfig;
use crate::device::{Buffer, Device, Graph, Launch};
use crate::kernels::params::{MAX_DECODE_ROWS, MAX_SLOTS, PAGE_TOKENS, PrefillTile, RING_STEPS, TokenRing};
use crate::kv_cache::KvCache;
use crate::model::{self, Activations, Fusion, Model, PrefillStep, Weights};
use crate::ops::{self, KvType, Rows, Tiles};
use crate::scoring;
use crate::slots::{self, Slots};
use crate::tiles::{ChunkRows, prefill_tiles};
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// Rows of the decode steps that are recorded; a batch takes the smallest that holds it, the rest is padding.
pub const BUCKETS: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];

/// How decode steps follow one another where the scheduler knows that nothing will change for a while.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DecodeLoop {
    /// The host launches each.
    #[default]
    Step,
    /// The host launches several at a time, recorded as one list.
    Multi,
    /// The host launches a loop, which the device repeats until there is nothing more to do, or the host breaks in.
    Device,
}

impl DecodeLoop {
    /// Most steps of one launch. A loop's fit the ring beside those already in flight when it is launched.
    fn steps(self) -> u32 {
        match self {
            DecodeLoop::Step => 1,
            DecodeLoop::Multi => 4,
            DecodeLoop::Device => RING_STEPS / 2,
        }
    }
}

/// How to run.
#[derive(Clone, Debug)]
pub struct ExecutorOptions {
    /// Sequences at a time, and one more: slot 0 is reserved.
    pub max_slots: u32,
    /// Longest sequence; absent: the model's, or what fits.
    pub max_context: Option<u32>,
    /// KV cache in pages, or in bytes; absent: what is useful and fits.
    pub pages: Option<u32>,
    pub kv_memory: Option<u64>,
    pub kv_type: KvType,
    /// The layers' matrices that are bf16 become fp8 when they are loaded.
    pub quantize: bool,
    /// Of the device's whole memory, how much may be taken, everything included; absent: most of what is free.
    pub memory_utilization: Option<f64>,
    /// Most prompt tokens in one step.
    pub prefill_chunk: u32,
    /// Replay recorded decode steps; otherwise launch kernel by kernel.
    pub graphs: bool,
    /// Needs graphs; one step at a time without.
    pub decode_loop: DecodeLoop,
    /// Run every kernel alone and measure it.
    pub profile: bool,
    /// A request's tokens depend on nothing but itself.
    pub deterministic: bool,
    pub techniques: Techniques,
}

/// What makes steps faster and changes no token; a study turns one off at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Techniques {
    /// Kernels may start before their predecessors have finished.
    pub pdl: bool,
    pub fusion: Fusion,
    /// Attention of decode cuts sequences, so that few of them occupy all processors.
    pub split_kv: bool,
    /// A decode step has no more rows than the smallest bucket that holds it, instead of the largest.
    pub buckets: bool,
    /// Steps launched before the tokens of the first of them are read.
    pub run_ahead: u32,
}

impl Default for Techniques {
    fn default() -> Self {
        Techniques { pdl: true, fusion: Fusion::default(), split_kv: true, buckets: true, run_ahead: 3 }
    }
}

impl Default for ExecutorOptions {
    fn default() -> Self {
        ExecutorOptions {
            max_slots: 1 + MAX_DECODE_ROWS,
            max_context: None,
            pages: None,
            kv_memory: None,
            kv_type: KvType::default(),
            quantize: false,
            memory_utilization: None,
            prefill_chunk: 512,
            graphs: true,
            decode_loop: DecodeLoop::default(),
            profile: false,
            deterministic: false,
            techniques: Techniques::default(),
        }
    }
}

/// What takes device memory, decided before anything is allocated. Sizes in bytes, exact but for what the driver rounds up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    pub slots: u32,
    /// Page 0 is reserved.
    pub pages: u32,
    /// Of these.
    pub kv_type: KvType,
    /// Tokens of the longest sequence.
    pub context: u32,
    pub prefill_chunk: u32,
    pub weights: u64,
    pub kv_cache: u64,
    /// Activations, the workspace of kernels, a step's inputs, the table of rotations.
    pub workspace: u64,
    /// What the sampler knows of sequences, and their block tables.
    pub slot_states: u64,
    /// What the driver makes of recorded steps, in what is left by the others: known when they have been recorded.
    pub graphs: Option<u64>,
    /// In pinned host memory.
    pub ring: u64,
    pub free: u64,
}

impl MemoryPlan {
    /// # Errors
    /// A context that the model does not have, or that does not fit; too little memory.
    pub fn new(device: &Device, c: &ModelConfig, options: &ExecutorOptions) -> Result<MemoryPlan> {
        assert!((2..=MAX_SLOTS).contains(&options.max_slots) && options.prefill_chunk > 0);
        let model_context = c.max_position_embeddings as u32;
        if let Some(n) = options.max_context.filter(|&n| n > model_context) {
            let problem = format!("{n} is more than the model was made for, {model_context}");
            return Err(Error::request("max_context", problem));
        }
        let (free, total) = device.memory()?;
        let weights = match device.simulated() {
            Some(gpu) if gpu.fp8 && !c.is_fp8() => model::weight_bytes(c) / 2,
            _ => model::weight_bytes(c),
        };
        let kv_type = if device.simulated().is_some_and(|gpu| gpu.fp8) { KvType::Fp8 } else { options.kv_type };
        let page_bytes = KvCache::page_bytes(c.num_layers, model::heads(c), kv_type);
        let workspace = |context: u32| {
            let fixed_splits = fixed_splits(options, context.div_ceil(PAGE_TOKENS));
            Activations::bytes(device, c, options.prefill_chunk, fixed_splits)
                + Inputs::bytes(options.prefill_chunk)
                + model::rotation_bytes(c, context)
        };
        let slot_states = |context: u32| {
            slots::slot_bytes(options.max_slots, c.vocab_size)
                + KvCache::table_bytes(options.max_slots, context.div_ceil(PAGE_TOKENS))
        };
        let most = options.max_context.unwrap_or(model_context);
        let fixed = weights + workspace(most) + slot_states(most);
        let usable = usable_memory(device, free, total, options.memory_utilization)?;
        let room = usable.saturating_sub(fixed) / page_bytes;
        let longest = u64::from(most.div_ceil(PAGE_TOKENS));
        let pages = match (options.pages, options.kv_memory) {
            (Some(pages), _) => u64::from(pages) + 1,
            (None, Some(bytes)) if bytes < 2 * page_bytes => {
                let problem = format!("{} hold no page: two take {}", mebibytes(bytes), mebibytes(2 * page_bytes));
                return Err(Error::Usage(format!("--kv-memory: {problem}")));
            }
            (None, Some(bytes)) => bytes / page_bytes,
            // On the host target memory is not the KV cache's alone: as much as a few long sequences want.
            (None, None) if device.is_host() => room.min(1 + 4 * longest),
            (None, None) => room.min(1 + u64::from(options.max_slots - 1) * longest),
        };
        if pages > room || room < 2 {
            return Err(Error::Device(format!(
                "not enough memory: {} are needed ({} of weights, {} of workspace and slots, {} pages of KV cache of {} \
                 each), {} can be had: lower --kv-pages, --kv-memory, --max-sequences or --max-context, or take a smaller \
                 model",
                mebibytes(fixed + pages.max(2) * page_bytes),
                mebibytes(weights),
                mebibytes(fixed - weights),
                pages.max(2),
                mebibytes(page_bytes),
                mebibytes(usable)
            )));
        }
        let pages = pages.min(u64::from(u32::MAX / PAGE_TOKENS)) as u32;
        let fits = (pages - 1) * PAGE_TOKENS;
        if let Some(wanted) = options.max_context.filter(|&n| n > fits) {
            let (needed, there) = (wanted.div_ceil(PAGE_TOKENS), pages - 1);
            let problem = format!("{wanted} tokens need {needed} pages, and the KV cache has {there}");
            return Err(Error::request("max_context", problem));
        }
        let context = most.min(fits);
        Ok(MemoryPlan {
            slots: options.max_slots,
            pages,
            kv_type,
            context,
            prefill_chunk: options.prefill_chunk,
            weights,
            kv_cache: u64::from(pages) * page_bytes,
            workspace: workspace(context),
            slot_states: slot_states(context),
            graphs: None,
            ring: size_of::<TokenRing>() as u64,
            free,
        })
    }

    /// Of the device's memory, but for recorded steps.
    pub fn bytes(&self) -> u64 {
        self.weights + self.kv_cache + self.workspace + self.slot_states
    }
}

/// How attention of decode cuts sequences, if not as the whole batch has it: pages of the longest sequence, and the fewest that a
/// piece of one may have.
fn fixed_splits(options: &ExecutorOptions, max_pages: u32) -> Option<(u32, u32)> {
    match options.techniques.split_kv {
        true => options.deterministic.then_some((max_pages, 4)),
        false => Some((max_pages, max_pages)),
    }
}

/// How much of the device's memory may be taken.
fn usable_memory(device: &Device, free: u64, total: u64, utilization: Option<f64>) -> Result<u64> {
    let Some(utilization) = utilization else {
        // Some is left to the driver, and on the host target to everybody else.
        return Ok(if device.is_host() { free / 2 } else { free - free / 16 });
    };
    let usable = (total as f64 * utilization) as u64;
    if usable > free {
        return Err(Error::Device(format!(
            "--gpu-memory-utilization {utilization}: that is {} of {}, and only {} are free: ask for less",
            mebibytes(usable),
            mebibytes(total),
            mebibytes(free)
        )));
    }
    Ok(usable)
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}

/// What one kernel has cost so far, each launch run alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelCost {
    pub launches: u64,
    pub seconds: f64,
    /// That had to move, and to be computed.
    pub bytes: u64,
    pub flops: u64,
}

pub struct Executor {
    device: Device,
    plan: MemoryPlan,
    model: Model,
    cache: KvCache,
    slots: Slots,
    activations: Activations,
    inputs: Inputs,
    /// By bucket; empty without graphs.
    graphs: Vec<DecodeGraphs>,
    decode_loop: DecodeLoop,
    /// The last that was launched is a loop, whose steps may turn out fewer than those counted as in flight.
    looping: bool,
    /// What `inputs.decode_slot` holds.
    decode_slots: [i32; MAX_DECODE_ROWS as usize],
    /// Tokens of each slot's sequence, those in flight included.
    lengths: Vec<u32>,
    in_flight: u32,
    /// By slot: whose prompt is to be reported on, and what is known of it so far.
    scores: HashMap<u32, (u32, Vec<Score>)>,
    profile: Option<BTreeMap<&'static str, KernelCost>>,
    techniques: Techniques,
    launch_calls: u64,
}

/// The decode steps of a bucket as recorded.
struct DecodeGraphs {
    one: Graph,
    /// Of `DecodeLoop::steps`, or a loop.
    many: Option<Graph>,
}

/// What the host says of a step, in device memory; [rows] i32 where nothing else is said.
struct Inputs {
    decode_slot: Buffer,
    prefill_slot: Buffer,
    position: Buffer,
    prompt_token: Buffer,
    prompt_position: Buffer,
    /// [rows] of PrefillTile.
    tiles: Buffer,
    tile_count: Buffer,
    /// [16].
    last_rows: Buffer,
    last_slots: Buffer,
}

impl Inputs {
    /// Words of each, in order.
    fn words(prefill_rows: u32) -> [usize; 9] {
        let (rows, decode_rows) = (prefill_rows as usize, MAX_DECODE_ROWS as usize);
        // What a decode step knows of its positions lies in the same place.
        let positions = rows.max(decode_rows);
        let tiles = rows * size_of::<PrefillTile>() / 4;
        [decode_rows, rows, positions, rows, rows, tiles, 1, decode_rows, decode_rows]
    }

    fn bytes(prefill_rows: u32) -> u64 {
        Inputs::words(prefill_rows).iter().sum::<usize>() as u64 * 4
    }

    fn new(device: &Device, prefill_rows: u32) -> Result<Inputs> {
        let [
            decode_slot,
            prefill_slot,
            position,
            prompt_token,
            prompt_position,
            tiles,
            tile_count,
            last_rows,
            last_slots,
        ] = Inputs::words(prefill_rows).map(|words| -> Result<Buffer> {
            let buffer = device.alloc(words * 4)?;
            device.fill(&buffer, 0, words * 4, 0)?;
            Ok(buffer)
        });
        Ok(Inputs {
            decode_slot: decode_slot?,
            prefill_slot: prefill_slot?,
            position: position?,
            prompt_token: prompt_token?,
            prompt_position: prompt_position?,
            tiles: tiles?,
            tile_count: tile_count?,
            last_rows: last_rows?,
            last_slots: last_slots?,
        })
    }
}

impl Executor {
    /// Loads the weights and records the decode steps. `traits`: [vocab], from the tokenizer. `progress` hears of bytes done
    /// and bytes in all.
    ///
    /// # Errors
    /// Tensors that are missing or of the wrong shape, too little memory, a device that fails.
    pub fn new(
        device: &Device,
        config: &ModelConfig,
        weights: Weights,
        traits: &[u8],
        options: &ExecutorOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Executor> {
        let plan = MemoryPlan::new(device, config, options)?;
        let model = Model::load(device, config, weights, plan.context, progress)?;
        let inputs = Inputs::new(device, plan.prefill_chunk)?;
        let max_pages = plan.context.div_ceil(PAGE_TOKENS);
        let (heads, scales) = (model::heads(config), model.kv_scales());
        let cache = KvCache::new(device, heads, plan.kv_type, &scales, plan.pages, plan.slots, max_pages)?;
        let fixed_splits = fixed_splits(options, max_pages);
        let mut executor = Executor {
            device: device.clone(),
            slots: Slots::new(device, plan.slots, traits)?,
            activations: Activations::new(device, config, plan.prefill_chunk, fixed_splits)?,
            lengths: vec![0; plan.slots as usize],
            plan,
            model,
            cache,
            inputs,
            graphs: Vec::new(),
            decode_loop: options.decode_loop,
            looping: false,
            decode_slots: [0; MAX_DECODE_ROWS as usize],
            in_flight: 0,
            scores: HashMap::new(),
            profile: options.profile.then(BTreeMap::new),
            techniques: options.techniques,
            launch_calls: 0,
        };
        if options.graphs && !options.profile {
            let (before, _) = device.memory()?;
            for bucket in BUCKETS {
                let graphs = executor.record(bucket)?;
                executor.graphs.push(graphs);
            }
            let (after, _) = device.memory()?;
            // The host target's lists are not in its memory, whose free bytes others change.
            executor.plan.graphs = Some(if device.is_host() { 0 } else { before.saturating_sub(after) });
        }
        device.synchronize()?;
        Ok(executor)
    }

    fn record(&self, bucket: u32) -> Result<DecodeGraphs> {
        let step = self.decode_launches(bucket, 0)?;
        let launch_all = || step.iter().try_for_each(|launch| self.device.launch(launch));
        self.device.begin_capture()?;
        launch_all()?;
        let one = self.device.end_capture()?;
        let many = match self.decode_loop {
            DecodeLoop::Step => None,
            DecodeLoop::Multi => {
                self.device.begin_capture()?;
                (0..self.decode_loop.steps()).try_for_each(|_| launch_all())?;
                Some(self.device.end_capture()?)
            }
            DecodeLoop::Device => {
                let condition = self.device.begin_loop()?;
                launch_all()?;
                let params = self.slots.sample_params();
                self.device.launch(&ops::decode_loop(params, &self.inputs.decode_slot, bucket, condition))?;
                Some(self.device.end_capture()?)
            }
        };
        Ok(DecodeGraphs { one, many })
    }

    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// Steps whose tokens have not been read yet; of a loop on the device, the most that it may do.
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Most steps that a batch may ask for.
    pub fn decode_steps(&self) -> u32 {
        if self.graphs.is_empty() { 1 } else { self.decode_loop.steps() }
    }

    /// A loop runs on the device, or waits for its turn: until [`Executor::wait`] says that it is over, nothing is submitted.
    pub fn is_looping(&self) -> bool {
        self.looping
    }

    /// Asks the loop on the device to end after its next step.
    pub fn break_in(&self) {
        self.slots.run_for(0);
    }

    /// What each kernel has cost, when profiling.
    pub fn profile(&self) -> impl Iterator<Item = (&'static str, KernelCost)> {
        self.profile.iter().flatten().map(|(&name, &cost)| (name, cost))
    }

    /// Kernels and recorded lists handed to the device since the start.
    pub fn launch_calls(&self) -> u64 {
        self.launch_calls
    }

    /// The launches of a decode step of so many rows, as recorded.
    pub fn decode_launches(&self, bucket: u32, keys: u64) -> Result<Vec<Launch>> {
        let rows = Rows { count: bucket, slot: &self.inputs.decode_slot, position: &self.inputs.position };
        let (activations, fusion) = (&self.activations, self.techniques.fusion);
        let launches = self.model.decode(&rows, keys, &self.cache, &self.slots, activations, fusion)?;
        Ok(self.with_techniques(launches))
    }

    fn with_techniques(&self, mut launches: Vec<Launch>) -> Vec<Launch> {
        launches.iter_mut().for_each(|launch| launch.pdl &= self.techniques.pdl);
        launches
    }

    /// Enqueues a step.
    ///
    /// # Errors
    /// The device failed.
    pub fn submit(&mut self, batch: &Batch) -> Result<()> {
        assert!(!self.looping, "a loop on the device is not over yet");
        for &slot in &batch.releases {
            self.slots.release(slot)?;
        }
        for end in &batch.thinking_ends {
            self.slots.end_thinking(end)?;
        }
        for setup in &batch.admissions {
            self.slots.admit(setup)?;
            self.scores.remove(&setup.slot);
            if setup.sampling.prompt_logprobs.is_some() {
                self.scores.insert(setup.slot, (setup.serial, Vec::new()));
            }
        }
        self.cache.set_pages(&self.device, &batch.pages)?;
        self.cache.copy_pages(&self.device, &batch.copies)?;
        batch.masks.iter().try_for_each(|mask| self.slots.set_mask(mask))?;
        match &batch.work {
            Work::Nothing => Ok(()),
            Work::Prefill(chunks) => self.prefill(chunks),
            Work::Decode { slots, steps } => self.decode(slots, *steps),
        }
    }

    fn decode(&mut self, slots: &[u32], steps: u32) -> Result<()> {
        assert!(self.in_flight + steps <= RING_STEPS, "the ring holds {RING_STEPS} steps");
        let fits =
            |&bucket: &u32| slots.len() <= bucket as usize && (self.techniques.buckets || bucket == MAX_DECODE_ROWS);
        let index = BUCKETS.iter().position(fits).expect("the scheduler knows the rows");
        let mut decode_slots = [0; MAX_DECODE_ROWS as usize];
        for (to, &slot) in decode_slots.iter_mut().zip(slots) {
            *to = slot as i32;
        }
        if decode_slots != self.decode_slots {
            self.device.upload(&self.inputs.decode_slot, 0, bytemuck::cast_slice(&decode_slots))?;
            self.decode_slots = decode_slots;
        }
        match self.graphs.get(index) {
            Some(DecodeGraphs { many: Some(many), .. }) if many.repeats && steps > 1 => {
                self.slots.run_for(self.in_flight + steps);
                self.device.replay(many)?;
                self.launch_calls += 1;
                self.looping = true;
            }
            Some(DecodeGraphs { many: Some(many), .. }) if steps == self.decode_loop.steps() => {
                self.device.replay(many)?;
                self.launch_calls += 1;
            }
            Some(DecodeGraphs { one, .. }) => {
                (0..steps).try_for_each(|_| self.device.replay(one))?;
                self.launch_calls += u64::from(steps);
            }
            None => {
                assert_eq!(steps, 1, "only recorded steps come in numbers");
                let keys = slots.iter().map(|&s| self.lengths[s as usize] as u64).sum();
                let launches = self.decode_launches(BUCKETS[index], keys)?;
                self.launch(launches)?;
                for &slot in slots {
                    self.lengths[slot as usize] += 1;
                }
            }
        }
        self.in_flight += steps;
        Ok(())
    }

    fn prefill(&mut self, chunks: &[PrefillChunk]) -> Result<()> {
        let (mut token, mut position, mut slot) = (Vec::new(), Vec::new(), Vec::new());
        let (mut last_rows, mut last_slots, mut chunk_rows) = (Vec::new(), Vec::new(), Vec::new());
        let (mut pairs, mut keys) = (0, 0);
        for chunk in chunks {
            let (first_row, tokens) = (token.len() as u32, chunk.tokens.len() as u32);
            chunk_rows.push(ChunkRows { slot: chunk.slot, first_row, tokens, position: chunk.position });
            token.extend(chunk.tokens.iter().map(|&t| t as i32));
            position.extend((chunk.position..).take(chunk.tokens.len()).map(|p| p as i32));
            slot.extend(std::iter::repeat_n(chunk.slot as i32, chunk.tokens.len()));
            if chunk.last {
                last_rows.push(token.len() as i32 - 1);
                last_slots.push(chunk.slot as i32);
            }
            self.lengths[chunk.slot as usize] = chunk.position + tokens + 1;
            let (before, new) = (chunk.position as u64, tokens as u64);
            pairs += before * new + new * (new + 1) / 2;
            keys += before + new;
        }
        assert!(token.len() <= self.plan.prefill_chunk as usize, "more tokens than a step has rows");
        let heads = model::heads(&self.model.config);
        let tiles = prefill_tiles(&chunk_rows, heads.dim, heads.group());
        let (device, inputs) = (&self.device, &self.inputs);
        let words: [(&Buffer, &[i32]); 6] = [
            (&inputs.prompt_token, &token),
            (&inputs.prompt_position, &position),
            (&inputs.prefill_slot, &slot),
            (&inputs.tile_count, &[tiles.len() as i32]),
            (&inputs.last_rows, &last_rows),
            (&inputs.last_slots, &last_slots),
        ];
        for (buffer, words) in words {
            device.upload(buffer, 0, bytemuck::cast_slice(words))?;
        }
        device.upload(&inputs.tiles, 0, bytemuck::cast_slice(&tiles))?;
        let step = PrefillStep {
            rows: Rows { count: token.len() as u32, slot: &inputs.prefill_slot, position: &inputs.position },
            tokens: &inputs.prompt_token,
            positions: &inputs.prompt_position,
            tiles: Tiles {
                tiles: &inputs.tiles,
                device_count: &inputs.tile_count,
                count: tiles.len() as u32,
                rows: token.len() as u32,
                pairs,
                keys,
            },
            last_rows: &inputs.last_rows,
            last_slots: &inputs.last_slots,
            sampled: last_rows.len() as u32,
        };
        let launches = self.model.prefill(&step, &self.cache, &self.slots, &self.activations)?;
        self.launch(self.with_techniques(launches))?;
        self.in_flight += !last_rows.is_empty() as u32;
        self.score(chunks)
    }

    /// Reports on prompt tokens where that is asked for: the logits of their rows are made, as many at a time as in decode, and
    /// read here. That waits for everything, and everything for it.
    fn score(&mut self, chunks: &[PrefillChunk]) -> Result<()> {
        let mut row = 0;
        for chunk in chunks {
            if let Some(Scoring { next, top }) = &chunk.scoring {
                let mut scores = Vec::with_capacity(next.len());
                let mut first = row;
                for next in next.chunks(MAX_DECODE_ROWS as usize) {
                    let rows: Vec<i32> = (first..).take(next.len()).collect();
                    self.device.upload(&self.inputs.last_rows, 0, bytemuck::cast_slice(&rows))?;
                    let rows = (&self.inputs.last_rows, next.len() as u32);
                    self.launch(self.model.logits(rows, &self.activations)?.into())?;
                    scores.extend(scoring::scores(&self.logits(next.len())?, next, *top));
                    first += next.len() as i32;
                }
                let (_, before) = self.scores.get_mut(&chunk.slot).expect("its admission asked for it");
                before.truncate(chunk.position as usize);
                before.extend(scores);
            }
            row += chunk.tokens.len() as i32;
        }
        Ok(())
    }

    fn launch(&mut self, launches: Vec<Launch>) -> Result<()> {
        self.launch_calls += launches.len() as u64;
        let Some(profile) = &mut self.profile else {
            return launches.iter().try_for_each(|launch| self.device.launch(launch));
        };
        for launch in launches {
            let seconds = self.device.time(&launch)?;
            let cost = profile.entry(launch.kernel.name.to_str().expect("names are ASCII")).or_default();
            cost.launches += 1;
            cost.seconds += seconds;
            cost.bytes += launch.bytes;
            cost.flops += launch.flops;
        }
        Ok(())
    }

    /// The tokens of the oldest step in flight; waits for it. None: the loop on the device is over, and all has been read.
    ///
    /// # Errors
    /// The device failed: its first error.
    pub fn wait(&mut self) -> Result<Option<Vec<TokenEvent>>> {
        assert!(self.in_flight > 0 || self.looping, "nothing to wait for");
        // On a GPU a token is due in less time than it takes to go to sleep.
        let (spins, turns_per_query) = if self.device.is_host() { (0, 1) } else { (20_000, 64) };
        let mut turn = 0u64;
        loop {
            turn += 1;
            // Before the ring is read: what has finished has also published its tokens.
            let finished = turn.is_multiple_of(turns_per_query) && self.device.is_finished()?;
            if let Some(mut events) = self.slots.pop() {
                self.in_flight -= 1;
                for event in &mut events {
                    if self.scores.get(&event.slot).is_some_and(|(serial, _)| *serial == event.serial) {
                        event.prompt = self.scores.remove(&event.slot).map(|(_, scores)| scores).unwrap_or_default();
                    }
                }
                return Ok(Some(events));
            }
            if finished {
                assert!(self.looping, "all steps are done, and one has published nothing");
                self.looping = false;
                self.in_flight = 0;
                return Ok(None);
            }
            if turn < spins {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(Duration::from_micros(if self.device.is_host() { 200 } else { 20 }));
            }
        }
    }

    /// Logits [rows][vocab] of the last step that made any; waits for everything.
    ///
    /// # Errors
    /// The device failed.
    pub fn logits(&self, rows: usize) -> Result<Vec<f32>> {
        let mut logits = vec![0.0; rows * self.model.config.vocab_size];
        self.device.download(&self.activations.logits, 0, bytemuck::cast_slice_mut(&mut logits))?;
        Ok(logits)
    }
}
