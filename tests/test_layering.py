"""The layers of the code, the modules that may import third parties, and the lazy imports, read from the syntax trees.

The tables below follow the design. A new module needs a layer here, or a test of this file fails.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.private_names import defined_names, patched_modules, private_accesses, private_imports

# A module imports only from layers below its own, and modules of one layer do not import each other. The files of a
# package (data/, models/, ...) are one module here.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("core",),
    ("plugins",),
    ("config", "storage", "seeds", "events", "provenance", "names", "sharding", "batches"),
    (
        "data",
        "models",
        "losses",
        "optim",
        "callbacks",
        "state",
        "parallel",
        "checkpoint",
        "metrics",
        "flops",
        "tracking",
        "progress",
    ),
    ("own_code",),
    ("trainer",),
    ("mlflow_model",),
    ("worker",),
    ("ray_internals", "preflight"),
    ("attempt",),
    ("sweep",),
    ("submission",),
    ("backends", "cluster"),
    ("runs",),
    ("cli", "__main__", "__init__", "hydra_plugins"),
)
# The only import within a layer: the program starts the command line.
ALLOWED_IN_LAYER = {("__main__", "cli")}
# This module names classes of layers above its own, in annotations only: it defines what those layers implement.
ANNOTATES = {"plugins"}

# Only these modules import these third-party packages, also inside functions.
ROOMS: dict[str, frozenset[str]] = {
    "ray": frozenset({"data", "worker", "attempt", "ray_internals", "sweep", "submission", "backends", "runs"}),
    "mlflow": frozenset({"tracking", "mlflow_model"}),
    "pyarrow": frozenset({"data", "storage", "sweep"}),
    "hydra": frozenset({"config", "cli", "hydra_plugins"}),
    "omegaconf": frozenset({"config", "cli", "hydra_plugins"}),
}
# Only one function imports these: the one that writes the model, and in `data` RayDataset, for which Ray reads.
ONE_FUNCTION = {("mlflow", "mlflow_model"), ("ray", "data")}
# These modules never import torch, not even inside functions. (`seeds` imports it inside functions.)
NO_TORCH = frozenset({"errors", "plugins", "config", "storage", "events", "tracking", "cli", "__main__"})

# Importing the module imports none of these.
LAZY: dict[str, tuple[str, ...]] = {
    "raytrainer": ("torch", "ray", "mlflow", "hydra", "pyarrow"),
    "raytrainer.config": ("torch", "ray", "mlflow", "pyarrow"),
    "raytrainer.storage": ("torch", "ray", "mlflow", "hydra"),
    "raytrainer.seeds": ("torch", "ray", "mlflow", "hydra", "pyarrow"),
    "raytrainer.events": ("torch", "ray", "mlflow", "hydra", "pyarrow"),
    "raytrainer.tracking": ("torch", "ray", "mlflow", "hydra", "pyarrow"),
    "raytrainer.data.ray_data": ("ray", "mlflow", "pyarrow"),
    "raytrainer.trainer": ("ray", "mlflow"),
    "raytrainer.runs.listing": ("torch", "ray", "mlflow", "pyarrow"),
    "raytrainer.runs.status": ("torch", "ray", "mlflow", "pyarrow"),
    "raytrainer.plugins": ("torch", "ray", "mlflow", "hydra", "omegaconf", "pyarrow"),
    "raytrainer.backends.local": ("torch", "ray", "mlflow", "hydra", "omegaconf", "pyarrow"),
    "raytrainer.backends.ray_jobs": ("torch", "ray", "mlflow", "pyarrow"),
    "raytrainer.backends.kuberay": ("torch", "ray", "mlflow", "pyarrow"),
    "raytrainer.cli": ("torch", "ray", "mlflow"),
    "raytrainer.__main__": ("torch", "ray", "mlflow"),
    "hydra_plugins.raytrainer": ("torch", "ray", "mlflow"),
}

# Private names of these libraries are used in these files only. `tests/contracts/` checks each of them.
PRIVATE = ("ray", "hydra", "omegaconf", "mlflow")
PRIVATE_ROOMS = ("ray_internals/*.py", "config/hydra_internals.py", "tracking/mlflow_internals.py")
# Private names of the standard library, of torch and of torchmetrics that other files use; and a documented key of Hydra.
OF_OTHERS = re.compile(
    r"_replace|_asdict|_make|_exit|_data|_convert_|_forkserver|_forkserver_pid"
    r"|_foreach_\w+|_metadata|_register_load_state_dict_pre_hook|_step_supports_amp_scaling|_compiled_call_impl"
    r"|_C|_current_graph_task_id|_check_reducer_finalized|_indices|_values|_parameters|_buffers|_schedulers|_dynamo"
)
# Variables of Ray that users set and several modules honour. All others are in one module only.
HONOURED = re.compile(r"RAY_(ADDRESS|TMPDIR|API_SERVER_ADDRESS|AUTH_\w+)")

# Two files or two public classes of one name make a reader open the wrong one. These files mean the same in their two
# packages: of a run, and of a sweep.
SHARED_FILE_NAMES = frozenset({"__init__", "driver", "launching", "outcome"})

ROOT = Path(__file__).resolve().parent.parent
LAYER_OF = {module: number for number, modules in enumerate(LAYERS) for module in modules}


@dataclass(frozen=True)
class Import:
    """One imported name, and where the import is."""

    file: Path
    line: int
    function: str | None
    name: str
    for_types: bool = False

    @property
    def place(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def module_of(file: Path) -> str:
    """Return the name in the tables: the first part below raytrainer/, or hydra_plugins."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "raytrainer" else parts[0]


def name_of(file: Path) -> str:
    """Return the dotted name by which a file is imported."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    ours = [*(ROOT / "raytrainer").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]
    return sorted(file for file in ours if module_of(file) != "configs")


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), filename=str(file))


def imports_of(file: Path) -> Iterator[Import]:
    """Yield all imports, also inside functions, under TYPE_CHECKING, and by `import_module` with a literal name."""
    yield from _imports(tree_of(file), file, None)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _imports(node: ast.AST, file: Path, function: str | None, for_types: bool = False) -> Iterator[Import]:
    for_types = for_types or _is_type_checking(node)
    for child in ast.iter_child_nodes(node):
        inside = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not function else function
        match child:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(file, child.lineno, function, alias.name, for_types)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                for alias in names:
                    yield Import(file, child.lineno, function, f"{module}.{alias.name}", for_types)
            case ast.ImportFrom(level=level) if level:
                raise AssertionError(f"{file.relative_to(ROOT)}:{child.lineno}: a relative import")
            case ast.Call(
                func=ast.Name(id=called) | ast.Attribute(attr=called), args=[ast.Constant(value=str(name)), *_]
            ):
                if called in {"import_module", "__import__", "find_spec"}:
                    yield Import(file, child.lineno, function, name, for_types)
        yield from _imports(child, file, inside, for_types)


def all_imports() -> list[Import]:
    return [found for file in sources() for found in imports_of(file)]


def ours(name: str) -> str | None:
    """Return our module that an imported name belongs to; None if it is not ours."""
    parts = name.split(".")
    if parts[0] == "hydra_plugins":
        return "hydra_plugins"
    if parts[0] != "raytrainer":
        return None
    # `from raytrainer import seeds` imports the module; `from raytrainer import Trainer` imports a public name of
    # __init__.
    return parts[1] if len(parts) > 1 and (parts[1] in LAYER_OF or parts[1] == "configs") else "__init__"


def test_every_module_has_a_layer_and_only_one() -> None:
    assert len(LAYER_OF) == sum(len(modules) for modules in LAYERS)
    unknown = {module_of(file) for file in sources()} - set(LAYER_OF)
    assert not unknown, f"without a layer in the table at the top of this file: {sorted(unknown)}"


def test_imports_go_down() -> None:
    wrong = []
    for found in all_imports():
        source, target = module_of(found.file), ours(found.name)
        if target in {None, source, "configs"} or (source, target) in ALLOWED_IN_LAYER:
            continue
        if found.for_types and source in ANNOTATES:
            continue
        assert target is not None
        if LAYER_OF[target] >= LAYER_OF[source]:
            wrong.append(
                f"{found.place}: {source} (layer {LAYER_OF[source]}) imports {target} (layer {LAYER_OF[target]})"
            )
    assert not wrong, "\n".join(wrong)


def test_no_import_cycle_among_our_files() -> None:
    """Imports inside functions and under TYPE_CHECKING count too, but for what `plugins` annotates."""
    imported: dict[str, set[str]] = {name_of(file): set() for file in sources()}
    for found in all_imports():
        if found.for_types and module_of(found.file) in ANNOTATES:
            continue
        own, target = name_of(found.file), found.name
        target = target if target in imported else target.rpartition(".")[0]
        if target in imported and target != own:
            imported[own].add(target)
    sorter = TopologicalSorter(imported)
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_third_parties_stay_in_their_rooms() -> None:
    wrong = []
    for found in all_imports():
        package = found.name.split(".")[0]
        if package in ROOMS and module_of(found.file) not in ROOMS[package]:
            wrong.append(f"{found.place}: {package} belongs into {', '.join(sorted(ROOMS[package]))}")
        if package == "torch" and module_of(found.file) in NO_TORCH:
            wrong.append(f"{found.place}: no torch in {module_of(found.file)}")
    assert not wrong, "\n".join(wrong)


def test_a_room_of_one_function() -> None:
    for package, module in ONE_FUNCTION:
        functions = {
            found.function
            for found in all_imports()
            if module_of(found.file) == module and found.name.split(".")[0] == package
        }
        assert len(functions) <= 1, f"{package} is imported in several functions of {module}: {functions}"
        assert None not in functions, f"{package} is imported by {module} itself, not inside a function"


def foreign_names(file: Path, tree: ast.AST, own: set[str]) -> list[str]:
    """Return the uses of private names that are neither ours nor in `OF_OTHERS`.

    In a file that imports one of the libraries in `PRIVATE`, only names that the file itself defines count as ours, so
    that a name of ours elsewhere cannot hide one of theirs.
    """
    imported = {use.name.split(".")[0] for use in imports_of(file)} if file.exists() else set(PRIVATE)
    ours = defined_names(tree) if imported & set(PRIVATE) else own
    uses = [*private_imports(tree, PRIVATE), *private_accesses(tree), *patched_modules(tree, PRIVATE)]
    return [f"{use.line}: {use.text}" for use in uses if use.name not in ours and not OF_OTHERS.fullmatch(use.name)]


def test_private_names_of_other_libraries_stay_in_their_rooms() -> None:
    rooms = {path for room in PRIVATE_ROOMS for path in (ROOT / "raytrainer").glob(room)}
    own = set[str]().union(*(defined_names(tree_of(file)) for file in sources()))
    wrong = [
        f"{file.relative_to(ROOT)}:{use}"
        for file in sources()
        if file not in rooms
        for use in foreign_names(file, tree_of(file), own)
    ]
    assert not wrong, "belongs into one of the rooms (PRIVATE_ROOMS), or into OF_OTHERS:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "controller._live_trials.clear()",
        'getattr(scheduler, "_brackets")',
        'setattr(scheduler, "_brackets", [])',
        "scheduler._get_new_config = print",
        "ray.init(_memory=1)",
        "ray.data.DataContext = None",
        "from ray.train.v2._internal.execution import controller",
        "import hydra._internal.hydra",
    ],
)
def test_a_private_name_is_found(line: str, tmp_path: Path) -> None:
    tree = ast.parse(f"import ray\n{line}\n")
    assert len(foreign_names(tmp_path / "absent.py", tree, own=set())) == 1
    assert not foreign_names(tmp_path / "absent.py", ast.parse("self._x = super()._y + cls._z + __name__"), own=set())


def test_variables_of_ray_are_set_in_one_module() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for file in sources()
        if module_of(file) != "ray_internals"
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if re.fullmatch(r"(RAY|TUNE)_\w+", node.value) and not HONOURED.fullmatch(node.value)
    ]
    assert not wrong, "\n".join(wrong)


# Only the backends and the registry know the backends by name.
KNOWS_BACKENDS = {"backends", "plugins", "configs"}
NAMES_OF_BACKENDS = {"inline", "existing", "ray_jobs", "kuberay"}  # the others are words with many meanings


def _is_cluster_kind(node: ast.AST) -> bool:
    """Return whether an expression is `cluster.kind`, `e.cluster.kind`, `c.kind`, or a call with that text."""
    match node:
        case ast.Attribute(attr="kind", value=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name in {"cluster", "c", "settings"}
        case ast.Call(args=[_, ast.Constant(value="cluster.kind"), *_]):
            return True
    return False


def decisions_by_name(tree: ast.Module) -> Iterator[int]:
    """Yield the lines that decide by the name of a backend instead of asking the backend: comparisons, `match`, keys."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare(left=left, comparators=others):
                literals = {side.value for side in ast.walk(node) if isinstance(side, ast.Constant)}
                if any(_is_cluster_kind(side) for side in [left, *others]) or literals & NAMES_OF_BACKENDS:
                    yield node.lineno
            case ast.Match(subject=key) | ast.Subscript(slice=key) if _is_cluster_kind(key):
                yield key.lineno


def test_only_backends_are_known_by_name() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sources()
        if module_of(file) not in KNOWS_BACKENDS
        for line in decisions_by_name(tree_of(file))
    ]
    assert not wrong, f"ask a property of `experiment.backend` instead: {', '.join(wrong)}"


@pytest.mark.parametrize(
    ("source", "decides"),
    [
        ('if e.cluster.kind == "slurm": pass', True),
        ('x = c.kind in ("job", "kuberay")', True),
        ('ok = OmegaConf.select(cfg, "cluster.kind") == "job"', True),
        ('if choices.get("cluster") == "inline": pass', True),
        ("match cluster.kind:\n    case 'local': pass", True),
        ("TABLE[e.cluster.kind]", True),
        ('if record.kind == "sweep": pass', False),
        ('if verdict.kind == "local": pass', False),
        ("e.cluster.kind = name", False),
    ],
)
def test_the_search_for_names_of_backends_finds_them(source: str, decides: bool) -> None:
    assert bool([*decisions_by_name(ast.parse(source))]) is decides


def test_no_module_is_a_drawer() -> None:
    drawers = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "handler", "base"}
    assert not {file.stem for file in sources()} & drawers


def shared(names: Iterator[tuple[str, Path]]) -> dict[str, list[str]]:
    """Return the names that several files have, with those files."""
    files: dict[str, list[str]] = defaultdict(list)
    for name, file in names:
        files[name].append(str(file.relative_to(ROOT)))
    return {name: paths for name, paths in files.items() if len(paths) > 1}


def test_no_two_files_of_one_name() -> None:
    found = shared((file.stem, file) for file in sources())
    assert not found.keys() - SHARED_FILE_NAMES, found


def test_no_two_public_classes_of_one_name() -> None:
    found = shared(
        (node.name, file)
        for file in sources()
        for node in tree_of(file).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert not found


def present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("module", [module for module in LAZY if present(module)])
def test_importing_stays_light(module: str) -> None:
    # In this process, other tests have imported everything, so start a new one.
    program = (
        "import importlib, json, pkgutil, sys\n"
        f"module = importlib.import_module({module!r})\n"
        # Hydra imports every module of every plugin package before it does anything else.
        "if module.__name__.startswith('hydra_plugins'):\n"
        "    for found in pkgutil.walk_packages(module.__path__, module.__name__ + '.'):\n"
        "        importlib.import_module(found.name)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert not imported & set(LAZY[module])


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text(
        "import a.b, c\n"
        "from d import e\n"
        "if TYPE_CHECKING:\n"
        "    import f\n"
        "class K:\n"
        "    def method(self):\n"
        "        from g import h\n"
        "        def inner():\n"
        "            importlib.import_module('i.j')\n"
    )
    found = [(one.name, one.function) for one in imports_of(file)]
    assert found == [
        ("a.b", None),
        ("c", None),
        ("d.e", None),
        ("f", None),
        ("g.h", "method"),
        ("i.j", "method"),
    ]
    assert [ours(name) for name in ("raytrainer.data.order", "raytrainer.seeds", "raytrainer.Trainer", "torch")] == [
        "data",
        "seeds",
        "__init__",
        None,
    ]
