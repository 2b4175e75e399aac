"""One seed of a run, many independent streams."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed (0 to 2^31 - 1) for one purpose, such as `derive_seed(0, "train", "epoch", 3)`.

    Streams of different purposes do not depend on each other or on how much was drawn before, so a killed run can go
    on at any epoch without saving the state of a generator.
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
