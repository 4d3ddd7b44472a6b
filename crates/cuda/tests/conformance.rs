//! Every verb against the reference, on the GPU there is or on the fake driver of `kernels/emulator`:
//! `LD_LIBRARY_PATH=$PWD/target/emulator cargo test --release -p windrose-cuda`.

use backend::conformance::check_all;
use cuda::{Cuda, probe_or_skip};

#[test]
fn every_verb_equals_the_reference_and_no_row_depends_on_its_batch() {
    if let Some(info) = probe_or_skip() {
        check_all(|| Cuda::new(info.clone()).expect("the device opens"));
    }
}
