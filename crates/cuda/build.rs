//! Embeds the CUDA kernels: compiled ones if `kernels/check.py` left any in `kernels/cubins`. Never runs a compiler.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let kernels = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("../../kernels");
    let kernels = kernels.canonicalize().expect("kernels/ is beside crates/");
    println!("cargo:rerun-if-changed={}", kernels.join("cubins").display());
    let mut code = String::from("pub(super) static CUBINS: &[(&str, &[u8])] = &[\n");
    for path in cubins(&kernels.join("cubins")) {
        let name = path.file_stem().expect("a file").to_string_lossy().into_owned();
        writeln!(code, "    ({name:?}, include_bytes!({path:?})),").expect("a string takes everything");
    }
    code.push_str("];\n");
    fs::write(Path::new(&env::var("OUT_DIR").unwrap()).join("cubins.rs"), code).expect("OUT_DIR is writable");
}

/// The cubins of a folder that may not exist, sorted.
fn cubins(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "cubin"))
        .collect();
    paths.sort();
    paths
}
