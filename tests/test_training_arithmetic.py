"""How training computes: statistics of batch norms, precision, memory layout, the compiler."""

import copy

import pytest
import torch
from torch import nn
from training_cases import Recorder, Trainer, bits, linear, same, vectors

from compress.errors import TrainingError
from compress.models.factory import Arch, create
from compress.training.batchnorm import check_sync, synchronised
from compress.training.precision import resolved_precision

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(tiny):
    return lambda seed=0, **kwargs: create(Arch(tiny.factory, kwargs), seed=seed)


@pytest.fixture
def train(tmp_path, tiny_data):
    return Trainer(tmp_path, tiny_data.for_decisions())


# Batch norms


def test_frozen_batch_norms_keep_their_statistics_and_learn_their_weights(make, train):
    model = make()
    train(model, epochs=1)  # statistics of its own
    before = bits(model)
    train(model, batchnorm="frozen")
    after = bits(model)
    buffers = {name for name, _ in model.named_buffers()}
    assert len(buffers) == 6
    assert all(torch.equal(before[name], after[name]) == (name in buffers) for name in before)


@pytest.mark.parametrize(
    ("device", "processes", "message"), [("cpu", 2, "needs CUDA devices"), ("cuda", 1, "there is one; use 'train'")]
)
def test_synchronised_statistics_need_several_gpus(device, processes, message):
    with pytest.raises(TrainingError, match=f"batchnorm: 'sync' .*{message}"):
        check_sync(device, processes)


def test_synchronised_statistics_are_refused_before_training(make, train):
    recorder = Recorder()
    with pytest.raises(TrainingError, match="'sync' needs CUDA"):
        train(make(), batchnorm="sync", progress=recorder)
    assert recorder.work_done == []


def test_synchronised_batch_norms_keep_hooks_and_become_what_they_were(make):
    model, inputs, calls = make().eval(), torch.randn(2, 1, 12, 8), []
    model.bn1.register_forward_hook(lambda *_: calls.append(type(model.bn1)))
    expected, before = model(inputs), bits(model)
    with synchronised(model):
        assert torch.equal(model(inputs), expected)  # alone, in evaluation mode, it is the same norm
    assert calls == [nn.BatchNorm2d, nn.SyncBatchNorm]
    assert type(model.bn1) is type(model.bn2) is nn.BatchNorm2d
    assert vars(model.bn1).keys() == vars(nn.BatchNorm2d(16)).keys()
    assert same(before, bits(model))


def test_batch_norms_with_a_forward_pass_of_their_own_are_not_synchronised():
    class Active(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(nn.BatchNorm2d(3), Active(3))
    with pytest.raises(TrainingError, match=r"batch norms of torch only, not Active"), synchronised(model):
        pass
    assert type(model[0]) is nn.BatchNorm2d


# Arithmetic


class Seen(nn.Linear):
    """Keeps what its answers are made of, in training and in evaluation mode."""

    def __init__(self):
        super().__init__(5, 3)
        self.seen = set()

    def forward(self, x):
        answer = super().forward(x)
        self.seen.add((self.training, answer.dtype))
        return answer


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_training_computes_in_the_precision_asked_for_and_validation_in_float32(train, precision, dtype):
    model = Seen()
    train(model, data=vectors(), precision=precision)
    assert model.seen == {(True, dtype), (False, torch.float32)}
    assert model.weight.dtype == torch.float32


def test_half_precision_on_the_cpu_is_refused_before_training(make, train):
    recorder = Recorder()
    with pytest.raises(TrainingError, match="precision: fp16 needs a CUDA device"):
        train(make(), precision="fp16", progress=recorder)
    assert recorder.work_done == []


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_what_the_hardware_multiplies(monkeypatch, fast, precision):
    monkeypatch.setattr("compress.training.precision.has_fast_bfloat16", lambda: fast)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: fast and not including_emulation)
    assert resolved_precision("auto", "cpu") == resolved_precision("auto", "cuda") == precision
    assert resolved_precision("fp32", "cpu") == "fp32"


class Layout(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.seen = set()

    def forward(self, x):
        answer = self.convolution(x)
        if self.training:
            self.seen.add(answer.is_contiguous(memory_format=torch.channels_last))
        return answer.mean((2, 3))


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_have_the_layout_asked_for(train, channels_last):
    model = Layout()
    train(model, epochs=1, channels_last=channels_last)
    assert model.seen == {channels_last}
    assert model.convolution.weight.is_contiguous()


# Compiling


@pytest.mark.slow
def test_a_compiled_model_learns_the_same_and_keeps_its_names(make, train):
    plain, compiled = make(), make()
    names = list(compiled.state_dict())
    settings = {"epochs": 2, "channels_last": False, "ema": 0.5}
    rows = train(plain, **settings)
    compiled_rows = train(compiled, compile=True, **settings)
    for one, other in zip(rows, compiled_rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-2)
    assert list(compiled.state_dict()) == names
    # Afterwards it is a plain model again: it can be copied, hooked and called without a compiler.
    assert copy.deepcopy(compiled).state_dict().keys() == compiled.state_dict().keys()
    assert compiled._compiled_call_impl is None


def test_compiling_is_asked_for_once_and_for_training_only(train, monkeypatch):
    """The compiler itself takes a while: another test runs it."""
    compiled = []

    def compile_(call, **_):
        def run(*args):
            compiled.append(torch.is_grad_enabled())
            return call(*args)

        return run

    monkeypatch.setattr("torch.compile", compile_)
    monkeypatch.setattr("torch.compiler.set_stance", lambda stance: pytest.MonkeyPatch.context())
    model, plain = linear(), linear()
    train(model, data=vectors(), compile=True)
    train(plain, data=vectors())
    assert compiled.count(True) == 6
    assert same(bits(model), bits(plain))
    assert model._compiled_call_impl is None
