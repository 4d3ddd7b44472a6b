//! Compiled kernels for one kind of device: those embedded in the binary; else those that an earlier start compiled and
//! kept; else NVRTC, found at run time, compiles them now.
//!
//! `build.rs` embeds the sources always, and what `kernels/check.py` compiled if it was run. A kept image is keyed by
//! everything that it was made from, the compiler's version included, and carries a checksum: one that is damaged is
//! compiled again. Nothing here needs a device.

use std::borrow::Cow;
use std::ffi::{CStr, CString, c_char};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use backend::BackendError;
use cudarc::nvrtc::result::NvrtcError;
use cudarc::nvrtc::sys;
use tracing::{info, warn};

mod embedded {
    include!(concat!(env!("OUT_DIR"), "/embedded.rs"));
}

/// As `kernels/check.py` has it.
const OPTIONS: [&str; 1] = ["--std=c++17"];
const CHECKSUM_BYTES: usize = 4;

/// Where a device's kernels come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelOrigin {
    /// From the binary.
    Embedded,
    /// From NVRTC of this version, or from what it compiled before.
    Nvrtc {
        /// 13 for 13.0.
        major: i32,
        /// 0 for 13.0.
        minor: i32,
    },
}

impl KernelOrigin {
    /// Where the kernels in `files` for `target` come from; `None` if neither this binary nor this machine has them.
    pub(crate) fn find(files: &[&str], target: &str) -> Option<Self> {
        if files.iter().all(|file| embedded_image(file, target).is_some()) {
            return Some(Self::Embedded);
        }
        nvrtc_version().map(|(major, minor)| Self::Nvrtc { major, minor })
    }
}

/// The images of the kernels in `files`, in their order.
pub(crate) fn load(
    files: &[&'static str],
    target: &str,
    origin: KernelOrigin,
    cache: Option<&Path>,
) -> Result<Vec<Cow<'static, [u8]>>, BackendError> {
    if origin == KernelOrigin::Embedded {
        let image = |file| embedded_image(file, target).expect("probing found all of them");
        return Ok(files.iter().map(|file| Cow::Borrowed(image(file))).collect());
    }
    // One after the other: NVRTC 13.0 holds a lock for most of a compilation, and crashes under a dozen threads.
    let image = |file: &&'static str| {
        let path = cache.map(|cache| path_in(cache, file, target, origin));
        if let Some(image) = path.as_deref().and_then(read_kept) {
            return Ok(Cow::Owned(image));
        }
        info!("compiling kernels/{file}.cu for {target}");
        let image = compile(file, target)?;
        keep(&image, path.as_deref());
        Ok(Cow::Owned(image))
    };
    files.iter().map(image).collect()
}

fn embedded_image(file: &str, target: &str) -> Option<&'static [u8]> {
    let name = format!("{file}.{target}");
    embedded::CUBINS.iter().find(|(cubin, _)| *cubin == name).map(|&(_, image)| image)
}

/// The architectures that this binary has kernels for.
pub fn embedded_targets() -> Vec<&'static str> {
    let targets = embedded::CUBINS.iter().filter_map(|(name, _)| Some(name.split_once('.')?.1));
    let mut targets: Vec<_> = targets.collect();
    targets.sort_unstable_by_key(|target| (target.len(), *target));
    targets.dedup();
    targets
}

// ---- kept images ---------------------------------------------------------------------------------------------------

fn path_in(cache: &Path, file: &str, target: &str, origin: KernelOrigin) -> PathBuf {
    // Another version of Rust may hash otherwise; then kernels are compiled again.
    let mut hasher = DefaultHasher::new();
    (embedded::SOURCES, OPTIONS, format!("{origin:?}")).hash(&mut hasher);
    cache.join(format!("{file}.{target}.{:016x}.cubin", hasher.finish()))
}

fn read_kept(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let checksum = bytes.split_off(bytes.len().checked_sub(CHECKSUM_BYTES)?);
    (crc32fast::hash(&bytes).to_le_bytes()[..] == checksum).then_some(bytes)
}

/// Writes beside the target and renames, so that no reader sees half a file. Not to succeed costs the next start time.
fn keep(image: &[u8], path: Option<&Path>) {
    let Some(path) = path else { return };
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    let bytes = [image, &crc32fast::hash(image).to_le_bytes()].concat();
    let written = fs::create_dir_all(path.parent().expect("a file in the cache"))
        .and_then(|()| fs::write(&partial, bytes))
        .and_then(|()| fs::rename(&partial, path));
    if let Err(error) = written {
        warn!(
            "compiled kernels were not kept, so the next start compiles again: {}: {error}",
            path.display()
        );
    }
}

// ---- the compiler --------------------------------------------------------------------------------------------------

/// The version of NVRTC on this machine, if there is one.
pub fn nvrtc_version() -> Option<(i32, i32)> {
    // SAFETY: loads a library by the compiler's name, which has no requirements.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two numbers to where the pointers show.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().ok()?;
    Some((major, minor))
}

/// A program of NVRTC, destroyed with this.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by the compiler and destroyed once. There is nobody to tell if that fails.
        let _ = unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

impl Program {
    fn new(name: &str, source: &str) -> Result<Self, NvrtcError> {
        let text = |text: &str| CString::new(text).expect("sources have no zeros");
        let headers = embedded::SOURCES.iter().filter(|(name, _)| name.ends_with(".cuh"));
        let (names, texts): (Vec<_>, Vec<_>) =
            headers.map(|(name, header)| (text(name), text(header))).unzip();
        let pointers = |strings: &[CString]| strings.iter().map(|string| string.as_ptr()).collect::<Vec<_>>();
        let (name, source) = (text(name), text(source));
        let mut program = std::ptr::null_mut();
        // SAFETY: the strings end with zeros and live until the compiler has copied them, which it does here.
        unsafe {
            sys::nvrtcCreateProgram(
                &mut program,
                source.as_ptr(),
                name.as_ptr(),
                names.len() as i32,
                pointers(&texts).as_ptr(),
                pointers(&names).as_ptr(),
            )
        }
        .result()?;
        Ok(Self(program))
    }

    fn compile(&self, target: &str) -> Result<(), NvrtcError> {
        let architecture = format!("--gpu-architecture={target}");
        let options = [&architecture[..]].into_iter().chain(OPTIONS);
        let options: Vec<_> = options.map(|option| CString::new(option).expect("no zeros")).collect();
        let pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: the program was made, and the options live until this returns.
        unsafe { sys::nvrtcCompileProgram(self.0, pointers.len() as i32, pointers.as_ptr()) }.result()
    }

    /// What the compiler says; nothing if it cannot.
    fn log(&self) -> String {
        // SAFETY: asks for a size and then writes so many bytes to where there is room for them.
        let log = self.output(
            |program, size| unsafe { sys::nvrtcGetProgramLogSize(program, size) },
            |program, log| unsafe { sys::nvrtcGetProgramLog(program, log) },
        );
        let log = log.unwrap_or_default();
        CStr::from_bytes_until_nul(&log).map_or(String::new(), |log| log.to_string_lossy().into_owned())
    }

    fn cubin(&self) -> Result<Vec<u8>, NvrtcError> {
        // SAFETY: as above.
        self.output(
            |program, size| unsafe { sys::nvrtcGetCUBINSize(program, size) },
            |program, cubin| unsafe { sys::nvrtcGetCUBIN(program, cubin) },
        )
    }

    fn output(
        &self,
        size: impl FnOnce(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult,
        write: impl FnOnce(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult,
    ) -> Result<Vec<u8>, NvrtcError> {
        let mut num_bytes = 0;
        size(self.0, &mut num_bytes).result()?;
        let mut bytes = vec![0; num_bytes];
        write(self.0, bytes.as_mut_ptr().cast()).result()?;
        Ok(bytes)
    }
}

fn compile(file: &str, target: &str) -> Result<Vec<u8>, BackendError> {
    let name = format!("{file}.cu");
    let (_, source) =
        embedded::SOURCES.iter().find(|(source, _)| *source == name).expect("every kernel is embedded");
    let failed =
        |error: NvrtcError| BackendError::Device(format!("NVRTC failed on {name} for {target}: {error}"));
    let program = Program::new(&name, source).map_err(failed)?;
    program.compile(target).map_err(|error| {
        let log = program.log();
        BackendError::Device(format!("NVRTC failed on {name} for {target}: {error}\n{log}"))
    })?;
    program.cubin().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The compiler's version; says why a test is skipped.
    fn nvrtc_or_skip() -> Option<KernelOrigin> {
        let Some((major, minor)) = nvrtc_version() else {
            assert!(std::env::var_os("EXPECT_NVRTC").is_none(), "NVRTC was asked for");
            println!("skipped: no NVRTC (libnvrtc.so)");
            return None;
        };
        Some(KernelOrigin::Nvrtc { major, minor })
    }

    #[test]
    fn kernels_are_compiled_once_and_again_if_the_kept_image_is_damaged() {
        let Some(origin) = nvrtc_or_skip() else { return };
        let cache = std::env::temp_dir().join(format!("windrose-kernels-{}", std::process::id()));
        let load = || load(&["add", "embed"], "sm_80", origin, Some(&cache)).unwrap();
        let compiled = load();
        assert!(compiled.iter().all(|image| image.starts_with(b"\x7fELF")));

        let path = path_in(&cache, "add", "sm_80", origin);
        let kept = fs::read(&path).unwrap();
        assert_eq!(read_kept(&path).as_deref(), Some(&*compiled[0]));
        fs::write(&path, &kept[..kept.len() / 2]).unwrap();
        assert_eq!(read_kept(&path), None);
        assert_eq!(load(), compiled);
        assert_eq!(fs::read(&path).unwrap(), kept);
        fs::remove_dir_all(&cache).unwrap();
    }

    #[test]
    fn an_architecture_that_the_compiler_does_not_know_is_its_own_words() {
        let Some(origin) = nvrtc_or_skip() else { return };
        let error = load(&["add"], "sm_1", origin, None).unwrap_err().to_string();
        assert!(error.contains("add.cu for sm_1") && error.contains("invalid value"), "{error}");
    }

    #[test]
    fn what_is_embedded_is_complete() {
        let files = crate::kernels::files(crate::Capability { major: 9, minor: 0 });
        for file in &files {
            let name = format!("{file}.cu");
            assert!(embedded::SOURCES.iter().any(|(source, _)| *source == name), "{name}");
        }
        if KernelOrigin::find(&files, "sm_90a") == Some(KernelOrigin::Embedded) {
            let images = load(&files, "sm_90a", KernelOrigin::Embedded, None).unwrap();
            assert!(images.iter().all(|image| image.starts_with(b"\x7fELF")));
        } else {
            println!("skipped: kernels/check.py was not run before the build");
        }
    }
}
