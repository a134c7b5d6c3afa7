"""The documents: every key described, every link alive, the README short enough to be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
