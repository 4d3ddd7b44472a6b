//! Is there a GPU that can run this? Asked so that no answer, a missing driver included, is a panic.
//!
//! cudarc loads the driver when it is first called and panics if there is none, or if a symbol is missing. So the
//! library is looked for first, then its version is read, and only then anything else is called.

use cudarc::driver::{result, sys};
use thiserror::Error;

use crate::kernels;

/// What the newest function that we call needs.
const MIN_DRIVER_VERSION: i32 = 12_080;
/// The oldest compute capability that the kernels compile for.
const MIN_CAPABILITY: Capability = Capability { major: 8, minor: 0 };

/// A generation of GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Capability {
    /// 9 for Hopper.
    pub major: i32,
    /// 0 for H100 and H200.
    pub minor: i32,
}

impl Capability {
    /// The architecture to compile for, as NVIDIA's compilers call it; `None` for GPUs that no embedded kernel is for.
    ///
    /// Code for 8.6 also runs on 8.7; Hopper and the first Blackwell have code with features that no other has.
    pub fn target(self) -> Option<&'static str> {
        match (self.major, self.minor) {
            (8, 0) => Some("sm_80"),
            (8, 6 | 7) => Some("sm_86"),
            (8, 9) => Some("sm_89"),
            (9, 0) => Some("sm_90a"),
            (10, 0) => Some("sm_100a"),
            (12, 0 | 1) => Some("sm_120"),
            _ => None,
        }
    }

    /// Whether the kernels for warpgroups' tensor cores and bulk tensor copies run.
    pub(crate) fn has_wgmma(self) -> bool {
        self == Self { major: 9, minor: 0 }
    }
}

/// A GPU that this backend can use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number for the driver.
    pub ordinal: usize,
    /// Its name for people: `NVIDIA H200`.
    pub name: String,
    /// Its generation.
    pub capability: Capability,
    /// Memory on the device.
    pub memory_bytes: u64,
}

/// Why there is none.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NoDevice {
    /// No driver library.
    #[error("no NVIDIA driver (libcuda.so.1) was found")]
    NoDriver,
    /// Too old a driver.
    #[error("the NVIDIA driver supports CUDA {}.{}, and 12.8 is the oldest that works here", version / 1000, version % 1000 / 10)]
    OldDriver {
        /// 1000 times the major version, 10 times the minor.
        version: i32,
    },
    /// A driver without a device, or one that fails.
    #[error("the NVIDIA driver says: {0}")]
    Driver(String),
    /// GPUs older than all the kernels.
    #[error("{name} has compute capability {}.{}, and 8.0 is the oldest that works here", capability.major, capability.minor)]
    OldDevice {
        /// The device's name.
        name: String,
        /// Its generation.
        capability: Capability,
    },
    /// A GPU for which nothing was compiled.
    #[error(
        "this binary was built without kernels for {name} (compute capability {}.{}); to have them, run kernels/check.py \
         before cargo build", capability.major, capability.minor
    )]
    NoKernels {
        /// The device's name.
        name: String,
        /// Its generation.
        capability: Capability,
    },
}

/// The first GPU.
///
/// # Errors
/// [`NoDevice`], one readable sentence.
pub fn probe() -> Result<DeviceInfo, NoDevice> {
    // SAFETY: loads a library by the driver's name, which has no requirements.
    if !unsafe { sys::is_culib_present() } {
        return Err(NoDevice::NoDriver);
    }
    let failed = |error: result::DriverError| NoDevice::Driver(describe(error));
    let version = driver_version().map_err(failed)?;
    if version < MIN_DRIVER_VERSION {
        return Err(NoDevice::OldDriver { version });
    }
    result::init().map_err(failed)?;
    if result::device::get_count().map_err(failed)? == 0 {
        return Err(NoDevice::Driver("there is no device".to_owned()));
    }
    let info = device_info(0).map_err(failed)?;
    if info.capability < MIN_CAPABILITY {
        return Err(NoDevice::OldDevice { name: info.name, capability: info.capability });
    }
    let has_kernels = |target| kernels::are_embedded(target, info.capability.has_wgmma());
    if !info.capability.target().is_some_and(has_kernels) {
        return Err(NoDevice::NoKernels { name: info.name, capability: info.capability });
    }
    Ok(info)
}

/// The device for a test, which is told why there is none.
///
/// # Panics
/// If the fake driver was asked for and is not there: a suite that runs nowhere must not pass.
pub fn probe_or_skip() -> Option<DeviceInfo> {
    match probe() {
        Ok(info) => Some(info),
        Err(reason) => {
            let wanted = std::env::var_os("FAKE_CUDA_CAPABILITY").is_some();
            assert!(!wanted, "the fake driver was asked for: {reason}");
            println!("skipped: {reason}");
            None
        }
    }
}

fn driver_version() -> Result<i32, result::DriverError> {
    let mut version = 0;
    // SAFETY: writes one number to where the pointer shows.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(version)
}

fn device_info(ordinal: usize) -> Result<DeviceInfo, result::DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let device = result::device::get(ordinal as i32)?;
    // SAFETY: the device was just given by the driver.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) };
    Ok(DeviceInfo {
        ordinal,
        name: result::device::get_name(device)?,
        capability: Capability {
            major: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            minor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        },
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(device) }? as u64,
    })
}

/// The driver's own words, which need no context to be asked for.
pub(crate) fn describe(error: result::DriverError) -> String {
    let name = error.error_name().map(|name| name.to_string_lossy().into_owned());
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned());
    match (name, text) {
        (Ok(name), Ok(text)) => format!("{text} ({name})"),
        _ => format!("error {}", error.0 as u32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_with_or_without_a_gpu_gets_an_answer() {
        match probe() {
            Ok(info) => println!("{info:?}"),
            Err(reason) => println!("no CUDA device: {reason}"),
        }
    }

    #[test]
    fn every_generation_has_its_kernels_or_none() {
        let target = |major, minor| Capability { major, minor }.target();
        assert_eq!(target(9, 0), Some("sm_90a"));
        assert_eq!(target(8, 7), Some("sm_86"));
        assert_eq!(target(10, 3), None);
    }
}
