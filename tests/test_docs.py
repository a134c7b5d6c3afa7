"""The documents: every key is described, every link works, and the README is short enough to be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from raytrainer.config import check_targets, compose
from raytrainer.config.schema import Experiment, known_keys, section_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])


def test_every_key_of_the_schema_is_described() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    sections = {f.name for f in Experiment.__dataclass_fields__.values() if section_of(f)}
    missing = [k for k in known_keys() if k not in sections and f"`{k}`" not in text]
    assert not missing


def test_nothing_is_described_that_is_no_key() -> None:
    text = (ROOT / "docs/configuration.md").read_text()
    rows = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
    described = {k for row in rows for k in re.findall(r"`([^`]+)`", row)}
    assert not described - set(known_keys())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tests_that_are_named_are_there(page: Path) -> None:
    named = set(re.findall(r"\btests/[a-z_/]+\.py\b", page.read_text()))
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_the_readmes_own_experiment_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert text is not None
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/mine.yaml").write_text(text[1])
    (tmp_path / "mypackage.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self, width: int): super().__init__(width, 1)\n"
        "def loss(model, batch): return {'loss': model(batch).mean()}\n"
        "class Data:\n"
        "    def __init__(self, split: str): pass\n"
        "class Callback:\n"
        "    def on_step_end(self, trainer, event): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    e = compose(["experiment=mine"], config_dir=tmp_path / "conf").experiment
    check_targets(e)
    assert e.model == {"_target_": "mypackage.Net", "width": 64}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
