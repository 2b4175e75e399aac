"""Memory that a training on the CPU frees and takes again in every step stays with the process."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MIB = 2**20
# The largest that glibc lets its own thresholds grow to; it adapts them no more once they were set.
_USUAL_MMAP, _USUAL_TRIM = 32 * _MIB, 64 * _MIB
_ALL_MMAP, _ALL_TRIM = 1024 * _MIB, 2**31 - 1
_OWN_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, glibc's malloc gives nothing back to the system; afterwards it gives back all that is free.

    Else each step's activations are new pages, which the kernel has to clear: 10,000 page faults in a step of a ResNet-20
    with 128 samples, a fifth of its time (benchmarks/README.md). Nothing changes with another libc or malloc, nor where the
    environment has settings for glibc's.
    """
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in _OWN_SETTINGS):
        yield
        return
    libc = ctypes.CDLL("libc.so.6")
    if not libc.mallopt(_M_MMAP_THRESHOLD, _ALL_MMAP):  # more than releases before 2.35 take
        libc.mallopt(_M_MMAP_THRESHOLD, _USUAL_MMAP)
    libc.mallopt(_M_TRIM_THRESHOLD, _ALL_TRIM)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _USUAL_MMAP)
        libc.mallopt(_M_TRIM_THRESHOLD, _USUAL_TRIM)
        libc.malloc_trim(0)
