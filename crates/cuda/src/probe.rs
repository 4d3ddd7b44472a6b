//! Is there a GPU that can run this? Asked so that no answer, a missing driver included, is a panic.
//!
//! cudarc loads the driver when it is first called and panics if there is none, or if a symbol is missing. So the
//! library is looked for first, then its version is read, and only then anything else is called.

use cudarc::driver::{result, sys};
use thiserror::Error;

use crate::images::KernelOrigin;
use crate::kernels;

/// What the newest function that we call needs.
const MIN_DRIVER_VERSION: (i32, i32) = (12, 8);
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
    /// The architecture to compile for, as NVIDIA's compilers call it.
    ///
    /// Code for 8.6 also runs on 8.7, and code for 12.0 on 12.1; Hopper and the first Blackwell have code with features
    /// that no other has. Kernels for all other GPUs are compiled on the machine that has one.
    pub fn target(self) -> String {
        match (self.major, self.minor) {
            (8, 7) => "sm_86".to_owned(),
            (9, 0) => "sm_90a".to_owned(),
            (10, 0) => "sm_100a".to_owned(),
            (12, 1) => "sm_120".to_owned(),
            (major, minor) => format!("sm_{major}{minor}"),
        }
    }

    /// Whether tensor cores multiply e4m3.
    pub fn has_e4m3(self) -> bool {
        self >= Self { major: 8, minor: 9 }
    }

    /// Whether a kernel can start while the one before it runs. Drivers from CUDA 12.3 on record that in graphs, and none
    /// so old is used here.
    pub(crate) fn has_dependent_launches(self) -> bool {
        self >= Self { major: 9, minor: 0 }
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
    /// Where its kernels come from.
    pub kernels: KernelOrigin,
}

/// Why there is none.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum NoDevice {
    /// No driver library.
    #[error("no NVIDIA driver (libcuda.so.1) was found")]
    NoDriver,
    /// Too old a driver.
    #[error("the NVIDIA driver supports CUDA {major}.{minor}, and 12.8 is the oldest that works here")]
    OldDriver {
        /// Of CUDA.
        major: i32,
        /// Of CUDA.
        minor: i32,
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
        "this binary was built without kernels for {name} (compute capability {}.{}), and no NVRTC (libnvrtc.so) was found \
         to compile them: install NVRTC, or run kernels/check.py before cargo build", capability.major, capability.minor
    )]
    NoKernels {
        /// The device's name.
        name: String,
        /// Its generation.
        capability: Capability,
    },
}

/// The first GPU that this backend can use.
///
/// # Errors
/// [`NoDevice`], one readable sentence; of the first GPU, if there are some and none is usable.
pub fn probe() -> Result<DeviceInfo, NoDevice> {
    let (usable, others): (Vec<_>, Vec<_>) = devices()?.into_iter().partition(Result::is_ok);
    let none = Err(NoDevice::Driver("there is no device".to_owned()));
    usable.into_iter().chain(others).next().unwrap_or(none)
}

/// Every GPU, or why this backend cannot use it.
///
/// # Errors
/// [`NoDevice`] if the driver cannot be asked.
pub fn devices() -> Result<Vec<Result<DeviceInfo, NoDevice>>, NoDevice> {
    let (major, minor) = driver_version()?;
    if (major, minor) < MIN_DRIVER_VERSION {
        return Err(NoDevice::OldDriver { major, minor });
    }
    let count = result::init().and_then(|()| result::device::get_count()).map_err(failed)?;
    Ok((0..count as usize).map(device).collect())
}

/// The version of CUDA that the driver supports, 13 and 0 for 13.0.
///
/// # Errors
/// [`NoDevice`] if there is no driver, or it does not say.
pub fn driver_version() -> Result<(i32, i32), NoDevice> {
    // SAFETY: loads a library by the driver's name, which has no requirements.
    if !unsafe { sys::is_culib_present() } {
        return Err(NoDevice::NoDriver);
    }
    let mut version = 0;
    // SAFETY: writes one number to where the pointer shows.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed)?;
    Ok((version / 1000, version % 1000 / 10))
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

fn device(ordinal: usize) -> Result<DeviceInfo, NoDevice> {
    use sys::CUdevice_attribute as Attribute;
    let device = result::device::get(ordinal as i32).map_err(failed)?;
    // SAFETY: the device was just given by the driver, here and below.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) }.map_err(failed);
    let name = result::device::get_name(device).map_err(failed)?;
    let capability = Capability {
        major: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        minor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    };
    if capability < MIN_CAPABILITY {
        return Err(NoDevice::OldDevice { name, capability });
    }
    let Some(kernels) = KernelOrigin::find(&kernels::files(capability), &capability.target()) else {
        return Err(NoDevice::NoKernels { name, capability });
    };
    // SAFETY: as above.
    let memory_bytes = unsafe { result::device::total_mem(device) }.map_err(failed)? as u64;
    Ok(DeviceInfo { ordinal, name, capability, memory_bytes, kernels })
}

fn failed(error: result::DriverError) -> NoDevice {
    NoDevice::Driver(describe(error))
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
    fn every_generation_has_its_target() {
        let target = |major, minor| Capability { major, minor }.target();
        assert_eq!([(9, 0), (8, 7), (10, 3)].map(|(x, y)| target(x, y)), ["sm_90a", "sm_86", "sm_103"]);
    }
}
