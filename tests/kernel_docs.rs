//! docs/kernels keeps up with the kernels: a page with its picture for each, and numbers that are nvcc's.

use std::collections::HashMap;
use std::fs;

#[test]
fn every_kernel_has_its_page() {
    let index = fs::read_to_string("docs/kernels/README.md").unwrap();
    let resources = fs::read_to_string("tests/resources.txt").unwrap();
    // Name to threads and registers.
    let mut counted: HashMap<&str, (&str, &str)> = HashMap::new();
    for line in resources.lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        counted.insert(words[0], (words[1], words[3]));
    }
    let mut told = 0;
    for entry in fs::read_dir("kernels").unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "cu") {
            continue;
        }
        let name = path.file_stem().unwrap().to_str().unwrap();
        let page = fs::read_to_string(format!("docs/kernels/{name}.md")).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(index.contains(&format!("]({name}.md)")), "the index leaves {name} out");
        assert!(page.contains(&format!("({name}.svg)")) && fs::exists(format!("docs/kernels/{name}.svg")).unwrap());
        for heading in ["## The idea", "## Bytes, FLOPs", "## In a debugger", "## What the hostile machine checks"] {
            assert!(page.contains(heading), "{name} has no {heading:?}");
        }
        let source = fs::read_to_string(&path).unwrap();
        let kernels = source.lines().filter_map(|line| line.strip_prefix("KERNEL(")?.split(',').next());
        for kernel in kernels {
            let (threads, registers) = counted[kernel];
            let row = format!("| {kernel} | {threads} | {registers} | 0 |");
            assert!(page.contains(&row), "{name}.md has other numbers than {row:?}: make plots");
            told += 1;
        }
    }
    assert_eq!(told, counted.len(), "a kernel is in no page");
}
