"""Where something was measured: the machine, and the commit of a folder."""

import os
import platform
import re
import shutil
import subprocess
import sys

import pytest

from compress import machine, surroundings
from compress.surroundings import git_revision, machine_record

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder, *arguments):
    """Run git with an identity of its own and without the user's settings."""
    told = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    command = ["git", *told, "-C", str(folder), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A folder in a repository with one commit."""
    folder = tmp_path / "repository" / "pipelines"
    folder.mkdir(parents=True)
    (folder / "p.yaml").write_text("name: x\n")
    git(tmp_path / "repository", "init", "--quiet")
    git(folder, "add", "p.yaml")
    git(folder, "commit", "--quiet", "--message", "one")
    return folder


@needs_git
def test_the_revision_is_the_commit_and_says_when_files_differ(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert len(commit) == 40
    (repository / "untracked").write_text("")
    assert git_revision(repository) == git_revision(repository.parent) == commit
    (repository / "p.yaml").write_text("name: y\n")
    assert git_revision(repository) == f"{commit}+changes"
    git(repository, "add", "p.yaml")  # staged is not committed
    assert git_revision(repository) == f"{commit}+changes"
    git(repository, "commit", "--quiet", "--message", "two")
    assert git_revision(repository) == git(repository, "rev-parse", "HEAD") != commit


@needs_git
def test_a_hook_of_another_repository_does_not_lead_astray(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere" / ".git"))
    assert len(git_revision(repository)) == 40


@needs_git
def test_programs_that_a_repository_names_are_not_run(repository, tmp_path):
    monitor, trace = tmp_path / "monitor", tmp_path / "ran"
    monitor.write_text(f"#!/bin/sh\ntouch '{trace}'\n")
    monitor.chmod(0o755)
    git(repository, "config", "core.fsmonitor", str(monitor))
    assert len(git_revision(repository)) == 40
    assert not trace.exists()


@needs_git
def test_no_revision_outside_of_git_or_before_the_first_commit(tmp_path):
    assert git_revision(tmp_path) is None
    assert git_revision(tmp_path / "nowhere") is None
    assert git_revision(tmp_path / "\0") is None
    git(tmp_path, "init", "--quiet")
    assert git_revision(tmp_path) is None


def test_no_revision_without_git_or_where_it_hangs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(tmp_path) is None
    slow = tmp_path / "git"
    slow.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    slow.chmod(0o755)
    monkeypatch.setattr(surroundings, "_GIT_SECONDS", 0.2)
    assert git_revision(tmp_path) is None


def test_the_machine_says_what_a_stranger_needs():
    found = machine_record()
    assert found.cores == machine.cores()
    assert found.cpu
    assert set(found.instruction_sets) <= machine.INTERESTING_FLAGS
    assert {"torch", "onnxruntime", "onnx", "numpy", "compress latency harness"} <= found.versions.keys()
    assert list(found.versions) == sorted(found.versions)
    assert machine_record() == found


def test_hosts_differ_by_name_and_by_id_and_neither_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(surroundings, "_MACHINE_ID", tmp_path / "machine-id")
    monkeypatch.setattr(platform, "node", lambda: "secret-name")
    hosts = [machine_record().host]
    (tmp_path / "machine-id").write_text("secret-id\n")
    hosts.append(machine_record().host)
    monkeypatch.setattr(platform, "node", lambda: "other-name")
    record = machine_record()
    hosts.append(record.host)
    assert len(set(hosts)) == 3
    assert all(re.fullmatch("[0-9a-f]{12}", host) for host in hosts)
    assert machine_record() == record
    assert not any(secret in record.model_dump_json() for secret in ("secret-id", "other-name"))


@pytest.mark.parametrize("changed", ["latency", "latency_worker", "backends.onnx_runtime", "profile", "profile_worker"])
def test_times_of_another_harness_are_another_machines(changed, monkeypatch):
    before = machine_record()
    real = surroundings.code_digest

    def other(module):
        return "0" * 64 if module == f"compress.bench.{changed}" else real(module)

    monkeypatch.setattr(surroundings, "code_digest", other)
    after = machine_record()
    assert after.versions != before.versions
    assert after.model_copy(update={"versions": before.versions}) == before


def test_asking_loads_no_torch():
    code = (
        "import sys; from pathlib import Path; from compress.surroundings import git_revision, machine_record\n"
        "machine_record(); git_revision(Path())\n"
        "print(sorted({'torch', 'torchvision', 'onnxruntime', 'onnx', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
