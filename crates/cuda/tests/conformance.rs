//! Every verb against the reference, on the GPU there is or on the fake driver of `kernels/emulator`:
//! `LD_LIBRARY_PATH=target/emulator cargo test --release -p windrose-cuda`.

use backend::conformance::check_all;
use cuda::{Cuda, DeviceInfo, probe};

/// The device to test on; says why there is none.
fn device() -> Option<DeviceInfo> {
    let opened = probe().map_err(|reason| reason.to_string());
    match opened.and_then(|info| Cuda::new(info.clone()).map(|_| info).map_err(|error| error.to_string())) {
        Ok(info) => Some(info),
        Err(reason) => {
            assert!(
                std::env::var_os("FAKE_CUDA_CAPABILITY").is_none(),
                "the fake driver was asked for: {reason}"
            );
            println!("skipped: {reason}");
            None
        }
    }
}

#[test]
fn every_verb_equals_the_reference_and_no_row_depends_on_its_batch() {
    if let Some(info) = device() {
        check_all(|| Cuda::new(info.clone()).expect("it opened before"));
    }
}
