"""The CUDA driver through ctypes, for kernels that were compiled ahead: loads cubins, launches by name.

Whoever has a context can use it: with PyTorch's context and current stream, its tensors go in as they are;
memory.py has a context and arrays without PyTorch. It does not compile anything.
"""

import ctypes
import glob
import os

CUDA = ctypes.CDLL("libcuda.so.1")
MAX_DYNAMIC_SHARED = 8
BF16 = 9
SWIZZLE_NONE, SWIZZLE_128B = 0, 3
L2_PROMOTION_256B = 3


class TensorMap(ctypes.Structure):
    """CUtensorMap, passed by value; it must lie on a multiple of 64 bytes, which `tensor_map` sees to."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


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
            self.functions[name] = function
        return self.functions[name]

    def launch(self, name, grid, threads, args, shared=0):
        """`args` are tensors, ctypes values, ints and floats."""
        grid = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1)[:3]
        values = [argument(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        check(CUDA.cuFuncSetAttribute(self.function(name), MAX_DYNAMIC_SHARED, shared), name)
        stream = ctypes.c_void_p(self.stream())
        status = CUDA.cuLaunchKernel(
            self.function(name), *grid, threads, 1, 1, shared, stream, pointers, ctypes.c_void_p()
        )
        check(status, name)


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
