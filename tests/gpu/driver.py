"""The CUDA driver through ctypes, for kernels that were compiled ahead: loads cubins, launches by name.

Whoever has a context can use it: with PyTorch's context and current stream, its tensors go in as they are;
memory.py has a context and arrays without PyTorch. It does not compile anything.
"""

import contextlib
import ctypes
import glob
import os

CUDA = ctypes.CDLL("libcuda.so.1")
MAX_DYNAMIC_SHARED = 8
PREFERRED_CARVEOUT, ALL_SHARED = 9, 100
PROGRAMMATIC_STREAM_SERIALIZATION = 6
BF16 = 9
SWIZZLE_NONE, SWIZZLE_128B = 0, 3
L2_PROMOTION_256B = 3


class TensorMap(ctypes.Structure):
    """CUtensorMap, passed by value; it must lie on a multiple of 64 bytes, which `tensor_map` sees to."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


DEPENDENT = LaunchAttribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,))


def check(status, what):
    if status:
        text = ctypes.c_char_p()
        CUDA.cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what}: {text.value.decode() if text.value else status}")


class Kernels:
    """All kernels of a folder of cubins for one architecture, by name.

    `stream` gives the handle of the stream to launch on, by default the driver's own.
    """

    def __init__(self, folder, arch="sm_90a", stream=lambda: 0):
        self.modules, self.functions, self.stream = [], {}, stream
        # Whether kernels may start while the one before runs, and whether the one before is ours.
        self.overlaps, self.follows_kernel = False, False
        for path in sorted(glob.glob(os.path.join(folder, f"*.{arch}.cubin"))):
            with open(path, "rb") as file:
                image = file.read()
            module = ctypes.c_void_p()
            check(CUDA.cuModuleLoadData(ctypes.byref(module), image), path)
            self.modules.append(module)

    def function(self, name):
        if name not in self.functions:
            function = ctypes.c_void_p()
            found = (
                CUDA.cuModuleGetFunction(ctypes.byref(function), m, name.encode()) == 0 for m in self.modules
            )
            if not any(found):
                raise KeyError(name)
            # As the host program does: the next kernel starts only where this one has left it shared memory.
            if name != "sample":
                check(CUDA.cuFuncSetAttribute(function, PREFERRED_CARVEOUT, ALL_SHARED), name)
            self.functions[name] = function
        return self.functions[name]

    @contextlib.contextmanager
    def dependent_launches(self, overlaps=True):
        """Within it, each launch but the first may start while the one before runs; none may be of others."""
        self.overlaps, self.follows_kernel = overlaps, False
        try:
            yield
        finally:
            self.overlaps = False

    def launch(self, name, grid, threads, args, shared=0):
        """`args` are tensors, ctypes values, ints and floats."""
        grid = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1)[:3]
        values = [argument(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        check(CUDA.cuFuncSetAttribute(self.function(name), MAX_DYNAMIC_SHARED, shared), name)
        stream = self.stream()
        num_attributes = int(self.overlaps and self.follows_kernel)
        attributes = ctypes.pointer(DEPENDENT)
        config = LaunchConfig(grid, (threads, 1, 1), shared, stream, attributes, num_attributes)
        status = CUDA.cuLaunchKernelEx(ctypes.byref(config), self.function(name), pointers, ctypes.c_void_p())
        check(status, name)
        self.follows_kernel = True


def argument(arg):
    if hasattr(arg, "data_ptr"):
        return ctypes.c_void_p(arg.data_ptr())
    if arg is None:
        return ctypes.c_void_p(0)
    if isinstance(arg, float):
        return ctypes.c_float(arg)
    if isinstance(arg, int):
        return ctypes.c_int(arg)
    return arg


def tensor_map(tensor, box, swizzle=SWIZZLE_128B):
    """The map of a bf16 tensor `[.., rows, k]` for boxes of `box` = (k, rows, ..), by default one of each."""
    dims = list(reversed(tensor.shape))
    strides = [stride * 2 for stride in reversed(tensor.stride())][1:]
    box = [*box] + [1] * (len(dims) - len(box))
    buffer = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + 64)
    address = (ctypes.addressof(buffer) + 63) // 64 * 64
    result = TensorMap.from_address(address)
    result.keep_alive = buffer
    status = CUDA.cuTensorMapEncodeTiled(
        ctypes.byref(result),
        BF16,
        len(dims),
        ctypes.c_void_p(tensor.data_ptr()),
        (ctypes.c_uint64 * len(dims))(*dims),
        (ctypes.c_uint64 * len(strides))(*strides),
        (ctypes.c_uint32 * len(dims))(*box),
        (ctypes.c_uint32 * len(dims))(*[1] * len(dims)),
        0,
        swizzle,
        L2_PROMOTION_256B,
        0,
    )
    check(status, "cuTensorMapEncodeTiled")
    return result
