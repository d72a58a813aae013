//! What every kernel uses of an SM, read from the machine code, is checked in: a jump in registers or a lost wgmma is a
//! reviewed diff of tests/resources.txt, never a surprise on a GPU. `make resources` writes it anew.

use ponder::kernels::{ALL, CUBINS};
use std::process::Command;
use std::sync::OnceLock;

const CHECKED_IN: &str = "tests/resources.txt";

/// The table as scripts/resources.sh makes it from the cubins in this binary.
fn table() -> &'static str {
    static TABLE: OnceLock<String> = OnceLock::new();
    TABLE.get_or_init(make_table)
}

fn make_table() -> String {
    let folder = std::env::temp_dir().join(format!("ponder-resources-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for (name, cubin) in CUBINS {
        std::fs::write(folder.join(name).with_extension("cubin"), cubin).unwrap();
    }
    let output = Command::new("scripts/resources.sh").arg(&folder).output().expect("run from the repository's root");
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(output.stderr.is_empty(), "cuobjdump comes with `make setup`: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn kernels_use_what_the_table_says() {
    let table = table();
    if std::env::var_os("PONDER_UPDATE_RESOURCES").is_some() {
        std::fs::write(CHECKED_IN, table).unwrap();
    }
    let expected = std::fs::read_to_string(CHECKED_IN).unwrap_or_default();
    let (old, new): (Vec<_>, Vec<_>) = (expected.lines().collect(), table.lines().collect());
    let removed = old.iter().filter(|l| !new.contains(l)).map(|l| format!("- {l}\n"));
    let added = new.iter().filter(|l| !old.contains(l)).map(|l| format!("+ {l}\n"));
    let difference: String = removed.chain(added).collect();
    assert!(table == expected, "review this difference, then `make resources`:\n  {}\n{difference}", new[0]);
}

/// What `cuFuncGetParamInfo` and the launch bounds will say on a GPU, without one.
#[test]
fn cubins_agree_with_the_kernel_table() {
    let table = table();
    let rows: Vec<Vec<&str>> = table.lines().skip(1).map(|row| row.split_whitespace().collect()).collect();
    for kernel in ALL {
        let name = kernel.name.to_str().unwrap();
        let row = rows.iter().find(|row| row[0] == name).unwrap_or_else(|| panic!("no cubin holds {name}"));
        assert_eq!(row[1], kernel.threads.to_string(), "threads of {name}");
        // Parameters lie in constant bank 0 from byte 0x210 on, and the count begins there: an aligned struct comes after a gap.
        let gap = 0x210usize.next_multiple_of(kernel.params_align) - 0x210;
        assert_eq!(row[2], (gap + kernel.params_bytes).to_string(), "bytes of the params struct of {name}");
    }
    assert_eq!(rows.len(), ALL.len(), "each kernel in a cubin has its line in engine/kernels.rs");
}
