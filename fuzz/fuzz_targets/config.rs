//! config.json and generation_config.json (the same bytes): a shape whose products fit, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ponder::config::ModelConfig;
use std::path::Path;

fuzz_target!(|json: &[u8]| {
    let path = Path::new("config.json");
    if let Ok(config) = ModelConfig::parse(json, path, None, path) {
        let weights = ponder::model::weight_bytes(&config);
        assert!(weights > 0);
    }
    let valid = include_bytes!("../../models/modulo/config.json");
    let _ = ModelConfig::parse(valid, path, Some(json), path);
});
