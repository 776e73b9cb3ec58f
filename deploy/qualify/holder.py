"""Holds a CUDA context on one GPU until its standard input ends. It sets nothing.

A program of its own: a context cannot be given back otherwise than by the end of its process, and
the product finds a GPU's user by its process. It says one line: `ready` and the time (monotonic),
or why there is no context. CUDA_VISIBLE_DEVICES names the GPU.
"""

import ctypes
import sys
import time

# cuda.h, enum cudaError_enum: what people meet.
_NAMES = {
    2: "out of memory",
    46: "the device is busy: another process has it to itself (compute mode exclusive)",
    100: "CUDA sees no device here: with MIG, or without the driver's device nodes, it has none",
    101: "invalid device",
    802: "the system is not ready: nvidia-fabricmanager",
    803: "driver and libcuda.so.1 are of different versions",
    999: "unknown",
}


def hold() -> str:
    """Make the context; returns why there is none, or nothing."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"libcuda.so.1 cannot be loaded: {error}"
    device, context = ctypes.c_int(), ctypes.c_void_p()
    for name, arguments in (
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), 0)),
        ("cuDevicePrimaryCtxRetain", (ctypes.byref(context), device)),
    ):
        code = getattr(cuda, name)(*arguments)
        if code:
            return f"{name}: error {code} ({_NAMES.get(code, 'see cuda.h')})"
    return ""


if __name__ == "__main__":
    print(hold() or f"ready {time.monotonic()}", flush=True)
    sys.stdin.read()
