//! A safetensors file up to its data: any bytes are a list of tensors that lie inside the file, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ponder::checkpoint::{parse_file, parse_index};

fuzz_target!(|file: &[u8]| {
    if let Ok((start, tensors)) = parse_file(file) {
        for (name, tensor) in tensors {
            let bytes = tensor.shape.iter().product::<usize>() * tensor.dtype.size();
            assert_eq!(tensor.end - tensor.begin, bytes, "{name}");
            assert!(start + tensor.end <= file.len(), "{name}");
        }
    }
    let _ = parse_index(file);
});
