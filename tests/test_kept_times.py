"""Times that decide: measured by one process, and kept for a stage that is killed."""

import json

import pytest
from torch import nn

from compress.distributed import ALONE
from compress.errors import StageError
from compress.stages.kept_times import kept_times

LAYERS = {name: (nn.Linear(2, 2), (1, 2)) for name in "abc"}


class Counting:
    """A timer that answers otherwise each time."""

    def __init__(self):
        self.asked = []

    def __call__(self, modules):
        self.asked.append(sorted(modules))
        return {name: [float(len(self.asked)), 0.5] for name in modules}


def some(names):
    return {name: LAYERS[name] for name in names}


def test_what_was_measured_is_given_again_also_to_a_process_that_comes_later(tmp_path):
    path, timer = tmp_path / "work" / "times.json", Counting()
    times = kept_times(timer, path, ALONE)
    first = times(some("ab"))
    assert first == {"a": (1.0, 0.5), "b": (1.0, 0.5)}
    assert times(some("ba")) == first
    assert kept_times(timer, path, ALONE)(some("b")) == {"b": (1.0, 0.5)}
    assert timer.asked == [["a", "b"]]
    assert kept_times(timer, tmp_path / "other.json", ALONE)(some("ab")) != first


def test_only_what_was_timed_side_by_side_is_compared(tmp_path):
    timer = Counting()
    times = kept_times(timer, tmp_path / "times.json", ALONE)
    times(some("a"))
    times(some("b"))
    assert times(some("ab")) == {"a": (3.0, 0.5), "b": (3.0, 0.5)}
    assert times(some("a")) == {"a": (1.0, 0.5)}


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    path = tmp_path / "times.json"
    path.write_text('[{"a": "soon"}]')
    with pytest.raises(StageError, match=r"times\.json: cannot be read; remove it to measure anew"):
        kept_times(Counting(), path, ALONE)(some("a"))


class Group:
    """One of two processes; the leader comes first."""

    def __init__(self, leads, words):
        self.leads, self._words = leads, words

    def told(self, value=None):
        if self.leads:
            self._words.append(json.loads(json.dumps(value)))
            return value
        return self._words.pop(0)


def test_the_leader_measures_and_the_others_are_told(tmp_path):
    words, idle = [], Counting()
    found = kept_times(Counting(), tmp_path / "times.json", Group(True, words))(some("ab"))
    assert kept_times(idle, tmp_path / "mine.json", Group(False, words))(some("ab")) == found
    assert idle.asked == []
    kept_times(Counting(), tmp_path / "times.json", Group(True, words))(some("ab"))
    with pytest.raises(StageError, match="the leading process times others than this one, which asks for c"):
        kept_times(idle, tmp_path / "mine.json", Group(False, words))(some("ac"))
