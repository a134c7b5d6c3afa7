"""The trials of a sweep run on the nodes that `scaling` selects."""

from __future__ import annotations

from typing import Any

import pytest
from ray.air.execution.resources import request

from raytrainer import preflight, ray_internals
from raytrainer.config import compose


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The placement groups that Tune requests from Ray."""
    groups: list[dict[str, Any]] = []

    def placement_group(
        bundles: Any, strategy: str = "PACK", *, bundle_label_selector: Any = None, **more: Any
    ) -> None:
        groups.append({"bundles": bundles, "strategy": strategy, "labels": bundle_label_selector, **more})

    monkeypatch.setattr(request, "placement_group", placement_group)
    return groups


def test_the_accelerator_type_is_requested_for_each_worker(requested: list[dict[str, Any]]) -> None:
    scaling = ["scaling.accelerator_type=A100", "scaling.resources_per_worker={CPU: 4, GPU: 2}"]
    e = compose(["experiment=mlp", *scaling]).experiment
    bundle = preflight.bundle(e, gpu=True)
    assert bundle == {"CPU": 4.0, "GPU": 2.0, "accelerator_type:A100": 0.001}
    ray_internals.trial_resources(bundle, 1, "PACK").to_placement_group()
    ray_internals.trial_resources(bundle, 2, "SPREAD").to_placement_group()
    assert requested == [
        {"bundles": [bundle], "strategy": "PACK", "labels": None},
        {"bundles": [bundle, bundle], "strategy": "SPREAD", "labels": None},
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_each_worker_is_placed_by_its_labels(workers: int, requested: list[dict[str, Any]]) -> None:
    labels = {"zone": "a"}
    resources = ray_internals.trial_resources({"CPU": 1.0}, workers, "PACK", labels)
    resources.to_placement_group()
    assert requested == [{"bundles": [{"CPU": 1.0}] * workers, "strategy": "PACK", "labels": [labels] * workers}]
    assert resources == ray_internals.trial_resources({"CPU": 1.0}, workers, "PACK", labels)
    assert resources != ray_internals.trial_resources({"CPU": 1.0}, workers, "PACK")
    assert len({resources, ray_internals.trial_resources({"CPU": 1.0}, workers, "PACK", labels)}) == 1
