"""The few calls of the CUDA driver API that the test engine makes, by ctypes on libcuda.so.1.

Nothing but the driver is needed: no toolkit, no runtime library. So the engine runs on a real GPU
and on the tests' stand-in.
"""

import ctypes

OUT_OF_MEMORY = 2
_NS = 1_000_000_000

SPIN = b"""
.version 6.3
.target sm_75
.address_size 64
.visible .entry spin(.param .u64 nanoseconds)
{
    .reg .u64 %now, %end, %length;
    .reg .pred %early;
    ld.param.u64 %length, [nanoseconds];
    mov.u64 %now, %globaltimer;
    add.u64 %end, %now, %length;
AGAIN:
    mov.u64 %now, %globaltimer;
    setp.lt.u64 %early, %now, %end;
    @%early bra AGAIN;
    ret;
}
"""
"""A kernel that takes a while. Source: NVIDIA's PTX ISA, %globaltimer counts nanoseconds."""


class DriverError(Exception):
    """A call of the driver failed.

    Attributes:
        call: its name.
        code: the driver's `CUresult`.
    """

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name} ({code})")
        self.call = call
        self.code = code


class Cuda:
    """The driver with the primary context of one device, current in the calling thread.

    Raises:
        OSError: there is no driver.
        DriverError: it has no such device, or no room for a context.
    """

    def __init__(self, ordinal: int) -> None:
        self._lib = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), ordinal % max(count.value, 1))
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        self._spin: ctypes.c_void_p | None = None

    @property
    def uuid(self) -> str:
        """UUID of the device, as NVML writes it; another one after a restore onto another GPU."""
        raw = (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGetUuid", raw, self._device)
        text = bytes(raw).hex()
        parts = (text[:8], text[8:12], text[12:16], text[16:20], text[20:])
        return "GPU-" + "-".join(parts)

    def allocate(self, size: int) -> int:
        """Return the address of so many new bytes on the device."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        """Give an allocation back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def write(self, address: int, data: bytes) -> None:
        """Copy to the device."""
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)))

    def read(self, address: int, size: int) -> bytes:
        """Copy from the device."""
        data = ctypes.create_string_buffer(size)
        self._call("cuMemcpyDtoH_v2", data, ctypes.c_uint64(address), ctypes.c_size_t(size))
        return data.raw

    def spin(self, seconds: float) -> None:
        """Keep the device busy, and wait until it is not."""
        if self._spin is None:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuModuleLoadData", ctypes.byref(module), SPIN)
            self._call("cuModuleGetFunction", ctypes.byref(function), module, b"spin")
            self._spin = function
        length = ctypes.c_uint64(int(seconds * _NS))
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(length))
        one = [ctypes.c_uint(1)] * 6
        nothing = ctypes.c_void_p()
        self._call(
            "cuLaunchKernel", self._spin, *one, ctypes.c_uint(0), nothing, parameters, nothing
        )
        self._call("cuCtxSynchronize")

    def _call(self, name: str, *words: object) -> None:
        code = self._lib[name](*words)
        if code != 0:
            text = ctypes.c_char_p()
            self._lib["cuGetErrorName"](code, ctypes.byref(text))
            raise DriverError(name, code, (text.value or b"unknown").decode())
