"""A run whose rows come from a Ray Data pipeline: two ranks share each epoch."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import pytest

from tests.launches import launched

pytestmark = pytest.mark.slow


def test_two_ranks_share_the_rows_of_each_epoch(tmp_path: Path) -> None:
    launched(
        tmp_path,
        "experiment=mlp",
        "data.train._target_=raytrainer.data.RayDataset",
        "~data.train.split",
        "+data.train.dataset={_target_: probes.pipeline, _partial_: true, rows: 402}",
        "+data.train.shuffle_rows=50",
        "+data.train.transform._target_=probes.NotesRows",
        "data.val=null",
        "data.global_batch_size=100",
        "trainer.max_steps=6",
        "trainer.max_epochs=null",
        "scaling.num_workers=2",
        "+scaling.resources_per_worker={CPU: 0.5}",
        "tracking.log_model=false",
    ).exits(0)
    ranks = [[json.loads(line) for line in file.read_text().splitlines()] for file in (tmp_path / "rows").iterdir()]
    assert len(ranks) == 2
    for epoch, steps in ((0, 4), (1, 2)):
        parts = [[rows for at, rows in rank if at == epoch][:steps] for rank in ranks]
        assert [len(rows) for rows in chain(*parts)] == [50] * 2 * steps
        seen = list(chain(*chain(*parts)))
        assert len(set(seen)) == 100 * steps
        assert set(seen) <= set(range(402))
        assert parts[0][0] != sorted(parts[0][0])
