"""The few functions of the CUDA driver API that the measuring programs use, through ctypes.

Programs import this in a process of their own: a driver call can hang, and a context takes memory.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LIBRARY = "libcuda.so.1"
_V2 = frozenset(
    {"cuMemAlloc", "cuMemFree", "cuMemcpyDtoH", "cuMemcpyHtoD", "cuMemHostRegister"},
)
"""What cuda.h calls cuMemAlloc is the symbol cuMemAlloc_v2. Not so elsewhere: the symbol
cuCtxSynchronize_v2 of newer drivers takes a context (cuda.h of CUDA 13)."""


class DriverFailed(Exception):
    """A call was refused; `code` is the driver's."""

    def __init__(self, function: str, code: int, name: str) -> None:
        self.function = function
        self.code = code
        super().__init__(f"{function}: {code} {name}".rstrip())


class Driver:
    """A device's primary context, current in the calling thread.

    Raises:
        OSError: there is no driver library.
        DriverFailed: cuInit or the context was refused.
    """

    def __init__(self, ordinal: int = 0) -> None:
        self._lib = ctypes.CDLL(LIBRARY)
        self.call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), ordinal)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def has(self, function: str) -> bool:
        """Whether the library has it, in any version."""
        return self._symbol(function) is not None

    def call(self, function: str, *arguments: Any) -> None:  # noqa: ANN401 - as C takes them
        """Call it.

        Raises:
            DriverFailed: with the driver's code and its name.
        """
        symbol = self._symbol(function)
        if symbol is None:
            raise DriverFailed(function, -1, "the library does not have it")
        code = symbol(*arguments)
        if code:
            raise DriverFailed(function, code, self._name(code))

    def _symbol(self, function: str) -> Any:  # noqa: ANN401
        return getattr(self._lib, f"{function}_v2" if function in _V2 else function, None)

    def _name(self, code: int) -> str:
        said = ctypes.c_char_p()
        symbol = getattr(self._lib, "cuGetErrorName", None)
        if symbol is None or symbol(code, ctypes.byref(said)) or said.value is None:
            return ""
        return said.value.decode()

    # ------------------------------------------------------------ memory

    def alloc(self, size: int) -> int:
        """Return the address of so many bytes of device memory."""
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer.value

    def free(self, pointer: int) -> None:
        """Give device memory back."""
        self.call("cuMemFree", ctypes.c_uint64(pointer))

    def to_device(self, pointer: int, source: int, size: int) -> None:
        """Copy from an address here."""
        where = ctypes.c_uint64(pointer), ctypes.c_void_p(source)
        self.call("cuMemcpyHtoD", *where, ctypes.c_size_t(size))

    def to_host(self, target: int, pointer: int, size: int) -> None:
        """Copy to an address here."""
        where = ctypes.c_void_p(target), ctypes.c_uint64(pointer)
        self.call("cuMemcpyDtoH", *where, ctypes.c_size_t(size))

    @contextmanager
    def pinned(self, size: int) -> Iterator[int]:
        """Yield the address of page-locked host memory; given back at the end of the block."""
        pointer = ctypes.c_void_p()
        self.call("cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(size), ctypes.c_uint(0))
        try:
            yield int(pointer.value or 0)
        finally:
            self.call("cuMemFreeHost", pointer)

    @contextmanager
    def registered(self, address: int, size: int) -> Iterator[None]:
        """Page-lock memory that is there already, for the time of the block."""
        where = ctypes.c_void_p(address)
        self.call("cuMemHostRegister", where, ctypes.c_size_t(size), ctypes.c_uint(0))
        try:
            yield
        finally:
            self.call("cuMemHostUnregister", where)

    def wait(self) -> None:
        """Return once the device has done everything."""
        self.call("cuCtxSynchronize")
