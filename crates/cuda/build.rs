//! Embeds the CUDA kernels: their sources, and compiled ones if `kernels/check.py` left any in `kernels/cubins`. Never
//! runs a compiler.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let kernels = Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap()).join("../../kernels");
    let kernels = kernels.canonicalize().expect("kernels/ is beside crates/");
    println!("cargo:rerun-if-changed={}", kernels.display());
    let mut code = String::from("pub(super) static CUBINS: &[(&str, &[u8])] = &[\n");
    for path in files(&kernels.join("cubins"), &["cubin"]) {
        let name = path.file_stem().expect("a file").to_string_lossy().into_owned();
        writeln!(code, "    ({name:?}, include_bytes!({path:?})),").expect("a string takes everything");
    }
    code.push_str("];\npub(super) static SOURCES: &[(&str, &str)] = &[\n");
    for path in files(&kernels, &["cu", "cuh"]) {
        let name = path.file_name().expect("a file").to_string_lossy().into_owned();
        writeln!(code, "    ({name:?}, include_str!({path:?})),").expect("a string takes everything");
    }
    code.push_str("];\n");
    fs::write(Path::new(&env::var("OUT_DIR").unwrap()).join("embedded.rs"), code)
        .expect("OUT_DIR is writable");
}

/// The files of a folder that may not exist, sorted.
fn files(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let has_extension = |path: &PathBuf| {
        path.extension().is_some_and(|found| extensions.iter().any(|extension| found == *extension))
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(has_extension).collect();
    paths.sort();
    paths
}
