"""Does a run that was killed at any moment end at the same bits?

A small pipeline (train, then distil with augmentation, a cache of the teacher's answers, AdamW, a moving average and early
stopping) runs once undisturbed. Then, as often as asked, it starts in a new folder, is killed by SIGKILL after a random
time, and is started again until it ends; each start but the last may be killed once more. What counts is the digest of the
last checkpoint, which covers every weight.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compress.files import readable_json, write_file
from compress.surroundings import git_revision, machine_record

REPOSITORY = Path(__file__).resolve().parent.parent
PIPELINE = """\
name: killed
threads: 1
data: {kind: digits, image_size: 32, channels: 3, augment: {crop: 2}}
model: {factory: "cifar:resnet20"}
stages:
  - train: {epochs: 4, early_stopping: 3}
  - distill:
      student: {factory: "classic:lenet5", kwargs: {in_channels: 3, image_size: 32}}
      epochs: 6
      optimizer: adamw
      learning_rate: 0.002
      ema: 0.99
      cache: {views: 3}
bench: {latency: null}
"""


def digest(runs: Path) -> str:
    results = json.loads((runs / "killed" / "results.json").read_bytes())
    return str(results["rows"][-1]["digest"])


def start(file: Path, runs: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "compress", "run", str(file), "--runs", str(runs)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(process: subprocess.Popen[bytes]) -> None:
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"the run ended with {process.returncode}:\n{output.decode()}")


def killed_run(file: Path, runs: Path, whole_seconds: float, draw: random.Random) -> list[float]:
    """Run until it ends, killed up to three times on the way; after how many seconds each time."""
    kills: list[float] = []
    for _ in range(draw.randint(1, 3)):
        process, after = start(file, runs), draw.uniform(0.05, 0.95) * whole_seconds
        try:
            process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills.append(after)
    finished(start(file, runs))
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    draw, rows = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory(prefix="compress-kill-") as folder:
        file = Path(folder) / "killed.yaml"
        file.write_text(PIPELINE, encoding="utf-8")
        started = time.perf_counter()
        finished(start(file, Path(folder) / "undisturbed"))
        whole = time.perf_counter() - started
        wanted = digest(Path(folder) / "undisturbed")
        print(f"undisturbed: {whole:.1f} s, {wanted[:16]}")
        for number in range(arguments.repeats):
            runs = Path(folder) / f"run{number}"
            kills = killed_run(file, runs, whole, draw)
            same = digest(runs) == wanted
            rows.append({"killed_after_seconds": [round(after, 2) for after in kills], "same": same})
            moments = ", ".join(f"{after:.1f} s" for after in kills) or "nothing: it had ended"
            print(f"{number + 1}: killed after {moments}: {'same digest' if same else 'ANOTHER DIGEST'}", flush=True)
    equal = sum(bool(row["same"]) for row in rows)
    kills_in_all = sum(len(row["killed_after_seconds"]) for row in rows)  # type: ignore[arg-type]
    print(f"{equal} of {len(rows)} with the same digest, {kills_in_all} kills")
    if arguments.json:
        content = {
            "command": shlex.join(["python", "benchmarks/kill_and_resume.py", *sys.argv[1:]]),
            "git_revision": git_revision(REPOSITORY),
            "machine": machine_record().model_dump(mode="json"),
            "digest": wanted,
            "seconds": round(whole, 1),
            "rows": rows,
        }
        write_file(arguments.json, readable_json(content))
    if equal < len(rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
