"""The part of KubeRay's RayJob schema that our manifests use, as strict as a server that refuses unknown fields.

`python -m tests.cluster.crd CRD` writes tests/fixtures/rayjob-schema.json. CRD is the file of the custom resource
definition, `ray-operator/config/crd/bases/ray.io_rayjobs.yaml` of a KubeRay release, or its schema
(`openAPIV3Schema`) as JSON. The fixture keeps each field that a manifest of `manifests()` sets, with everything that
the schema says about that field. If a manifest sets a new field, write the fixture again from the definition.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml

SCHEMA = Path(__file__).resolve().parent.parent / "fixtures" / "rayjob-schema.json"
# Every Kubernetes object has these fields, but no resource definition describes them.
OBJECT_META = {name: {"type": "string"} for name in ("name", "namespace")} | {
    name: {"type": "object", "additionalProperties": {"type": "string"}} for name in ("labels", "annotations")
}
ANYTHING = "x-kubernetes-preserve-unknown-fields"


def cut(schema: Mapping[str, Any], values: Iterable[Any]) -> dict[str, Any]:
    """Return the schema without the fields that none of the values has."""
    values = list(values)
    kept = {key: value for key, value in schema.items() if key not in ("properties", "description")}
    if "properties" in schema:
        objects = [value for value in values if isinstance(value, Mapping)]
        kept["properties"] = {
            name: cut(below, [value[name] for value in objects if name in value])
            for name, below in schema["properties"].items()
            if any(name in value for value in objects)
        }
    if isinstance(schema.get("items"), Mapping):
        kept["items"] = cut(schema["items"], [one for value in values if isinstance(value, list) for one in value])
    return kept


def strict(schema: Any) -> Any:
    """Return the schema with unnamed fields forbidden, unless it says that it preserves them."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if "properties" in found and isinstance(found["properties"], Mapping) and not found.get(ANYTHING):
        found.setdefault("additionalProperties", False)
    return found


def problems(manifest: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """Return the violations as text, for example `spec.backoffLimit: 'two' is not of type 'integer'`."""
    schema = json.loads(json.dumps(schema))
    schema["properties"]["metadata"] = {"type": "object", "properties": OBJECT_META}
    found = jsonschema.Draft7Validator(strict(schema)).iter_errors(manifest)
    return [f"{'.'.join(str(part) for part in error.absolute_path)}: {error.message}" for error in found]


def main(definition: Path) -> None:
    from tests.cluster.test_kuberay import manifests

    found = yaml.safe_load(definition.read_text())
    if "spec" in found:
        found = next(v for v in found["spec"]["versions"] if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    wanted = [job for _, job in manifests()]
    for manifest in wanted:
        assert not (wrong := problems(manifest, found)), wrong
    SCHEMA.write_text(json.dumps(cut(found, wanted), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
