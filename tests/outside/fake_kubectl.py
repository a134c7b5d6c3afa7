"""A stand-in for `kubectl` and the Kubernetes behind it, as far as raytrainer uses them.

Objects are files in the directory FAKE_KUBERNETES, and a server-side apply knows the manager of each. Every call is a
line of `calls`. A file `says` there, {"to": "apply", "code": 1, "stderr": "…"}, gives the answer to such a call
instead; with {"hangs": true} there is no answer.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(os.environ["FAKE_KUBERNETES"])
# The output of kubectl 1.32.
CONFLICT = """\
error: Apply failed with 1 conflict: conflict with "{}" using ray.io/v1: .metadata.annotations.raytrainer.dev/content
Please review the fields above--they currently have other managers. Here
are the ways you can resolve this warning:
"""


def file_of(kind: str, name: str) -> Path:
    return HERE / f"{kind.lower().removesuffix('s')}-{name}.json"


def items(kind: str, selector: str) -> list[dict[str, Any]]:
    wanted = dict(part.split("=", 1) for part in selector.split(","))
    found = [json.loads(file.read_text()) for file in sorted(HERE.glob(f"{kind.removesuffix('s')}-*.json"))]
    return [one for one in found if wanted.items() <= one["metadata"].get("labels", {}).items()]


def apply(options: dict[str, str]) -> int:
    manager, applied = options["--field-manager"], []
    for document in yaml.safe_load_all(sys.stdin):
        file = file_of(document["kind"], document["metadata"]["name"])
        if file.exists():
            found = json.loads(file.read_text())
            if found["managed"] != manager:
                sys.stderr.write(CONFLICT.format(found["managed"]))
                return 1
            document = found
        document["managed"] = manager
        document["metadata"].setdefault("uid", f"uid-of-{document['metadata']['name']}")
        file.write_text(json.dumps(document))
        applied.append(document)
    print(json.dumps({"kind": "List", "items": applied}))
    return 0


def main(arguments: list[str]) -> int:
    options = {name: value for name, _, value in (a.partition("=") for a in arguments if a.startswith("-"))}
    verb, *words = [a for a in arguments if not a.startswith("-")]
    selector = arguments[arguments.index("-l") + 1] if "-l" in arguments else ""
    with (HERE / "calls").open("a") as calls:
        fcntl.flock(calls, fcntl.LOCK_EX)  # one request at a time, as on the server
        print(json.dumps(arguments), file=calls, flush=True)
        says = json.loads((HERE / "says").read_text()) if (HERE / "says").exists() else {}
        if says.get("to") == verb:
            if says.get("hangs"):
                time.sleep(600)
            sys.stdout.write(says.get("stdout", ""))
            sys.stderr.write(says.get("stderr", ""))
            return int(says.get("code", 0))
        if verb == "apply":
            return apply(options)
        if verb == "get" and not selector:
            file = file_of(*words[:2])
            print(file.read_text() if file.exists() else "")
        elif verb == "get":
            print(json.dumps({"items": items(words[0], selector)}))
        elif verb == "delete":
            names = [one["metadata"]["name"] for one in items(words[0], selector)] if selector else [words[1]]
            for name in names:
                file_of(words[0], name).unlink(missing_ok=True)
        elif verb == "patch":
            file = file_of(*words[:2])
            found = json.loads(file.read_text())
            found["metadata"].update(json.loads(options["--patch"])["metadata"])
            file.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
