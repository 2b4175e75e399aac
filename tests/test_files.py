"""Files and folders are whole or not there, whatever goes wrong while they are written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.files import canonical_json, new_folder, readable_json, sha256_of, write_file
from compress.names import is_weights_file


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def entries(folder):
    return [path.name for path in folder.iterdir()]


def fail(monkeypatch, what):
    """Let every call fail, as on a full disk."""

    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    target, name = what
    monkeypatch.setattr(target, name, broken)


BREAKS = {"fsync": (os, "fsync"), "rename": (Path, "replace"), "chmod": (Path, "chmod")}


def test_write_file_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "f.json"
    write_file(path, b"old")
    write_file(path, b"new")
    assert content(tmp_path) == {"a/b/f.json": b"new"}
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("what", BREAKS)
def test_write_file_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, what):
    path = tmp_path / "f.json"
    path.write_bytes(b"old")
    fail(monkeypatch, BREAKS[what])
    with pytest.raises(CompressError, match=r"f\.json: cannot be written: No space left on device"):
        write_file(path, b"new")
    assert content(tmp_path) == {"f.json": b"old"}


def test_an_interrupt_while_writing_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "f.json"
    path.write_bytes(b"old")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, b"new")
    assert content(tmp_path) == {"f.json": b"old"}


def test_new_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "runs" / "x") as folder:
        (folder / "a").write_bytes(b"1")
        assert not (tmp_path / "runs" / "x").exists()
    assert content(tmp_path) == {"runs/x/a": b"1"}
    assert (tmp_path / "runs" / "x").stat().st_mode & 0o777 == 0o755


def test_new_folder_replaces_an_old_one_and_even_a_file(tmp_path):
    for _ in range(2):
        with new_folder(tmp_path / "x") as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "a").write_bytes(b"1")
    (tmp_path / "y").write_bytes(b"a file")
    with new_folder(tmp_path / "y") as folder:
        (folder / "b").write_bytes(b"2")
    assert content(tmp_path) == {"x/inner/a": b"1", "y/b": b"2"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, CompressError])
def test_new_folder_vanishes_when_its_block_fails(tmp_path, error):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_bytes(b"old")

    def fill():
        with new_folder(tmp_path / "x") as folder:
            (folder / "a").write_bytes(b"half")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fill()
    assert content(tmp_path) == {"x/a": b"old"}
    assert entries(tmp_path) == ["x"]


@pytest.mark.parametrize("what", BREAKS)
def test_new_folder_that_fails_leaves_the_old_one(tmp_path, monkeypatch, what):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_bytes(b"old")

    def fill():
        with new_folder(tmp_path / "x") as folder:
            (folder / "a").write_bytes(b"new")
            fail(monkeypatch, BREAKS[what])

    with pytest.raises(CompressError, match="x: cannot be written: No space left on device"):
        fill()
    assert content(tmp_path) == {"x/a": b"old"}
    assert entries(tmp_path) == ["x"]


def test_when_the_second_rename_fails_the_old_folder_comes_back(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_bytes(b"old")
    real, calls = Path.replace, []

    def second_fails(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return real(self, target)

    def fill():
        with new_folder(tmp_path / "x") as folder:
            (folder / "a").write_bytes(b"new")
            monkeypatch.setattr(Path, "replace", second_fails)

    with pytest.raises(CompressError, match="x: cannot be written: Input/output error"):
        fill()
    assert content(tmp_path) == {"x/a": b"old"}
    assert entries(tmp_path) == ["x"]


def test_everything_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    events, sync, rename = [], os.fsync, Path.replace

    def recorded_sync(handle):
        events.append("sync")
        sync(handle)

    def recorded_rename(self, target):
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(Path, "replace", recorded_rename)
    write_file(tmp_path / "f", b"x")
    assert events == ["sync", "rename", "sync"]
    events.clear()
    with new_folder(tmp_path / "x") as folder:
        (folder / "a").write_bytes(b"1")
        (folder / "b").write_bytes(b"2")
    assert events == ["sync"] * 3 + ["rename", "sync"]


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CompressError, match="g: cannot be written: "):
        write_file(tmp_path / "file" / "g", b"x")
    with pytest.raises(CompressError, match="g: cannot be written: "), new_folder(tmp_path / "file" / "g"):
        pass
    assert content(tmp_path) == {"file": b""}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_clear_error(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(CompressError, match="f: cannot be written: Permission denied"):
            write_file(tmp_path / "f", b"x")
        with pytest.raises(CompressError, match="x: cannot be written: Permission denied"), new_folder(tmp_path / "x"):
            pass
    finally:
        tmp_path.chmod(0o755)


def test_write_over_a_folder_is_a_clear_error(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(CompressError, match="x: cannot be written: Is a directory"):
        write_file(tmp_path / "x", b"x")
    assert entries(tmp_path) == ["x"]


def test_the_error_keeps_its_cause(tmp_path):
    shutil.rmtree(tmp_path)
    tmp_path.write_bytes(b"")
    with pytest.raises(CompressError) as caught:
        write_file(tmp_path / "f", b"x")
    assert isinstance(caught.value.__cause__, OSError)
    tmp_path.unlink()
    tmp_path.mkdir()


def test_json_is_canonical_or_readable():
    assert canonical_json({"b": 1, "a": ["é"]}) == b'{"a":["\\u00e9"],"b":1}'
    assert readable_json({"a": "é"}).decode() == '{\n "a": "é"\n}\n'
    for write in (canonical_json, readable_json):
        with pytest.raises(ValueError, match="JSON compliant"):
            write(float("nan"))
    assert json.loads(canonical_json({"x": 0.1})) == {"x": 0.1}


def test_sha256_of(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 100_000)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(b"x" * 100_000).hexdigest()


@pytest.mark.parametrize(
    ("weights", "is_file"),
    [("w.pth", True), ("w.safetensors", True), ("a/w", True), ("DEFAULT", False), ("IMAGENET1K_V1", False)],
)
def test_weights_are_files_or_names(weights, is_file):
    assert is_weights_file(weights) is is_file
