"""Run raytrainer with several versions of Ray and MLflow, and write what works as a table.

    python -m tests.matrix [--ray VERSION …] [--mlflow VERSION …] [--folder FOLDER] [--write docs/versions.md]

Each version gets a virtual environment that shares all other packages with this one. Clusters listen on loopback ports
of their own and are stopped by their process id. Exit code 1: something does not work that should.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.matrix.environments import ROOT, Environment, Head, make, this_environment

RAY = ("2.57.1", "2.58.1", "2.59.0", "2.60.0")
MLFLOW = ("3.16.1", "3.17.2")
_LIMIT_S = 900.0
_BEGIN, _END = "<!-- matrix: begin -->", "<!-- matrix: end -->"


@dataclass
class Row:
    """The results of one version: check → `yes`, or what went wrong; and the warnings of its launches."""

    name: str
    measured: str
    results: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Bench:
    """Runs the checks of one environment in a folder of its own."""

    environment: Environment
    row: Row
    folder: Path

    @property
    def home(self) -> Path:
        """A home directory without a token for clusters."""
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return home

    def run(self, name: str, environment: Environment, *command: str, code: int = 0, says: Sequence[str] = ()) -> None:
        """Run `python -m COMMAND` and record under `name` whether it ends with the exit code and says the texts."""
        log = self.folder / f"{name.replace(' ', '-')}.log"
        began = time.monotonic()
        print(f"{self.row.name}: {name} …", end=" ", flush=True)
        with log.open("w") as output:
            try:
                ended = subprocess.run(
                    [environment.python, "-m", *command],
                    cwd=self.folder,
                    env={**environment.variables, "HOME": str(self.home)},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=_LIMIT_S,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                ended = -1
        text = log.read_text()
        absent = [part for part in says if part not in text]
        if ended == code and not absent:
            result = "yes"
        elif ended == -1:
            result = f"no: not ended after {_LIMIT_S:g} s"
        else:
            result = f"no: exit code {ended}" + (f", without {absent[0]!r}" if absent else "")
            print("\n" + text[-3000:])
        self.row.results[name] = result
        anonymous = re.sub(r"http://127\.0\.0\.1:\d+", "ADDRESS", text)
        warnings = re.findall(r"^(?:.*: )?warning: (.*)$", anonymous, re.MULTILINE)
        self.row.warnings += [w for w in warnings if w not in self.row.warnings]
        print(f"{result} ({time.monotonic() - began:.0f} s)", flush=True)

    def launch(self, name: str, environment: Environment, *arguments: str, **expected: Any) -> None:
        """Launch an experiment in the environment, with its runs and its tracking database in the folder."""
        store = [f"storage_path={self.folder / 'runs'}", f"tracking.tracking_uri=sqlite:///{self.folder / 'mlflow.db'}"]
        self.run(name, environment, "raytrainer", *arguments, *store, **expected)


def check_alone(bench: Bench) -> None:
    """Contracts, a run of two workers, its resumption and a sweep, each on a local Ray."""
    here = bench.environment
    bench.run(
        "contracts", here, "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", str(ROOT / "tests/contracts")
    )
    bench.launch("run", here, "experiment=smoke", "name=run", "scaling.num_workers=2")
    bench.run("resume", here, "raytrainer", "resume", "run", "trainer.max_steps=30")
    trials = ("sweep=asha", "sweep.num_samples=3", "optimizer.lr=interval(0.01,0.1)", "trainer.eval_every_n_steps=5")
    bench.launch("sweep", here, "-m", "experiment=smoke", "name=sweep", *trials)


def check_clusters(bench: Bench, newest: Environment) -> None:
    """Jobs within a version and in both directions between it and the newest one, and a cluster that is joined."""
    here = bench.environment
    with Head(here, bench.folder / "head") as head:
        own, joined = f"cluster.address={head.dashboard}", f"cluster.address={head.gcs}"
        bench.launch("job", here, "experiment=smoke", "name=job", "cluster=job", own)
        if here == newest:
            bench.launch("existing", here, "experiment=smoke", "name=joined", "cluster=existing", joined)
            return
        bench.launch("job from the newest", newest, "experiment=smoke", "name=from-newest", "cluster=job", own)
        refusal = {"code": 2, "says": ["cluster=job", f"pip install {here.name.replace(' ', '==')}"]}
        name = "existing is refused"
        bench.launch(name, newest, "experiment=smoke", "name=other", "cluster=existing", joined, **refusal)
    with Head(newest, bench.folder / "newest-head") as head:
        there = f"cluster.address={head.dashboard}"
        bench.launch("job to the newest", here, "experiment=smoke", "name=to-newest", "cluster=job", there)


def table(rows: Sequence[Row]) -> str:
    """Return the results as Markdown, a row for each version."""
    names = list(dict.fromkeys(name for row in rows for name in row.results))
    lines = [f"| version | {' | '.join(names)} | measured |", "|---|" + "---|" * (len(names) + 1)]
    lines += [
        f"| {row.name} | {' | '.join(row.results.get(name, '–') for name in names)} | {row.measured} |" for row in rows
    ]
    for row in rows:
        lines += ["", f"Warnings with {row.name}:", ""] if row.warnings else []
        lines += [f"- {text}" for text in row.warnings]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix")
    parser.add_argument("--ray", nargs="*", default=list(RAY), metavar="VERSION")
    parser.add_argument("--mlflow", nargs="*", default=list(MLFLOW), metavar="VERSION")
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="for environments, logs and results")
    parser.add_argument("--write", type=Path, help="a Markdown file whose table is replaced")
    chosen = parser.parse_args(arguments)
    folder: Path = chosen.folder.resolve()
    benches: list[Bench] = []

    def bench(library: str, number: str) -> Bench:
        is_this = number == version(library)
        environment = this_environment(library, number) if is_this else make(folder, library, number)
        place = folder / "runs" / time.strftime("%Y%m%d-%H%M%S") / environment.name.replace(" ", "-")
        place.mkdir(parents=True)
        benches.append(Bench(environment, Row(environment.name, date.today().isoformat()), place))
        return benches[-1]

    for number in chosen.mlflow:
        check_alone(bench("mlflow", number))
        _keep(folder, benches[-1].row)
    newest = this_environment("ray", version("ray"))
    for number in chosen.ray:
        own = bench("ray", number)
        check_alone(own)
        check_clusters(own, newest)
        _keep(folder, own.row)
    text = table(_kept(folder))
    print(text)
    if chosen.write:
        _replace(chosen.write, f"Measured with `make matrix` and Python {sys.version.split()[0]}.\n\n{text}")
    return int(any(result != "yes" for b in benches for result in b.row.results.values()))


def _keep(folder: Path, row: Row) -> None:
    """Keep the results of a version, so that a matrix can be measured in parts."""
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / f"{row.name}.json").write_text(json.dumps(asdict(row)))


def _kept(folder: Path) -> list[Row]:
    """Return the newest results of each supported version."""
    names = [*(f"ray {number}" for number in RAY), *(f"mlflow {number}" for number in MLFLOW)]
    files = [folder / "results" / f"{name}.json" for name in names]
    return [Row(**json.loads(file.read_text())) for file in files if file.exists()]


def _replace(file: Path, text: str) -> None:
    before, begin, rest = file.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    if not begin:
        raise SystemExit(f"{file} has no {_BEGIN}")
    file.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{after}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
