"""The teacher cache: the teacher's own answers, asked for once, whole or not there, and never those to something else."""

import json
import queue
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.config import LossEntry, RecoveryConfig, TeacherCacheConfig
from compress.config.data import ArraysConfig, Augment, PythonConfig, Validation
from compress.data.base import DecisionData, Shard
from compress.data.load import load_data
from compress.distributed import ALONE, Group
from compress.errors import StageError
from compress.events import Silent
from compress.training import Objective, Workplace, fit
from compress.training.cache import CachedTeacher
from compress.training.teachers import Ensemble, OneTeacher

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES, CLASSES = 300, 5
MOVED = Augment(crop=2, flip=True)
CPU = torch.device("cpu")
Disk = namedtuple("Disk", "total used free")


class Net(nn.Module):
    """A small network that counts what it is asked."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)
        self.scale, self.asked = scale, []

    def forward(self, x):
        self.asked.append(len(x))
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3))) * self.scale


class Drawing(Net):
    """Adds noise, in evaluation mode too."""

    def forward(self, x):
        return super().forward(x) + torch.randn(len(x), CLASSES)


class Failing(Net):
    """Fails when it is asked for the second time."""

    def forward(self, x):
        if self.asked:
            raise RuntimeError("no more answers")
        return super().forward(x)


class Student(Net):
    """A network that draws while it trains."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class KilledError(Exception):
    """Stands for whatever ends a process between two epochs."""


class Listener(Silent):
    def __init__(self, dies_after=None):
        self.notes, self.done, self.dies_after = [], [], dies_after

    def epoch(self, result):
        if result.epoch == self.dies_after:
            raise KilledError

    def note(self, text):
        self.notes.append(text)

    def work(self, what, done, total, detail=""):
        self.done.append((what, done, total))


def made(kind=Net, seed=0, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(**kwargs)


@pytest.fixture
def train(tmp_path):
    """Makes a training split of images that are not square."""

    def make(augment=MOVED, seed=0):
        root = tmp_path / "data"
        if not root.exists():
            root.mkdir()
            for split, n in (("train", SAMPLES), ("test", 20)):
                pixels = np.random.default_rng(n).integers(0, 256, (n, 6, 9, 3), dtype=np.uint8)
                np.save(root / f"{split}_images.npy", pixels)
                np.save(root / f"{split}_labels.npy", np.arange(n) % CLASSES)
        validation = Validation.model_validate({"from": "test", "size": 10})
        return load_data(ArraysConfig(kind="arrays", root=root, augment=augment, validation=validation), seed).train

    return make


@pytest.fixture
def cached(tmp_path):
    """Makes a teacher with a cache; all share one folder."""

    def make(split, model=None, *, views=2, dtype="float32", identity="one", progress=None, group=ALONE):
        config = TeacherCacheConfig(views=views, dtype=dtype)
        return CachedTeacher(
            OneTeacher(model or made()),
            split,
            config,
            {"teacher": identity},
            tmp_path / "teacher",
            progress or Silent(),
            group,
        )

    return make


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "teacher").iterdir())


def answers(teacher, split, batch_size=256, layout=torch.contiguous_format, **kwargs):
    """What a teacher says to all batches of a split, in the order of the split."""
    batches = [
        batch._replace(inputs=tuple(tensor.contiguous(memory_format=layout) for tensor in batch.inputs))
        for batch in split.batches(batch_size, **kwargs)
    ]
    said = torch.cat([teacher.logits(batch, 4.0) for batch in batches])
    return said[torch.cat([batch.indices for batch in batches]).argsort()]


# The same answers


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("augment", "view"), [(Augment(), 0), (MOVED, 0), (MOVED, 1)])
def test_same_batches_have_the_teachers_answers_to_the_bit(train, cached, augment, view, layout):
    split, plain = train(augment), OneTeacher(made())
    teacher = cached(split)
    for each in (teacher, plain):
        each.to(CPU, layout)
    expected = answers(plain, split, view=view, layout=layout)
    assert expected.shape == (SAMPLES, CLASSES)
    assert torch.equal(answers(teacher, split, view=view, layout=layout), expected)


@pytest.mark.parametrize("kwargs", [{"seed": 3, "batch_size": 16}, {"batch_size": 7}, {"seed": 9, "drop_last": True}])
def test_other_batches_have_the_same_answers_but_for_rounding(train, cached, kwargs):
    split, plain = train(), OneTeacher(made())
    teacher = cached(split)
    for view in (0, 1):
        for batch in split.batches(**{"batch_size": 16, **kwargs}, view=view):
            torch.testing.assert_close(teacher.logits(batch, 1.0), plain.logits(batch, 1.0), rtol=1e-5, atol=1e-6)


def test_views_have_different_answers(train, cached):
    split = train()
    teacher = cached(split)
    assert not torch.equal(answers(teacher, split, view=0), answers(teacher, split, view=1))


@pytest.mark.parametrize("world", [2, 3])
def test_a_shard_looks_its_own_samples_up(train, cached, world):
    split, teacher = train(), cached(train())
    expected = answers(teacher, split, view=1)
    for rank in range(world):
        for batch in split.batches(16, seed=2, view=1, shard=Shard(rank, world)):
            assert torch.equal(teacher.logits(batch, 1.0), expected[batch.indices])


def test_several_teachers_keep_an_answer_each(train, cached, tmp_path):
    split, models = train(), [made(seed=seed, scale=5.0) for seed in (1, 2)]
    plain = [OneTeacher(model) for model in models]
    kept = [cached(split, model, identity=str(place)) for place, model in enumerate(models)]
    for average in ("probabilities", "logits"):
        mean, cached_mean = (Ensemble(members, [1.0, 3.0], average) for members in (plain, kept))
        for temperature in (1.0, 4.0):
            for batch in split.batches(256, view=1):
                assert torch.equal(cached_mean.logits(batch, temperature), mean.logits(batch, temperature))
    assert len(folders(tmp_path)) == 2


def test_half_precision_rounds_and_takes_half_the_disk(train, cached, tmp_path):
    split = train(Augment())
    exact, rounded = answers(cached(split), split), answers(cached(split, dtype="float16"), split)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, exact.half().float())
    sizes = sorted((folder / "logits.npy").stat().st_size - 128 for folder in (tmp_path / "teacher").iterdir())
    assert sizes == [SAMPLES * CLASSES * 2, SAMPLES * CLASSES * 4]


def test_the_precision_of_training_is_that_of_the_answers(train, cached, tmp_path):
    split, plain = train(), OneTeacher(made())
    teacher = cached(split)
    full = answers(teacher, split, view=0)
    with torch.autocast("cpu", torch.bfloat16):
        half = answers(cached(split), split, view=0)
        assert torch.equal(half, answers(plain, split, view=0))
    assert not torch.equal(half, full)
    assert len(folders(tmp_path)) == 2


# Asked once


def test_each_input_is_asked_about_once(train, cached):
    split, model = train(), made()
    teacher = cached(split, model)
    for _ in range(3):
        answers(teacher, split, batch_size=16, view=0, seed=4)
    assert model.asked == [256, SAMPLES - 256]
    answers(teacher, split, view=1)
    assert len(model.asked) == 4
    again = made()
    assert torch.equal(answers(cached(split, again), split, view=1), answers(teacher, split, view=1))
    assert again.asked == []


def test_without_augmentation_one_view_is_all_there_is(train, cached, tmp_path):
    split, model = train(Augment()), made()
    teacher = cached(split, model, views=4)
    found = [answers(teacher, split, view=view, seed=view) for view in range(4)]
    assert all(torch.equal(each, found[0]) for each in found)
    assert len(folders(tmp_path)) == 1
    assert len(model.asked) == 2


def test_more_views_later_take_the_ones_that_are_there(train, cached):
    split, model = train(), made()
    answers(cached(split, views=1), split, view=0)
    answers(cached(split, model, views=8), split, view=0)
    assert model.asked == []


@pytest.mark.parametrize("change", [{"identity": "two"}, {"dtype": "float16"}])
def test_other_settings_have_other_answers(train, cached, change):
    split, model = train(), made(seed=7)
    answers(cached(split), split, view=0)
    answers(cached(split, model, **change), split, view=0)
    assert len(model.asked) == 2


def test_progress_counts_samples(train, cached):
    split, listener = train(), Listener()
    answers(cached(split, progress=listener), split, view=1)
    assert listener.done == [
        ("teacher's answers, view 2 of 2", 256, SAMPLES),
        ("teacher's answers, view 2 of 2", SAMPLES, SAMPLES),
    ]


# The same file whenever it is made


@pytest.mark.parametrize("kind", [Net, Drawing])
def test_when_a_view_is_computed_changes_no_bit(train, cached, tmp_path, kind):
    split, found = train(), []
    for order in ((0, 1), (1, 0)):
        torch.manual_seed(order[0])
        teacher = cached(split, made(kind))
        for view in order:
            answers(teacher, split, view=view)
        found.append({path: path.read_bytes() for path in (tmp_path / "teacher").rglob("*") if path.is_file()})
        shutil.rmtree(tmp_path / "teacher")
    assert len(found[0]) == 4
    assert found[0] == found[1]


def test_computing_takes_nothing_from_the_global_stream(train, cached):
    split = train()
    state = torch.get_rng_state()
    answers(cached(split, made(Drawing)), split, view=0)
    assert torch.equal(torch.get_rng_state(), state)


# Whole or not there


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "logits.npy").write_bytes((folder / "logits.npy").read_bytes()[:-4]), "are damaged"),
        (lambda folder: (folder / "logits.npy").write_bytes(b"\0" * 400), "are damaged"),
        (lambda folder: (folder / "record.json").write_text("{"), "are damaged"),
        (lambda folder: (folder / "record.json").write_text("[]"), "are damaged"),
        (lambda folder: (folder / "record.json").unlink(), "are not complete"),
        (lambda folder: (folder / "logits.npy").unlink(), "are not complete"),
    ],
)
def test_damaged_answers_are_computed_anew(train, cached, tmp_path, damage, told):
    split, listener = train(), Listener()
    expected = answers(cached(split), split, view=1)
    (name,) = folders(tmp_path)
    damage(tmp_path / "teacher" / name)
    assert torch.equal(answers(cached(split, progress=listener), split, view=1), expected)
    assert listener.notes[0] == f"the teacher's answers to view 2 {told}: computed anew"
    assert folders(tmp_path) == [name]


def test_answers_to_other_inputs_are_computed_anew(train, cached, tmp_path):
    """The key cannot know what the user's own code reads; the inputs themselves can."""
    listener = Listener()
    answers(cached(train(Augment())), train(Augment()))
    changed = np.load(tmp_path / "data" / "train_images.npy")
    np.save(tmp_path / "data" / "train_images.npy", 255 - changed)
    split = train(Augment())
    assert torch.equal(answers(cached(split, progress=listener), split), answers(OneTeacher(made()), split, view=0))
    assert listener.notes[0] == "the teacher's answers to view 1 are those to other inputs: computed anew"
    assert len(folders(tmp_path)) == 1


def test_a_failed_computation_leaves_nothing(train, cached, tmp_path):
    split = train()
    with pytest.raises(RuntimeError, match="no more answers"):
        answers(cached(split, made(Failing)), split, view=0)
    assert folders(tmp_path) == []


def test_a_teacher_too_large_for_the_memory_says_what_to_leave_out(train, cached, tmp_path):
    class Large(Net):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    split = train()
    with pytest.raises(
        StageError, match=r"^cache: out of memory while the teacher answers 256 samples at a time; leave cache out"
    ):
        answers(cached(split, made(Large)), split, view=0)
    assert folders(tmp_path) == []


def test_a_killed_computation_leaves_no_answers(train, cached, tmp_path):
    train()
    body = f"""
    import os, signal, sys
    from pathlib import Path
    import torch
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    torch.set_num_threads(1)
    import test_teacher_cache as shared
    from compress.config import TeacherCacheConfig
    from compress.config.data import ArraysConfig, Validation
    from compress.data.load import load_data
    from compress.training.cache import CachedTeacher
    from compress.training.teachers import OneTeacher

    class Killed(shared.Net):
        def forward(self, x):
            if self.asked:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().forward(x)

    validation = Validation.model_validate({{"from": "test", "size": 10}})
    root = Path({str(tmp_path)!r})
    config = ArraysConfig(kind="arrays", root=root / "data", augment=shared.MOVED, validation=validation)
    split = load_data(config, 0).train
    teacher = CachedTeacher(
        OneTeacher(shared.made(Killed)), split, TeacherCacheConfig(views=2), {{"teacher": "one"}}, root / "teacher",
        shared.Silent()
    )
    shared.answers(teacher, split, view=0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert all(name.startswith(".tmp-") for name in folders(tmp_path))  # what the next run sweeps away
    split, model = train(), made()
    assert torch.equal(answers(cached(split, model), split, view=0), answers(OneTeacher(made()), split, view=0))
    assert len(model.asked) == 2


def test_records_say_what_they_are_of(train, cached, tmp_path):
    answers(cached(train()), train(), view=1)
    (name,) = folders(tmp_path)
    record = json.loads((tmp_path / "teacher" / name / "record.json").read_bytes())
    assert record["shape"] == [SAMPLES, CLASSES]
    assert record["key"]["identity"] == {"teacher": "one"}
    assert (record["key"]["view"], record["key"]["dtype"]) == (1, "float32")
    assert name.startswith("view1-")


# In a training


@pytest.fixture
def trained(train, cached, tmp_path):
    """Trains a student; returns its weights and the losses of its epochs."""

    def make(augment, *, views=2, scratch="scratch", progress=None, is_cached=True):
        split = train(augment)
        data = DecisionData(tuple("abcde"), (), split, split.take(range(50)))
        teacher = (
            cached(split, made(seed=1, scale=4.0), views=views) if is_cached else OneTeacher(made(seed=1, scale=4.0))
        )
        losses = (LossEntry.model_validate({"kd": {}}), LossEntry.model_validate({"labels": {}}))
        config = RecoveryConfig(
            epochs=4, batch_size=32, learning_rate=0.05, precision="fp32", losses=losses, cache={"views": views}
        )
        place = Workplace("cpu", 0, tmp_path / scratch, progress or Silent())
        student = made(Student)
        rows = fit(Objective(student, losses, teacher), data, config, place)
        return student.state_dict(), [row["loss"] for row in rows]

    return make


@pytest.mark.parametrize("augment", [Augment(), MOVED])
def test_a_student_learns_the_same_from_a_cached_teacher(trained, augment):
    weights, losses = trained(augment)
    expected, expected_losses = trained(augment, scratch="other", is_cached=False)
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_a_killed_training_goes_on_with_the_same_bits(trained, tmp_path):
    with pytest.raises(KilledError):
        trained(MOVED, views=3, progress=Listener(dies_after=2))
    assert len(folders(tmp_path)) == 2  # the third view has never been asked for
    weights, losses = trained(MOVED, views=3)
    shutil.rmtree(tmp_path / "teacher")
    expected, expected_losses = trained(MOVED, views=3, scratch="other")
    assert losses == expected_losses
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


# Several processes


class Told(Group):
    """A process that hears what another one says through a queue."""

    def __init__(self, rank, line):
        super().__init__(Shard(rank, 2))
        self.line = line

    def told(self, value=None):
        if self.leads:
            self.line.put(value)
            return value
        return self.line.get(timeout=60)


def test_other_processes_take_what_the_first_computed(train, cached):
    split, idle, line = train(), made(), queue.Queue()
    expected = answers(cached(split, group=Told(0, line)), split, view=0)
    assert torch.equal(answers(cached(split, idle, group=Told(1, line)), split, view=0), expected)
    assert idle.asked == []


def test_a_process_that_does_not_see_the_answers_says_so(train, cached, tmp_path):
    line = queue.Queue()
    line.put(str(tmp_path / "elsewhere"))
    split = train()
    with pytest.raises(StageError, match=r"^cache: .*elsewhere: what the first process computed is not there"):
        answers(cached(split, group=Told(1, line)), split, view=0)


# Room


def test_the_room_is_told_before(train, cached):
    split, listener = train(), Listener()
    teacher = cached(split, views=4, progress=listener)
    answers(teacher, split, view=0)
    answers(teacher, split, view=1)
    (note,) = listener.notes
    assert note == (
        "the teacher's answers take 24.0 kB (300 samples × 5 classes × 4 views in float32) in the folder 'teacher' of the "
        "run; they stay there for other students until the folder is deleted"
    )


@pytest.mark.parametrize(("views", "there", "fits"), [(4, (), False), (3, (), True), (4, (0,), True), (4, (3,), True)])
def test_a_full_disk_is_noticed_after_the_first_batch(train, cached, tmp_path, monkeypatch, views, there, fits):
    split, model = train(), made()
    for view in there:
        answers(cached(split), split, view=view)
    free = 3 * SAMPLES * CLASSES * 4
    monkeypatch.setattr("compress.training.cache.shutil.disk_usage", lambda _: Disk(10 * free, 9 * free, free))
    teacher = cached(split, model, views=views)
    if fits:
        answers(teacher, split, view=1)
        return
    with pytest.raises(
        StageError,
        match=r"^cache: the teacher's answers take 24.0 kB \(300 samples × 5 classes × 4 views in float32\), the",
    ):
        answers(teacher, split, view=1)
    assert model.asked == [256]
    assert folders(tmp_path) == []


# Refused


def test_a_data_set_of_the_users_own_is_refused(tmp_path, cached):
    (tmp_path / "own.py").write_text(
        textwrap.dedent("""
        import numpy as np
        class Own:
            def __len__(self): return 40
            def __getitem__(self, i): return np.full((6, 9, 3), i, np.uint8), i % 2
        def load(): return {"train": Own()}
        """)
    )
    split = load_data(PythonConfig(kind="python", callable=f"{tmp_path / 'own.py'}:load"), 0).train
    with pytest.raises(StageError, match=r"^cache: .* with `data.kind: python` a data set object may make"):
        cached(split)


def test_mixed_inputs_are_refused(train, cached):
    split = train()
    batch = next(split.batches(16, view=0))
    mixed = batch._replace(labels=torch.full((16, CLASSES), 1 / CLASSES))
    with pytest.raises(StageError, match=r"^cache: with mixed inputs \(mixup, cutmix\) no input comes twice"):
        cached(split).logits(mixed, 1.0)


def test_inputs_of_no_view_are_a_mistake(train, cached):
    split = train()
    with pytest.raises(AssertionError, match="without a view"):
        answers(cached(split), split, seed=1)


def test_answers_too_large_for_half_precision_are_named(train, cached, tmp_path):
    split = train()
    teacher = cached(split, made(scale=1e6), dtype="float16")
    with pytest.raises(StageError, match=r"^cache.dtype: the teacher answers [0-9.e+]+, which float16 cannot hold"):
        answers(teacher, split, view=0)
    assert folders(tmp_path) == []
