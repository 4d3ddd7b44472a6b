//! Which instructions the kernels may use: chosen once, when the backend is made, and proved at every
//! dispatch.
//!
//! A kernel is written once, generic over [`Simd`]. [`Isa::run`] instantiates it for each instruction set
//! inside a function that enables that set's target features, so everything inlined into it is compiled for
//! them.

#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
use crate::simd::neon::{self, Neon};
use crate::simd::{Portable, Simd};
#[cfg(target_arch = "x86_64")]
use crate::simd::{
    amx,
    avx512::{self, Avx512},
};

/// An instruction set that the kernels are compiled for, from the plainest to the fastest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust: a software model of `vdpbf16ps`, 16 lanes of f32.
    Portable,
    /// AArch64: bf16 widened to f32, 4 lanes of fused multiply-add.
    Neon,
    /// AArch64 with dot products: the same, and `sdot` for integers.
    NeonDotprod,
    /// AArch64 with dot products and matrix products: the same, and `smmla` for integers of several tokens.
    NeonI8mm,
    /// x86-64 with AVX2, FMA and F16C: bf16 widened to f32, 8 lanes of fused multiply-add.
    Avx2,
    /// x86-64 with AVX-512 F, BW and VNNI: bf16 widened to f32, 16 lanes of fused multiply-add or `vpdpbusd`.
    Avx512Vnni,
    /// x86-64 with AVX-512 F, BW, VNNI and BF16: 16 lanes of `vdpbf16ps` or `vpdpbusd`.
    Avx512Bf16,
    /// The same with AMX: tiles of up to 16 tokens, `tdpbf16ps` or `tdpbssd`.
    Avx512Amx,
}

impl Isa {
    /// All instruction sets, the fastest last.
    pub const ALL: [Self; 8] = [
        Self::Portable,
        Self::Neon,
        Self::NeonDotprod,
        Self::NeonI8mm,
        Self::Avx2,
        Self::Avx512Vnni,
        Self::Avx512Bf16,
        Self::Avx512Amx,
    ];

    /// Finds the fastest instruction set that this machine has.
    pub fn detect() -> Self {
        Self::ALL.into_iter().rfind(|isa| isa.is_available()).unwrap_or(Self::Portable)
    }

    /// Whether this machine has the instruction set.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            Self::Neon => cfg!(all(target_arch = "aarch64", target_endian = "little")),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::NeonDotprod => std::arch::is_aarch64_feature_detected!("dotprod"),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::NeonI8mm => {
                Self::NeonDotprod.is_available() && std::arch::is_aarch64_feature_detected!("i8mm")
            }
            #[cfg(not(all(target_arch = "aarch64", target_endian = "little")))]
            Self::NeonDotprod | Self::NeonI8mm => false,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => Self::Avx512Vnni.is_available() && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Amx => Self::Avx512Bf16.is_available() && amx::is_available(),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512Vnni | Self::Avx512Bf16 | Self::Avx512Amx => false,
        }
    }

    /// The name in `describe` and in bench reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::NeonDotprod => "neon-dotprod",
            Self::NeonI8mm => "neon-i8mm",
            Self::Avx2 => "avx2",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx512Amx => "avx512-amx",
        }
    }

    /// Runs a kernel compiled for this instruction set.
    ///
    /// # Panics
    /// If the machine does not have it.
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        // The detection behind this is a cached flag, so asking at every dispatch costs nanoseconds.
        assert!(self.is_available(), "this machine has no {}", self.name());
        match self {
            Self::Portable => kernel.run(Portable),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => kernel.run(Neon::<{ neon::BASELINE }>::new()),
            // SAFETY: the assertion above found the feature that `run_neon_dotprod` enables.
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::NeonDotprod => unsafe { run_neon_dotprod(kernel) },
            // SAFETY: the assertion above found the features that `run_neon_i8mm` enables.
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::NeonI8mm => unsafe { run_neon_i8mm(kernel) },
            // SAFETY: the assertion above found the features that `run_avx2` enables.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { run_avx2(kernel) },
            // SAFETY: the assertion above found the features that `run_avx512_vnni` enables.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => unsafe { run_avx512_vnni(kernel) },
            // SAFETY: the assertion above found the features that `run_avx512_bf16` enables.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => unsafe { run_avx512_bf16(kernel) },
            // SAFETY: the assertion above found the features that `run_avx512_amx` enables, and AMX.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Amx => unsafe { run_avx512_amx(kernel) },
            #[allow(unreachable_patterns)]
            _ => unreachable!("an instruction set of another architecture is never available"),
        }
    }
}

/// A piece of work to be compiled for every instruction set.
///
/// Mark `run`, and every generic function it calls in a hot loop, `#[inline(always)]`: code that is not
/// inlined into [`Isa::run`]'s dispatch is compiled without the instruction set's features.
pub(crate) trait Kernel {
    /// Does the work with the vector operations of `simd`.
    fn run<S: Simd>(self, simd: S);
}

#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
#[target_feature(enable = "dotprod")]
fn run_neon_dotprod<K: Kernel>(kernel: K) {
    kernel.run(Neon::<{ neon::DOTPROD }>::new());
}

#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
#[target_feature(enable = "dotprod,i8mm")]
fn run_neon_i8mm<K: Kernel>(kernel: K) {
    kernel.run(Neon::<{ neon::I8MM }>::new());
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<K: Kernel>(kernel: K) {
    kernel.run(crate::simd::Avx2::new());
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vnni")]
fn run_avx512_vnni<K: Kernel>(kernel: K) {
    kernel.run(Avx512::<{ avx512::VNNI }>::new());
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512bf16,avx512vnni")]
fn run_avx512_bf16<K: Kernel>(kernel: K) {
    kernel.run(Avx512::<{ avx512::BF16 }>::new());
}

/// # Safety
/// [`amx::is_available`], besides the features.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512bf16,avx512vnni")]
unsafe fn run_avx512_amx<K: Kernel>(kernel: K) {
    // SAFETY: the caller's promise.
    kernel.run(unsafe { Avx512::<{ avx512::AMX }>::new() });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detected_instruction_set_is_available_and_the_fastest() {
        let detected = Isa::detect();
        assert!(detected.is_available());
        let faster = Isa::ALL.iter().skip_while(|isa| **isa != detected).skip(1);
        assert!(faster.into_iter().all(|isa| !isa.is_available()));
    }
}
