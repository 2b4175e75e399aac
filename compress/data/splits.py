"""Which samples belong to which split: seeded, stratified by class, disjoint. Numbers only, no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.config.data import DataConfig, Validation
from compress.errors import DataError

Indices = npt.NDArray[np.int64]

# Each purpose draws from its own stream, so that one seed does not pick the same samples for two of them.
_TEST, _VALIDATION, _SAMPLE, _USED, _HALF = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Part:
    """The samples `indices` (ascending) of the set called `origin` ('train', 'validation' or 'test')."""

    origin: str
    indices: Indices


def divide(
    labels: Mapping[str, Indices], validation: Validation, test: float, seed: int, classes: Sequence[str]
) -> dict[str, Part]:
    """Lay out the three splits over the sets that the data brings.

    Args:
        labels: labels (n,) of each set the data brings: 'train', and where it has them 'validation' and 'test'.
        validation: where the validation split comes from.
        test: fraction of train that becomes the test split where the data brings none, in (0, 1).
        seed: same seed, same splits.
        classes: names of the classes, for messages.

    Returns:
        'train', 'validation' and 'test', disjoint, each not empty.

    Raises:
        DataError: too few samples for the asked sizes, or no validation set where it must be given.
    """
    parts = {name: Part(name, np.arange(len(values))) for name, values in labels.items()}
    if "test" not in parts:
        _split_off(parts, "test", "train", labels, test, [seed, _TEST], classes)
    if validation.source != "given":
        _split_off(parts, "validation", validation.source, labels, validation.size, [seed, _VALIDATION], classes)
    elif "validation" not in parts:
        raise DataError("data.validation.from: is 'given', but the data brings no validation split")
    return parts


def _split_off(
    parts: dict[str, Part],
    new: str,
    old: str,
    labels: Mapping[str, Indices],
    size: int | float,
    seed: Sequence[int],
    classes: Sequence[str],
) -> None:
    """Take `size` samples out of part `old` and make them part `new`."""
    origin, indices = parts[old].origin, parts[old].indices
    own = labels[origin][indices]
    total = len(own)
    count = size if isinstance(size, int) else max(1, round(size * total))
    asked = f"cannot split {count:,} of {total:,} {old} samples off for {new}"
    counts = np.bincount(own)
    present = np.flatnonzero(counts)
    single = np.flatnonzero(counts == 1)
    if single.size:
        raise DataError(f"data: {asked}: class '{classes[single[0]]}' has 1 sample and needs at least 2")
    if total - count < present.size:
        raise DataError(f"data: {asked}: {present.size} classes need at least one sample each in what remains")
    chosen = _draw(own, count, seed, spare=1)
    parts[new] = Part(origin, indices[chosen])
    parts[old] = Part(origin, np.delete(indices, chosen))


def used(part: Part, labels: Indices, config: DataConfig, seed: int, classes: Sequence[str]) -> Part:
    """The samples of a training split that `fraction` or `per_class` leave.

    Every class is drawn from its own stream, in an order that does not depend on how many are asked for: what is drawn
    for a smaller amount is part of what is drawn for a larger one.

    Args:
        part: the training split, after validation and test were split off.
        labels: labels (n,) of the set that the part comes from.
        config: `fraction` of each class, rounded, at least one sample; or `per_class` samples of each.
        seed: same seed, same samples.
        classes: names of the classes, for messages.

    Raises:
        DataError: fewer samples of a class than `per_class`; names the class.
    """
    if config.per_class is None and config.fraction >= 1.0:
        return part
    own = labels[part.indices]
    present, counts = np.unique(own, return_counts=True)
    if config.per_class is None:
        wanted = np.maximum(1, np.rint(config.fraction * counts)).astype(np.int64)
    else:
        wanted = np.full(len(present), config.per_class)
        least = int(np.argmin(counts))
        if counts[least] < config.per_class:
            raise DataError(
                f"data.per_class: class '{classes[present[least]]}' has {counts[least]:,} samples in the training split, "
                f"fewer than {config.per_class:,}"
            )
    drawn = [
        np.random.default_rng([seed, _USED, int(label)]).permutation(np.flatnonzero(own == label))[:some]
        for label, some in zip(present, wanted, strict=True)
    ]
    return Part(part.origin, part.indices[np.sort(np.concatenate(drawn))])


def stratified_sample(labels: npt.ArrayLike, n: int, seed: int) -> list[int]:
    """Positions of `n` samples whose classes are as frequent as in `labels`, ascending; all where there are fewer.

    Args:
        labels: integers from 0, shape (m,).
        n: at least 1.
        seed: same seed, same sample.
    """
    assert n >= 1
    values = np.asarray(labels, dtype=np.int64)
    if n >= len(values):
        return list(range(len(values)))
    return [int(i) for i in _draw(values, n, [seed, _SAMPLE], spare=0)]


def halves(labels: npt.ArrayLike, seed: int) -> tuple[list[int], list[int]]:
    """Positions of two halves whose classes are as frequent as in `labels`, each ascending, together all of them.

    Args:
        labels: integers from 0, shape (m,), m at least 2.
        seed: same seed, same halves.

    Returns:
        Two disjoint lists; of an odd number the first has one more.
    """
    values = np.asarray(labels, dtype=np.int64)
    assert len(values) >= 2
    second = _draw(values, len(values) // 2, [seed, _HALF], spare=0)
    first = np.delete(np.arange(len(values)), second)
    return [int(i) for i in first], [int(i) for i in second]


def _draw(labels: Indices, n: int, seed: Sequence[int], spare: int) -> Indices:
    """Positions of `n` samples, stratified, ascending; at least `spare` samples of each class are not drawn."""
    rng = np.random.default_rng(seed)
    order = np.argsort(labels, kind="stable")
    counts = np.unique(labels, return_counts=True)[1]
    groups = np.split(order, np.cumsum(counts)[:-1])
    take = _allocate(counts, n, spare)
    drawn = [rng.permutation(group)[:some] for group, some in zip(groups, take, strict=True)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def _allocate(counts: Indices, n: int, spare: int) -> Indices:
    """How many of `n` samples each class gives: its proportional share, rounded so that the sum is `n`.

    Each class gives at least one where `n` reaches that far, and keeps at least `spare`.
    """
    share = counts * (n / counts.sum())
    least = np.minimum(1 if n >= len(counts) else 0, counts - spare)
    most = counts - spare
    take: Indices = np.clip(np.floor(share).astype(np.int64), least, most)
    while take.sum() < n:
        take[np.argmax(np.where(take < most, share - take, -np.inf))] += 1
    while take.sum() > n:
        take[np.argmin(np.where(take > least, share - take, np.inf))] -= 1
    return take
