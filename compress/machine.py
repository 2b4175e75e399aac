"""Facts about the machine a run happens on, read without torch so that planning stays fast."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
from pathlib import Path

INTERESTING_FLAGS = frozenset(
    [
        "avx",
        "avx2",
        "avx512f",
        "avx512_vnni",
        "avx_vnni",
        "avx512_bf16",
        "amx_bf16",
        "amx_int8",
        "fma",
        "asimd",
        "asimddp",
        "asimdhp",
        "i8mm",
        "bf16",
        "sve",
    ]
)
"""Instruction sets that decide how fast and how exact a model runs."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the CPU as Linux names them; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def cpu_model() -> str:
    """Marketing name of the CPU, or the architecture where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_launched() -> bool:
    """Whether torchrun, or another launcher that says so as it does, started this process."""
    return "LOCAL_RANK" in os.environ or processes() > 1


def processes() -> int:
    """How many processes were started together, on all machines."""
    return _number("WORLD_SIZE")


def processes_here() -> int:
    """How many of them are on this machine."""
    return _number("LOCAL_WORLD_SIZE")


def process_number() -> int:
    """Which of them this process is, from 0."""
    return _number("RANK", 0)


def _number(variable: str, least: int = 1) -> int:
    """A number that the launcher put into the environment; `least` where there is none."""
    text = os.environ.get(variable, "")
    return max(least, int(text)) if text.isdecimal() else least


def is_arm() -> bool:
    """Whether this is a 64-bit ARM machine."""
    return platform.machine().lower() in ("arm64", "aarch64")


def has_vnni() -> bool:
    """Whether the CPU multiplies int8 without saturating int16 accumulators (VNNI)."""
    return bool(cpu_flags() & {"avx512_vnni", "avx_vnni"})


def has_fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware, so that autocast to it is worth it."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


@functools.cache
def version(distribution: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def cuda_device_name() -> str | None:
    """Name of the first CUDA device, asked of the driver; None where there is none or torch is a CPU build."""
    if (version("torch") or "").endswith("+cpu"):
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, name = ctypes.c_int(0), ctypes.c_int(0), ctypes.create_string_buffer(256)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0 or driver.cuDeviceGetName(name, 256, device) != 0:
        return None
    return name.value.decode(errors="replace")
