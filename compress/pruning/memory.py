"""Freed memory goes back to the system between the steps of a proof, each of which takes other sizes."""

from __future__ import annotations

import ctypes
import platform


def give_back() -> None:
    """Let glibc's malloc return what is free; nothing with another libc.

    It keeps the holes between tensors that live on, and the next step's tensors seldom fit them: after the gradients of a
    ResNet-50 as much as the network itself stayed with the process.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
