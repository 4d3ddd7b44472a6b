"""A context and arrays in device memory with numpy alone, so that a check also runs on the fake driver.

Everything is on the driver's own stream: a copy waits for what was launched before it.
"""

import ctypes

import numpy as np
from driver import CUDA, check


def use_device():
    """Makes the first device's context current, and returns the device's name."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    name = ctypes.create_string_buffer(256)
    check(CUDA.cuInit(0), "cuInit")
    check(CUDA.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    check(CUDA.cuDeviceGetName(name, len(name), device), "cuDeviceGetName")
    check(CUDA.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    check(CUDA.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    return name.value.decode()


class Array:
    """A numpy array's copy on the device, with what driver.py asks of a tensor."""

    def __init__(self, values):
        values = np.ascontiguousarray(values)
        self.shape, self.dtype, self.num_bytes = values.shape, values.dtype, values.nbytes
        self.pointer = ctypes.c_uint64()
        check(CUDA.cuMemAlloc_v2(ctypes.byref(self.pointer), ctypes.c_size_t(self.num_bytes)), "cuMemAlloc")
        source = ctypes.c_void_p(values.ctypes.data)
        check(CUDA.cuMemcpyHtoD_v2(self.pointer, source, ctypes.c_size_t(self.num_bytes)), "cuMemcpyHtoD")

    def __del__(self):
        CUDA.cuMemFree_v2(self.pointer)

    @classmethod
    def filled(cls, shape, dtype):
        """Every byte 0xff: a NaN where floats are, and no likely result anywhere."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return cls(np.full(count, 0xFF, np.uint8).view(dtype).reshape(shape))

    def data_ptr(self):
        return self.pointer.value

    def stride(self):
        """In elements, as PyTorch counts."""
        return tuple(int(np.prod(self.shape[i + 1 :])) for i in range(len(self.shape)))

    def numpy(self):
        values = np.empty(self.shape, self.dtype)
        target = ctypes.c_void_p(values.ctypes.data)
        check(CUDA.cuMemcpyDtoH_v2(target, self.pointer, ctypes.c_size_t(self.num_bytes)), "cuMemcpyDtoH")
        return values
