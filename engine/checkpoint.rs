//! Weights on disk: safetensors files by memory map, sharded or not, with every field of their headers checked before a
//! tensor is handed out. Knows no model: names, shapes and bytes only.
//!
//! Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets: [begin, end]}}, then the data
//! that the offsets count from (github.com/huggingface/safetensors, README, "Format").

use crate::{Error, Result};
use half::{bf16, f16};
use memmap2::{Advice, UncheckedAdvice};
use serde::de::{MapAccess, Visitor};
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// Element types of safetensors that we know the size of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    Bool,
    U8,
    I8,
    F8E4M3,
    F8E5M2,
    I16,
    U16,
    F16,
    Bf16,
    I32,
    U32,
    F32,
    I64,
    U64,
    F64,
}

impl Dtype {
    fn parse(name: &str) -> Option<Dtype> {
        Some(match name {
            "BOOL" => Dtype::Bool,
            "U8" => Dtype::U8,
            "I8" => Dtype::I8,
            "F8_E4M3" => Dtype::F8E4M3,
            "F8_E5M2" => Dtype::F8E5M2,
            "I16" => Dtype::I16,
            "U16" => Dtype::U16,
            "F16" => Dtype::F16,
            "BF16" => Dtype::Bf16,
            "I32" => Dtype::I32,
            "U32" => Dtype::U32,
            "F32" => Dtype::F32,
            "I64" => Dtype::I64,
            "U64" => Dtype::U64,
            "F64" => Dtype::F64,
            _ => return None,
        })
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::Bool | Dtype::U8 | Dtype::I8 | Dtype::F8E4M3 | Dtype::F8E5M2 => 1,
            Dtype::I16 | Dtype::U16 | Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::I32 | Dtype::U32 | Dtype::F32 => 4,
            Dtype::I64 | Dtype::U64 | Dtype::F64 => 8,
        }
    }
}

/// One tensor of a header; `begin..end` in bytes of the data that follows the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub begin: usize,
    pub end: usize,
}

/// A tensor's bytes, in the mapped file.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

/// A matrix [n][k] in fp8 (e4m3), in the mapped file, and what its numbers are multiplied with.
#[derive(Clone)]
pub struct Fp8View<'a> {
    name: String,
    source: &'a Path,
    /// [n][k].
    pub bytes: &'a [u8],
    pub scales: Scales,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    Tensor(f32),
    /// [n].
    Rows(Vec<f32>),
    /// [n / 128][k / 128], rounded up.
    Blocks(Vec<f32>),
}

/// Rows and columns that share a scale.
pub const SCALE_BLOCK: usize = 128;

/// A model folder's tensors.
pub struct Checkpoint {
    /// The file that says which tensors there are.
    source: PathBuf,
    shards: Vec<Shard>,
    /// With the number of the shard.
    tensors: HashMap<String, (usize, TensorInfo)>,
}

struct Shard {
    path: PathBuf,
    file: File,
    map: memmap2::Mmap,
    data_start: usize,
}

/// The format's own limit.
const MAX_HEADER: u64 = 100_000_000;

impl<'a> TensorView<'a> {
    /// The bytes of a range of the elements, as the file has them.
    pub fn elements(&self, range: Range<usize>) -> &'a [u8] {
        let size = self.dtype.size();
        &self.bytes[range.start * size..range.end * size]
    }

    /// Writes a range of the elements to `out` in bf16; those of fp16 and fp32 are rounded to the nearest.
    pub fn bf16(&self, range: Range<usize>, out: &mut [u8]) {
        let bytes = self.elements(range);
        match self.dtype {
            Dtype::Bf16 => out.copy_from_slice(bytes),
            Dtype::F16 => {
                for (out, &x) in out.as_chunks_mut().0.iter_mut().zip(bytes.as_chunks().0) {
                    *out = bf16::from_f32(f16::from_le_bytes(x).to_f32()).to_le_bytes();
                }
            }
            Dtype::F32 => {
                for (out, &x) in out.as_chunks_mut().0.iter_mut().zip(bytes.as_chunks().0) {
                    *out = bf16::from_f32(f32::from_le_bytes(x)).to_le_bytes();
                }
            }
            other => unreachable!("`weights` gives out no {other:?}"),
        }
    }

    /// All elements, where fp32 holds them.
    fn f32(&self) -> Option<Vec<f32>> {
        Some(match self.dtype {
            Dtype::Bf16 => self.bytes.as_chunks().0.iter().map(|&x| bf16::from_le_bytes(x).to_f32()).collect(),
            Dtype::F16 => self.bytes.as_chunks().0.iter().map(|&x| f16::from_le_bytes(x).to_f32()).collect(),
            Dtype::F32 => self.bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect(),
            _ => return None,
        })
    }
}

impl<'a> Fp8View<'a> {
    /// A range of the elements, none of which is NaN. They are looked at here and not when the tensor is opened: by the thread
    /// that is going to copy them, and when it does.
    ///
    /// # Errors
    /// There is a NaN among them.
    pub fn piece(&self, range: Range<usize>) -> Result<&'a [u8]> {
        let bytes = &self.bytes[range];
        // Without a branch, so that the compiler takes many at a time.
        match bytes.iter().fold(false, |nan, byte| nan | (byte & 0x7f == 0x7f)) {
            false => Ok(bytes),
            true => Err(Error::model(self.source, format!("tensor {:?} has NaN: the file is damaged", self.name))),
        }
    }
}

impl Checkpoint {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// Files that are missing, truncated or lie about their contents; the message names file, tensor and field.
    pub fn open(folder: &Path) -> Result<Checkpoint> {
        if !folder.is_dir() {
            return Err(Error::model(folder, "there is no such model folder"));
        }
        let index_path = folder.join("model.safetensors.index.json");
        let mut checkpoint =
            Checkpoint { source: folder.join("model.safetensors"), shards: Vec::new(), tensors: HashMap::new() };
        let bytes = match std::fs::read(&index_path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                checkpoint.map(&folder.join("model.safetensors"))?;
                return Ok(checkpoint);
            }
            Err(e) => return Err(Error::io(index_path, e)),
        };
        checkpoint.source = index_path.clone();
        let index = parse_index(&bytes).map_err(|problem| Error::model(&index_path, problem))?;
        let mut files: Vec<&String> = index.values().collect();
        files.sort();
        files.dedup();
        let shard_of: HashMap<&String, usize> = files.iter().enumerate().map(|(i, &f)| (f, i)).collect();
        for file in files {
            checkpoint.map(&folder.join(file))?;
        }
        for (name, file) in &index {
            match checkpoint.tensors.get(name) {
                Some((shard, _)) if *shard == shard_of[file] => {}
                _ => {
                    return Err(Error::model(&index_path, format!("tensor {name:?} is not in {file:?}, as it claims")));
                }
            }
        }
        Ok(checkpoint)
    }

    fn map(&mut self, path: &Path) -> Result<()> {
        // Asked before the file is opened: a pipe would wait for somebody to write.
        let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if !metadata.is_file() {
            return Err(Error::model(path, "not a file"));
        }
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        if metadata.len() == 0 {
            return Err(Error::model(path, "an empty file is not safetensors: is it truncated?"));
        }
        // SAFETY: the map is read only. Whoever truncates the file ends the process by SIGBUS if we touch what is gone, as every
        // program that maps files; `read` finds out before, unless it happens in between.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        let (data_start, tensors) = parse_file(&map).map_err(|problem| Error::model(path, problem))?;
        let shard = self.shards.len();
        for (name, info) in tensors {
            if self.tensors.insert(name.clone(), (shard, info)).is_some() {
                return Err(Error::model(path, format!("tensor {name:?} is in another shard as well")));
            }
        }
        self.shards.push(Shard { path: path.into(), file, map, data_start });
        Ok(())
    }

    /// What is wrong with it.
    pub fn problem(&self, problem: String) -> Error {
        Error::model(&self.source, problem)
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|(_, t)| (t.end - t.begin) as u64).sum()
    }

    /// # Errors
    /// No such tensor, or one of another shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>> {
        let Some((shard, info)) = self.tensors.get(name) else {
            return Err(Error::model(&self.source, format!("tensor {name:?} is missing")));
        };
        if info.shape != shape {
            return Err(Error::model(
                &self.source,
                format!("tensor {name:?} is of shape {:?}, where config.json asks for {shape:?}", info.shape),
            ));
        }
        let Shard { map, data_start, .. } = &self.shards[*shard];
        let bytes = &map[data_start + info.begin..data_start + info.end];
        Ok(TensorView { dtype: info.dtype, shape: &info.shape, bytes })
    }

    /// A tensor of one number, above 0, that others are multiplied with.
    ///
    /// # Errors
    /// No such tensor, or another one.
    pub fn scale(&self, name: &str) -> Result<f32> {
        let bad = |problem: String| Error::model(&self.source, format!("tensor {name:?} {problem}"));
        let shape = match self.tensors.get(name) {
            Some((_, info)) if info.shape == [1] => &[1][..],
            _ => &[],
        };
        let tensor = self.tensor(name, shape)?;
        let Some(scale) = tensor.f32().map(|numbers| numbers[0]) else {
            return Err(bad(format!("is {:?}: scales in fp32, bf16 and fp16 are supported", tensor.dtype)));
        };
        match scale.is_normal() && scale > 0.0 && scale.recip().is_normal() {
            true => Ok(scale),
            false => Err(bad(format!("is {scale}: a scale is above 0, and finite"))),
        }
    }

    /// A matrix in fp8 with its scales; None if it is of another type. Of `X.weight` they are in `X.weight_scale`, or in
    /// `X.weight_scale_inv` as Qwen and DeepSeek call them (numbers to multiply with, whatever that says): one for the tensor, one
    /// for each row, or one for each block of 128 rows and columns.
    ///
    /// # Errors
    /// No such tensor or one of another shape; e5m2; scales that are missing, there twice, beside a matrix that is not fp8, of
    /// another shape or type, not above 0 or not finite.
    pub fn fp8(&self, name: &str, shape: [usize; 2]) -> Result<Option<Fp8View<'_>>> {
        let bad = |name: &str, problem: String| Err(Error::model(&self.source, format!("tensor {name:?} {problem}")));
        let tensor = self.tensor(name, &shape)?;
        let names = ["_scale", "_scale_inv"].map(|suffix| format!("{name}{suffix}"));
        let found: Vec<&String> = names.iter().filter(|name| self.has(name)).collect();
        let scale = match (tensor.dtype, found.as_slice()) {
            (Dtype::F8E5M2, _) => return bad(name, "is F8E5M2: of fp8, e4m3 is supported".into()),
            (Dtype::F8E4M3, [scale]) => *scale,
            (Dtype::F8E4M3, []) => return bad(name, format!("is fp8 and has no scale: {:?} is missing", names[0])),
            (Dtype::F8E4M3, _) => return bad(name, format!("has two scales, {found:?}: remove one of them")),
            (_, []) => return Ok(None),
            (other, [scale, ..]) => {
                return bad(scale, format!("is the scale of {name:?}, which is {other:?} and not fp8"));
            }
        };
        let [n, k] = shape;
        let blocks = [n.div_ceil(SCALE_BLOCK), k.div_ceil(SCALE_BLOCK)];
        let stored = self.tensors[scale].1.shape.as_slice();
        let tensor_of_scales = self.tensor(scale, stored)?;
        let Some(numbers) = tensor_of_scales.f32() else {
            let dtype = tensor_of_scales.dtype;
            return bad(scale, format!("is {dtype:?}: scales in fp32, bf16 and fp16 are supported"));
        };
        if let Some(number) = numbers.iter().find(|x| !(x.is_normal() && **x > 0.0)) {
            return bad(scale, format!("holds {number:e}: scales are above 0, finite, and not subnormal"));
        }
        let scales = match stored {
            // Of a matrix that is no larger than a block, too.
            [] | [1] | [1, 1] => Scales::Tensor(numbers[0]),
            [rows] | [rows, 1] if *rows == n => Scales::Rows(numbers),
            stored if stored == blocks => Scales::Blocks(numbers),
            stored => {
                let wanted = format!("[], [{n}], [{n}, 1] or, for blocks of {SCALE_BLOCK}, {blocks:?}");
                return bad(scale, format!("is of shape {stored:?}, where {name:?} asks for {wanted}"));
            }
        };
        Ok(Some(Fp8View { name: name.into(), source: &self.source, bytes: tensor.bytes, scales }))
    }

    /// Reads these bytes of a tensor from the disk, many pages at a time, where touching them would read few.
    ///
    /// # Errors
    /// Pages that cannot be had, as of a file that has been truncated since it was opened.
    pub fn read(&self, bytes: &[u8]) -> Result<()> {
        let (shard, offset) = self.shard_of(bytes);
        let advise = |advice| shard.map.advise_range(advice, offset, bytes.len());
        match advise(Advice::WillNeed).and_then(|()| advise(Advice::PopulateRead)) {
            // A system that does not know the advice reads the pages when they are touched.
            Err(e) if e.kind() != std::io::ErrorKind::InvalidInput => {
                let problem = format!("{} bytes cannot be read: has it been truncated? ({e})", bytes.len());
                Err(Error::model(&shard.path, problem))
            }
            _ => Ok(()),
        }
    }

    /// Takes the pages of these bytes of a tensor out of the process's memory; who touches them again gets them back. `keep`:
    /// the system may go on caching them for the next start.
    pub fn release(&self, bytes: &[u8], keep: bool) {
        let (shard, offset) = self.shard_of(bytes);
        // Pages that the system does not release cost memory and nothing else.
        // SAFETY: the map is of a file and is only read, so that pages which come back are as they were.
        let _ = unsafe { shard.map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, bytes.len()) };
        if !keep {
            let (fd, offset, length) = (shard.file.as_raw_fd(), offset as i64, bytes.len() as i64);
            // SAFETY: an open file; the system writes nothing.
            unsafe { libc::posix_fadvise(fd, offset, length, libc::POSIX_FADV_DONTNEED) };
        }
    }

    /// Where in which shard the bytes of a tensor lie.
    fn shard_of(&self, bytes: &[u8]) -> (&Shard, usize) {
        let range = bytes.as_ptr_range();
        let holds = |shard: &&Shard| {
            let all = shard.map.as_ptr_range();
            all.start <= range.start && range.end <= all.end
        };
        let shard = self.shards.iter().find(holds).expect("the bytes are of a tensor of this checkpoint");
        (shard, range.start.addr() - shard.map.as_ptr().addr())
    }

    /// A tensor that can be had in bf16.
    ///
    /// # Errors
    /// Those of [`Checkpoint::tensor`], and other element types than bf16, fp16 and fp32.
    pub fn weights(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>> {
        let tensor = self.tensor(name, shape)?;
        match tensor.dtype {
            Dtype::Bf16 | Dtype::F16 | Dtype::F32 => Ok(tensor),
            other => Err(Error::model(
                &self.source,
                format!("tensor {name:?} is {other:?}: weights in bf16, fp16 and fp32 are supported"),
            )),
        }
    }
}

/// A safetensors file's tensors, and where its data begins.
pub fn parse_file(file: &[u8]) -> std::result::Result<(usize, Vec<(String, TensorInfo)>), String> {
    let bytes = file.len();
    let Some((length, rest)) = file.split_first_chunk() else {
        return Err(format!("{bytes} bytes are too few for a safetensors file: is it truncated?"));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER || length > rest.len() as u64 {
        return Err(format!("the header claims {length} bytes in a file of {bytes}: not safetensors, or truncated"));
    }
    let (header, data) = rest.split_at(length as usize);
    Ok((8 + header.len(), parse_header(header, data.len())?))
}

/// A header's tensors, every field checked against the `data_bytes` that follow it: known types, sizes that agree, offsets that
/// tile the data without overlap or gap, no name twice.
pub fn parse_header(json: &[u8], data_bytes: usize) -> std::result::Result<Vec<(String, TensorInfo)>, String> {
    let entries = parse_object(json).map_err(|e| format!("the header is not valid: {e}"))?;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, value) in entries {
        if name == "__metadata__" {
            continue;
        }
        let bad = |problem: String| format!("tensor {name:?}: {problem}");
        let serde_json::Value::Object(object) = value else { return Err(bad("not an object".into())) };
        if let Some(field) = object.keys().find(|k| !matches!(k.as_str(), "dtype" | "shape" | "data_offsets")) {
            return Err(bad(format!("unknown field {field:?}")));
        }
        let numbers = |field: &str, most: usize| -> std::result::Result<Vec<usize>, String> {
            let list = object.get(field).and_then(|v| v.as_array()).ok_or_else(|| bad(format!("no list {field:?}")))?;
            if list.len() > most {
                return Err(bad(format!("{field:?} has {} entries", list.len())));
            }
            let number = |v: &serde_json::Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
            list.iter()
                .map(number)
                .collect::<Option<_>>()
                .ok_or_else(|| bad(format!("{field:?} holds more than whole numbers")))
        };
        let dtype_name =
            object.get("dtype").and_then(|v| v.as_str()).ok_or_else(|| bad("no string \"dtype\"".into()))?;
        let dtype = Dtype::parse(dtype_name).ok_or_else(|| bad(format!("unknown dtype {dtype_name:?}")))?;
        let shape = numbers("shape", 8)?;
        let offsets = numbers("data_offsets", 2)?;
        let &[begin, end] = offsets.as_slice() else { return Err(bad("\"data_offsets\" is not [begin, end]".into())) };
        if begin > end || end > data_bytes {
            return Err(bad(format!("bytes {begin} to {end} are not within the file's {data_bytes} bytes of data")));
        }
        let size = shape.iter().try_fold(dtype.size(), |size, &n| size.checked_mul(n));
        if size != Some(end - begin) {
            return Err(bad(format!("{dtype_name} of shape {shape:?} does not fill {} bytes", end - begin)));
        }
        tensors.push((name, TensorInfo { dtype, shape, begin, end }));
    }
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&i| (tensors[i].1.begin, tensors[i].1.end));
    let (mut at, mut before) = (0, "");
    for &i in &order {
        let (name, info) = &tensors[i];
        if info.begin < at {
            let begin = info.begin;
            return Err(format!(
                "tensor {name:?} overlaps {before:?}: it begins at byte {begin}, which is taken up to {at}"
            ));
        }
        if info.begin > at {
            return Err(format!("bytes {at} to {} before tensor {name:?} belong to no tensor", info.begin));
        }
        (at, before) = (info.end, name);
    }
    if at != data_bytes {
        return Err(format!("the tensors end at byte {at} of {data_bytes} bytes of data"));
    }
    Ok(tensors)
}

/// Tensor name -> shard file, from model.safetensors.index.json. A shard lies in the folder itself.
pub fn parse_index(json: &[u8]) -> std::result::Result<HashMap<String, String>, String> {
    let entries = parse_object(json).map_err(|e| format!("not valid JSON: {e}"))?;
    let map = entries.into_iter().find(|(name, _)| name == "weight_map").map(|(_, value)| value);
    let Some(serde_json::Value::Object(map)) = map else { return Err("no object \"weight_map\"".into()) };
    let mut index = HashMap::new();
    for (tensor, file) in map {
        match file.as_str() {
            Some(file) if is_plain_file_name(file) => index.insert(tensor, file.to_string()),
            Some(file) => {
                return Err(format!("{tensor:?} is in {file:?}, which is not the name of a file in this folder"));
            }
            None => return Err(format!("{tensor:?} has no file name")),
        };
    }
    if index.is_empty() { Err("\"weight_map\" is empty".into()) } else { Ok(index) }
}

fn is_plain_file_name(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.starts_with('.') && !name.contains(['/', '\\', '\0'])
}

/// An object's entries in order; a name that occurs twice is an error, which serde_json's own map would swallow.
fn parse_object(json: &[u8]) -> serde_json::Result<Vec<(String, serde_json::Value)>> {
    struct Entries;
    impl<'de> Visitor<'de> for Entries {
        type Value = Vec<(String, serde_json::Value)>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
            let mut entries = Vec::new();
            let mut names = std::collections::HashSet::new();
            while let Some((name, value)) = map.next_entry::<String, _>()? {
                if !names.insert(name.clone()) {
                    return Err(serde::de::Error::custom(format!("{name:?} occurs twice")));
                }
                entries.push((name, value));
            }
            Ok(entries)
        }
    }
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let entries = serde::Deserializer::deserialize_map(&mut deserializer, Entries)?;
    deserializer.end()?;
    Ok(entries)
}
