"""The command line: what people see, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from report_examples import example_results
from rich.console import Console

from compress import cli
from compress.errors import CompressError
from compress.events import EpochResult
from compress.results import Budget
from compress.terminal.console import Terminal, literal, make_console, results_table

FILE = """\
name: tiny
data: {kind: digits}
model: {factory: "cifar:resnet20"}
stages:
  - train: {epochs: 1}
  - prune:
budget: {accuracy_drop: 1}
"""
COMMANDS = ("run", "validate", "inspect", "bench", "robustness", "compare", "report", "schema")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    Path("p.yaml").write_text(FILE)


@pytest.fixture
def compress(monkeypatch, capsys):
    """Runs a command in this process: exit code, standard output, standard error."""

    def compress(*words):
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return (0 if code is None else code, *capsys.readouterr())

    return compress


def process(*words, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", *words], capture_output=True, text=True, timeout=100, check=False, **options
    )


# --- starting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("--help",), ("validate", "p.yaml"), ("schema",), ("validate", "nope.yaml")])
def test_neither_torch_nor_onnxruntime_is_imported(words):
    code = (
        "import sys; from compress.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'torchvision', 'onnx', 'onnxruntime', 'sklearn', 'numpy'} & set(sys.modules)))"
    )
    done = process("-c", code, *words)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_module_and_script_are_the_same_command():
    done = process("-m", "compress", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, "compress 0.1.0\n", "")
    (script,) = entry_points(group="console_scripts", name="compress")
    assert script.load() is cli.main


@pytest.mark.parametrize("words", [("--help",), *((command, "--help") for command in COMMANDS)])
def test_help_works_everywhere(compress, words):
    code, out, err = compress(*words)
    assert (code, err) == (0, "")
    assert "Usage: compress" in out
    if len(words) == 1:
        assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rnu",), "No such command 'rnu'. Did you mean 'run'?"),
        (("run",), "Missing argument 'FILE'."),
        (("validate", "p.yaml", "--sett", "a=1"), "No such option: --sett"),
        (("report", "a", "b"), "unexpected extra argument"),
    ],
)
def test_wrong_words_end_with_code_2(compress, words, message):
    code, out, err = compress(*words)
    assert (code, out) == (2, "")
    assert message in err


# --- validate and schema ---------------------------------------------------------------------------------------------


def test_validate_shows_the_plan(compress):
    code, out, err = compress("validate", "p.yaml")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["p.yaml:", "valid"],
        ["stage", "plan", "why"],
        ["0", "source", "runs", "it", "has", "not", "run", "yet"],
        ["1", "train", "runs", "takes", "what", "'source'", "makes"],
        ["2", "prune", "runs", "takes", "what", "'train'", "makes"],
    ]
    assert not Path("runs").exists()


def test_validate_takes_overrides_and_until(compress):
    code, out, _ = compress("validate", "p.yaml", "--set", "stages.prune.target.macs=0.4", "--until", "train")
    assert code == 0
    assert "prune" not in out


def test_user_errors_are_lines_on_stderr_and_code_2(compress):
    code, out, err = compress("validate", "p.yaml", "--set", "sed=1", "--set", "seed=x")
    assert (code, out) == (2, "")
    second, first = err.splitlines()
    assert first.startswith("error: --set: sed: unknown key (allowed: name, seed, ")
    assert second == 'error: --set: seed: must be a whole number, got "x"'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("validate", "p.yml"), "error: p.yml: no such file; did you mean 'p.yaml'?"),
        (("run", "elsewhere/p.yaml"), "error: elsewhere/p.yaml: no such file"),
        (("validate", "."), "error: .: is a folder, not a pipeline file; in it are p.yaml"),
        (
            ("validate", "p.yaml", "--until", "x"),
            "error: --until: there is no stage 'x' (there are source, train, prune)",
        ),
        (("report", "nowhere"), "error: nowhere/results.json: no such file; is this the folder of a finished run?"),
        (("report", "p.yaml"), "error: p.yaml/results.json: cannot be read: Not a directory"),
    ],
)
def test_each_user_error_is_one_message(compress, words, message):
    assert compress(*words) == (2, "", message + "\n")


def test_long_messages_are_not_wrapped(compress):
    name = "x" * 300
    _, _, err = compress("validate", f"{name[:200]}.yaml", "--set", f"{name}=1")
    assert len(err.splitlines()) == 1
    Path("p.yaml").write_text(FILE + f"{name}: 1\n")
    _, _, err = compress("validate", "p.yaml")
    assert len(err.splitlines()) == 1
    assert name in err


@pytest.mark.parametrize(
    "name", ["[red]long[/].yaml", "[/].yaml", "with:smile:.yaml", "\\[bold].yaml", "long\x1b[31m.yaml"]
)
def test_names_are_shown_as_they_are(compress, name):
    shown = name.replace("\x1b", "�")
    code, out, err = compress("validate", name)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {shown}: no such file")
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(FILE)
    code, out, _ = compress("validate", name)
    assert (code, out.splitlines()[0]) == (0, f"{shown}: valid")


def test_plan_reasons_are_not_cut_in_logs(compress):
    Path("p.yaml").write_text(FILE.replace("train: {epochs: 1}", "train: {epochs: 1}\n" + "  - prune:\n" * 9))
    _, out, _ = compress("validate", "p.yaml", "--runs", "r" * 200)
    assert len(out.splitlines()) == 14


def test_schema_is_json_for_editors(compress):
    code, out, err = compress("schema")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(document["required"]) == {"name", "data", "model"}
    assert "source" not in document["$defs"]["Validation"]["properties"]


@pytest.mark.parametrize("of", ["results", "bench", "compare"])
def test_results_have_a_schema_that_describes_what_a_name_does_not(compress, of):
    code, out, err = compress("schema", of)
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["properties"]["version"]["const"] >= 1
    latency = {"results": "Latency", "bench": "Latency", "compare": "Time"}[of]
    assert document["$defs"][latency]["description"]
    described = [field for field in document["properties"].values() if "description" in field]
    assert len(described) >= 3


def test_bugs_keep_their_traceback(monkeypatch):
    def broken(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr("compress.config.load_pipeline", broken)
    monkeypatch.setattr(sys, "argv", ["compress", "validate", "p.yaml"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


# --- results ---------------------------------------------------------------------------------------------------------


def results(drop=0.5, name="tiny"):
    """A run of two rows, the second with an awkward name, that loses these points of validation accuracy."""
    one = example_results(name, stages=("source", "export"), samples=400)
    source, export = one.rows
    changed = {"points": -drop, "low": -drop - 1, "high": -drop + 1}
    difference = export.comparison.validation.model_copy(update=changed)
    comparison = export.comparison.model_copy(update={"validation": difference})
    export = export.model_copy(update={"stage": "[red]prune", "comparison": comparison})
    budget = Budget(accuracy_drop=1.0, difference=difference, met=drop <= 1.0)
    return one.model_copy(update={"rows": (source, export), "budget": budget})


def test_report_is_written_again_from_results(compress):
    folder = Path("runs") / "[b]tiny"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(results().model_dump_json())
    code, out, err = compress("report", folder)
    assert (code, err) == (0, "")
    assert out == f"{folder}/report.md\n{folder}/report.html\n"
    assert "3.41 MB" in (folder / "report.md").read_text()
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON: "),
        (b"[" * 100_000, "is not valid JSON: "),
        (b"\xff", "is not UTF-8 text"),
        (b"[]", "is of version None; this program reads version 2"),
        (b'{"version": 1}', "is of version 1; this program reads version 2"),
        (b'{"version": 2}', "name: field required"),
    ],
)
def test_damaged_results_are_a_user_error(compress, content, message):
    Path("results.json").write_bytes(content)
    code, out, err = compress("report", ".")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: results.json: {message}")
    assert len(err.splitlines()) == 1


def pretend(monkeypatch, outcome):
    """Let `run` do nothing but return or raise."""
    calls = []

    def run(pipeline, **options):
        calls.append((pipeline, options))
        options["progress"].note("half way [bold]")
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr("compress.pipeline.run", run)
    return calls


def test_run_shows_the_table_and_where_things_are(compress, monkeypatch):
    calls = pretend(monkeypatch, results())
    code, out, err = compress(
        "run",
        "p.yaml",
        "--runs",
        "[b]r",
        "--until",
        "prune",
        "--set",
        "seed=3",
        "--set",
        "model.weights=/secret/w.pth",
        "--fresh",
    )
    assert (code, err) == (0, "")
    assert "[red]prune" in out
    assert "against 'source': 23.0× smaller, 7.2× faster" in out
    assert "report: [b]r/tiny/report.html\nartifact: [b]r/tiny/dist/model.int8.onnx\n" in out
    assert max(map(len, out.splitlines())) < 200
    ((pipeline, options),) = calls
    assert pipeline.seed == 3
    assert (options["runs"], options["until"], options["fresh"]) == (Path("[b]r"), "prune", True)
    assert options["command"] == "compress run p.yaml --set seed=3 --set model.weights=w.pth --until prune"


def test_a_missed_budget_is_code_1(compress, monkeypatch):
    pretend(monkeypatch, results(drop=1.5))
    code, out, err = compress("run", "p.yaml")
    assert code == 1
    assert err == (
        "budget missed: 1.50 points of validation accuracy lost (95 % interval 0.50 to 2.50), "
        "budget.accuracy_drop allows 1\n"
    )
    assert "report: " in out


def test_an_interrupt_is_code_130_and_says_how_to_go_on(compress, monkeypatch):
    pretend(monkeypatch, KeyboardInterrupt())
    code, out, err = compress("run", "p.yaml", "--runs", "[b]r")
    assert code == 130
    assert out == "  half way [bold]\n"
    assert err == "\nstopped; the same command goes on from [b]r/tiny\n"


def test_an_interrupt_of_any_other_command_is_code_130_too(compress, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.config.load_pipeline", stopped)
    code, _, err = compress("validate", "p.yaml")
    assert code == 130
    assert "Traceback" not in err


def test_a_user_error_during_a_run_is_code_2(compress, monkeypatch):
    pretend(monkeypatch, CompressError("two\nlines [red]"))
    assert compress("run", "p.yaml") == (2, "  half way [bold]\n", "error: two\nlines [red]\n")


def test_a_comparison_is_on_disk_before_it_is_shown(compress, monkeypatch):
    def broken(compared):
        raise CompressError("the pipe is closed")

    Path("tiny").mkdir()
    Path("tiny/results.json").write_text(results().model_dump_json())
    words = ("compare", "tiny", "--json", "out/c.json", "--html", "out/c.html")
    code, out, err = compress(*words)
    assert (code, err) == (0, "")
    assert out.endswith("page: out/c.html\njson: out/c.json\n")
    pages = [path.read_text() for path in sorted(Path("out").iterdir())]
    assert pages[0].startswith("<!DOCTYPE html>")
    assert json.loads(pages[1])["kind"] == "compare"
    shutil.rmtree("out")
    monkeypatch.setattr("compress.terminal.compare.compare_tables", broken)
    assert compress(*words) == (2, "", "error: the pipe is closed\n")
    assert sorted(path.name for path in Path("out").iterdir()) == ["c.html", "c.json"]


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_refuses_what_is_no_checkpoint(compress):
    assert compress("inspect", "nope") == (2, "", "error: nope: is no checkpoint (there is no checkpoint.json in it)\n")
    Path("checkpoint.json").write_text("{}")
    code, _, err = compress("inspect", ".")
    assert (code, err) == (2, "error: checkpoint.json: has format version None; this program reads version 2\n")
    code, _, err = compress("inspect", "p.yaml")
    assert (code, err) == (2, "error: p.yaml/checkpoint.json: cannot be read: Not a directory\n")


def test_inspect_shows_a_checkpoint(compress, tmp_path):
    from compress import checkpoint
    from compress.config import ModelConfig
    from compress.data.base import Input
    from compress.manifest import HistoryEntry
    from compress.stages import source

    draft = source.make(ModelConfig(factory="cifar:resnet20"), seed=0)
    inputs = (Input("input", (3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3), Input("[i]ids", (7,), "int64"))
    classes = ("[red]one", "two\x1b[31m")
    history = (HistoryEntry(stage="[b]source", parent=None, settings={}, seconds=1.5, warnings=("[/] look",)),)
    folder = tmp_path / "[b]c"
    checkpoint.save(folder, draft, inputs=inputs, classes=classes, history=history, key={})
    code, out, err = compress("inspect", folder)
    assert (code, err) == (0, "")
    for text in (
        str(folder),
        "cifar:resnet20 {}",
        "input (3, 32, 32), float32, mean (0.5, 0.5, 0.5), std (0.25, 0.25, 0.25)",
        "[i]ids (7,), int64, not normalised",
        "[red]one, two�[31m",
        "[b]source",
        "warning: [/] look",
        "edits: none",
        "model.safetensors",
        "metrics: not measured",
    ):
        assert text in out
    parameters = next(line for line in out.splitlines() if line.startswith("parameters"))
    assert parameters.split()[1].replace(",", "").isdecimal()


# --- the console -----------------------------------------------------------------------------------------------------


def events(progress):
    progress.stage_started("[red]train", 1, 3, "changed: a: [1] → [/]")
    progress.work("training :smile:", 1, 10, "x")
    progress.work("training :smile:", 10, 10)
    progress.epoch(
        EpochResult(
            epoch=1,
            epochs=12,
            loss=0.5,
            learning_rate=0.1,
            validation_loss=0.4,
            validation_percent=91.25,
            seconds=75.0,
            samples_per_second=1234.5,
        )
    )
    progress.note("[/] " + "long " * 60)
    progress.warn("[b]beware\x1b[31m")
    progress.stage_finished("[red]train", 3725.0, "100 % [x]")
    progress.stage_cached("b", 2, 3)


def test_a_log_has_one_plain_line_per_event(capsys):
    with Terminal(make_console()) as progress:
        events(progress)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "1/3 [red]train  changed: a: [1] → [/]",
        "  epoch   1/12  loss 0.5000  validation  91.25 %  1,234 samples/s  1 min 15 s, 13 min 45 s left",
        "  [/] " + "long " * 60,
        "  warning: [b]beware�[31m",
        "  [red]train done in 1 h 02 min: 100 % [x]",
        "2/3 b  cached",
    ]


def test_a_terminal_shows_the_same_and_ends_clean(tmp_path):
    path = tmp_path / "screen"
    with path.open("w") as stream:
        console = Console(file=stream, force_terminal=True, width=100, highlight=False, emoji=False)
        with Terminal(console) as progress:
            events(progress)
            progress.work("unknown [/]", 3, 0)
    text = path.read_text()
    assert "[red]train" in text
    assert "beware�" in text
    assert "\x1b[?25h" in text  # the cursor comes back


def test_long_work_shows_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("compress.terminal.console.time.monotonic", lambda: now[0])
    with Terminal(make_console()) as progress:
        for step in range(1, 41):
            now[0] += 1.0
            progress.work("images", step, 40)
    assert capsys.readouterr().out.splitlines() == ["  images: 17 of 40 1.1/s", "  images: 33 of 40 1.0/s"]


def test_results_of_one_row_and_without_latency(capsys):
    one = results()
    only = one.model_copy(update={"rows": (one.rows[0].model_copy(update={"latency": ()}),), "repeats": ()})
    make_console().print(results_table(only))
    out = capsys.readouterr().out
    assert "source (reference)" in out
    assert "smaller" not in out


def test_literal_keeps_text_and_takes_away_its_power():
    assert literal("a [red]b[/] ünï → ×\nc\td") == "a \\[red]b\\[/] ünï → ×\nc\td"
    assert literal("\x1b[31m\x07") == "�[31m�"
    console = make_console()
    for text in ("[/]", "[red]", "\\[b]", "[link=x]", ":smile:", "[[b]]"):
        with console.capture() as capture:
            console.print(literal(text), soft_wrap=True)
        assert capture.get() == text + "\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_output_into_a_closed_pipe_is_no_traceback():
    with subprocess.Popen(
        [sys.executable, "-m", "compress", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        child.stdout.close()
        err = child.stderr.read()
        child.wait(timeout=60)
    assert "Traceback" not in err
    assert child.returncode in (1, -signal.SIGPIPE)
