"""A teacher whose answers are computed once, kept on disk, and looked up wherever the same inputs come again.

A folder holds the logits for one view of a split: an array (samples, classes) in NumPy's format that is mapped into memory,
and a record of what they are the answers of. Views are computed when they are first asked for, in order and in batches of one
size, so that a file does not depend on the training that asks, nor on where that was killed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import JsonValue
from torch import Tensor

from compress.config import TeacherCacheConfig
from compress.data.base import Batch, Split
from compress.distributed import ALONE, Group
from compress.errors import StageError
from compress.events import Progress
from compress.files import canonical_json, new_folder, readable_json, sha256_of
from compress.seeds import derive_seed
from compress.training.failures import out_of_memory_as
from compress.training.layout import laid_out
from compress.training.teachers import OneTeacher

Logits = npt.NDArray[np.floating[Any]]

_FORMAT = 1
_BATCH = 256
_LOGITS, _RECORD = "logits.npy", "record.json"
_DIGITS = 16


class CachedTeacher:
    """A teacher that is asked once per input; a `Teacher`.

    One model and no mean of several: each of these has a cache of its own, because what their mean is depends on the
    temperature, and because another student may want another mean.
    """

    def __init__(
        self,
        teacher: OneTeacher,
        split: Split,
        config: TeacherCacheConfig,
        identity: Mapping[str, JsonValue],
        folder: Path,
        progress: Progress,
        group: Group = ALONE,
        at: str = "cache",
    ) -> None:
        """Nothing is computed yet.

        Args:
            teacher: who is asked.
            split: whose samples it is asked about; batches come from this split.
            config: number of views, and how logits are stored.
            identity: what decides the answers besides what is known here: digest of the teacher, key and seed of the data.
            folder: where the folders of all caches stand. They are found again there by whoever needs the same answers.
            progress: is shown what is computed, and told how much room it takes.
            group: its leader computes, and tells the others where; all are asked about the same views in the same order.
            at: the key of the settings, for messages.

        Raises:
            StageError: where the inputs of the split do not come again.
        """
        check_repeats(split, at)
        self._teacher, self._split, self._config, self._identity = teacher, split, config, identity
        self._folder, self._progress, self._group, self._at = folder, progress, group, at
        self._device, self._layout = torch.device("cpu"), torch.contiguous_format
        self._views: dict[int, Logits] = {}
        self._told = False

    def to(self, device: torch.device, layout: torch.memory_format) -> None:
        """See `Teacher`; the model itself goes there only while it computes."""
        self._device, self._layout = device, layout
        self._views = {}  # of another device they are other answers

    def logits(self, batch: Batch, temperature: float) -> Tensor:  # noqa: ARG002  # one teacher answers the same at any
        """See `Teacher`.

        Raises:
            StageError: where inputs were mixed, which nobody was asked about; where the disk has no room for the answers.
        """
        if batch.labels.dim() != 1:
            raise StageError(
                f"{self._at}: with mixed inputs (mixup, cutmix) no input comes twice; leave one of them out"
            )
        assert batch.view is not None, "augmented anew, without a view: these inputs were never seen before"
        if batch.view not in self._views:
            self._views[batch.view] = self._view(batch.view)
        found = np.asarray(self._views[batch.view])[batch.indices.cpu().numpy()]
        return torch.from_numpy(found).to(batch.labels.device, torch.float32)

    def _view(self, view: int) -> Logits:
        """Logits (samples, classes) of a view, mapped; computed where they are not there.

        Raises:
            StageError: in a process that does not see what the leader computed.
        """
        if self._group.leads:
            logits, folder = self._made(view)
            self._group.told(str(folder.resolve()))
            return logits
        folder = Path(str(self._group.told()))
        try:
            # Another processor, or number of threads, would have other keys; the answers are the leader's all the same.
            return _mapped(folder, {})
        except (FileNotFoundError, _UnusableError) as error:
            raise StageError(f"{self._at}: {folder}: what the first process computed is not there: {error}") from None

    def _made(self, view: int) -> tuple[Logits, Path]:
        """The logits and their folder, computed where they are not there."""
        record: dict[str, JsonValue] = {"key": self._key(view), "inputs": self._inputs_digest(view)}
        folder = self._place(view)
        try:
            return _mapped(folder, record), folder
        except FileNotFoundError:
            pass
        except _UnusableError as error:
            self._progress.note(f"the teacher's answers to view {view + 1} {error}: computed anew")
        self._compute(view, folder, record)
        return _mapped(folder, record), folder

    def _key(self, view: int) -> dict[str, JsonValue]:
        """All that decides a view's answers, but for the inputs themselves."""
        device, on_cpu = self._device, self._device.type == "cpu"
        computer = f"cpu: {torch.backends.cpu.get_cpu_capability()}" if on_cpu else torch.cuda.get_device_name(device)
        return {
            "format": _FORMAT,
            "identity": dict(self._identity),
            "view": view,
            "samples": len(self._split),
            "dtype": self._config.dtype,
            "batch_size": _BATCH,  # the last bits of a sum depend on it
            "device": computer,
            "threads": torch.get_num_threads() if on_cpu else None,
            "autocast": str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None,
            "layout": str(self._layout),
            "torch": torch.__version__,
        }

    def _place(self, view: int) -> Path:
        digest = hashlib.sha256(canonical_json(self._key(view))).hexdigest()
        return self._folder / f"view{view}-{digest[:_DIGITS]}"

    def _inputs_digest(self, view: int) -> str:
        """Of all labels and the first inputs: the user's own code may read data that no key knows."""
        first = next(iter(self._split.batches(_BATCH, view=view)))
        digest = hashlib.sha256(self._split.labels.numpy().tobytes())
        for tensor in first.inputs:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _compute(self, view: int, folder: Path, record: Mapping[str, JsonValue]) -> None:
        """Ask about all samples of a view, and write what is said."""
        devices = [self._device] if self._device.type == "cuda" else []
        self._teacher.to(self._device, self._layout)
        told = StageError(
            f"{self._at}: out of memory while the teacher answers {_BATCH} samples at a time; leave cache out, and it answers "
            "those of a step"
        )
        try:
            # A model that draws in evaluation mode must neither take from the student's stream nor depend on it.
            with out_of_memory_as(told), torch.random.fork_rng(devices=devices), new_folder(folder) as temporary:
                torch.manual_seed(derive_seed(view, "teacher"))
                shape = self._write(view, temporary)
                whole = {**record, "shape": list(shape), "sha256": sha256_of(temporary / _LOGITS)}
                (temporary / _RECORD).write_bytes(readable_json(whole))
        finally:
            self._teacher.to(torch.device("cpu"), torch.contiguous_format)

    def _write(self, view: int, folder: Path) -> tuple[int, int]:
        """Write the array as its parts come; returns its shape."""
        samples, done = len(self._split), 0
        what = f"teacher's answers, view {view + 1} of {self._versions}"
        with (folder / _LOGITS).open("wb") as stream:
            for batch in self._split.batches(_BATCH, view=view):
                rows = self._rows(batch)
                if done == 0:
                    classes = rows.shape[1]
                    self._make_sure_of_room(view, samples * classes * rows.itemsize, classes, folder)
                    head = np.lib.format.header_data_from_array_1_0(rows) | {"shape": (samples, classes)}
                    np.lib.format.write_array_header_1_0(stream, head)
                stream.write(rows.tobytes())
                done += len(rows)
                self._progress.work(what, done, samples)
        assert done == samples
        return samples, classes

    def _rows(self, batch: Batch) -> Logits:
        """Logits (n, classes) for a batch, as they are stored."""
        there = laid_out(batch.to(self._device), self._layout)
        said: Logits = self._teacher.logits(there, 1.0).cpu().numpy()
        with np.errstate(over="ignore"):
            rows: Logits = np.ascontiguousarray(said, dtype=self._config.dtype)
        if (np.isfinite(said) & ~np.isfinite(rows)).any():
            raise StageError(
                f"{self._at}.dtype: the teacher answers {np.abs(said).max():.6g}, which float16 cannot hold; set dtype: float32"
            )
        return rows

    def _make_sure_of_room(self, view: int, size_bytes: int, classes: int, there: Path) -> None:
        """Say how much disk the views that are not there yet will take, before they take it.

        Raises:
            StageError: where it is more than there is.
        """
        missing = [v for v in range(self._versions) if v == view or not (self._place(v) / _RECORD).is_file()]
        needed, free = size_bytes * len(missing), shutil.disk_usage(there).free
        many = f"{len(missing)} view{'s' if len(missing) > 1 else ''}"
        size = f"{len(self._split):,} samples × {classes:,} classes × {many} in {self._config.dtype}"
        if needed > free:
            raise StageError(
                f"{self._at}: the teacher's answers take {_size(needed)} ({size}), the disk has {_size(free)} left; "
                "set fewer views, dtype: float16, or leave cache out"
            )
        if not self._told:
            self._told = True
            self._progress.note(
                f"the teacher's answers take {_size(needed)} ({size}) in the folder '{self._folder.name}' of the run; "
                "they stay there for other students until the folder is deleted"
            )

    @functools.cached_property
    def _versions(self) -> int:
        """How many views there really are: without augmentation all are the first one."""
        if self._config.views == 1:
            return 1
        return self._config.views if next(iter(self._split.batches(1, view=1))).view == 1 else 1


def check_repeats(split: Split, at: str) -> None:
    """Check that a split's inputs come again; `at` is the key of the settings, for the message.

    Raises:
        StageError: where they do not.
    """
    if not split.repeats:
        raise StageError(
            f"{at}: the teacher's answers can be kept only where inputs come again; with `data.kind: python` a data set "
            "object may make other samples each time it is read: return arrays instead, or leave cache out"
        )


class _UnusableError(Exception):
    """Answers that are there and cannot be taken; says why."""


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def _mapped(folder: Path, expected: Mapping[str, JsonValue]) -> Logits:
    """The logits in a folder.

    Raises:
        FileNotFoundError: where there are none.
        _UnusableError: where they are damaged, or the answers to something else than `expected` says.
    """
    try:
        record = json.loads((folder / _RECORD).read_bytes())
        same = canonical_json({name: record[name] for name in expected}) == canonical_json(expected)
        if sha256_of(folder / _LOGITS) != record["sha256"]:
            raise _UnusableError("are damaged")
        logits: Logits = np.load(folder / _LOGITS, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        if folder.exists():
            raise _UnusableError("are not complete") from None
        raise
    except (OSError, ValueError, KeyError, TypeError):
        raise _UnusableError("are damaged") from None
    if not same:
        raise _UnusableError("are those to other inputs")
    return logits
