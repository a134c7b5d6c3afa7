"""Read from syntax trees which private names of other libraries a file uses. `tests/test_layering.py` and
`tests/contracts/` use it; it imports neither Ray nor torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_BY_NAME = {"getattr", "setattr", "hasattr", "delattr"}


@dataclass(frozen=True)
class Use:
    """A private name in a file: `name` is the last part, `text` the expression."""

    line: int
    name: str
    text: str


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined_names(tree: ast.AST) -> set[str]:
    """Return the private names that a file defines: functions, classes, variables, and attributes of `self`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(attr=name, value=ast.Name(id="self" | "cls"), ctx=ast.Store()):
                names.add(name)
    return {name for name in names if is_private(name)}


def private_imports(tree: ast.AST, packages: Iterable[str]) -> Iterator[Use]:
    """Yield each import of a private name or from a private module of the packages. `name` is the full path."""
    for node in ast.walk(tree):
        paths: list[str] = []
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        for path in paths:
            if path.split(".")[0] in packages and any(map(is_private, path.split("."))):
                yield Use(node.lineno, path, f"import {path}")  # type: ignore[attr-defined]


def private_accesses(tree: ast.AST) -> Iterator[Use]:
    """Yield each `x._name` where x is neither `self`, `cls` nor `super()`, each `getattr(x, "_name")` and each
    argument `_name=`."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
                continue
            case ast.Attribute(attr=name) if is_private(name):
                yield Use(node.lineno, name, ast.unparse(node))
            case ast.Call(func=ast.Name(id=function), args=[_, ast.Constant(value=str(name)), *_]):
                if function in _BY_NAME and is_private(name):
                    yield Use(node.lineno, name, ast.unparse(node))
            case ast.keyword(arg=str(name)) if is_private(name):
                yield Use(node.value.lineno, name, f"{name}=")


def patched_modules(tree: ast.AST, packages: Iterable[str]) -> Iterator[Use]:
    """Yield each assignment to an attribute of an imported package: `ray.data.x = …`."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {(a.asname or a.name).split(".")[0]: a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            aliases |= {a.asname or a.name: node.module.split(".")[0] for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            root = re.split(r"\W", ast.unparse(node), maxsplit=1)[0]
            if aliases.get(root) in set(packages) and re.fullmatch(r"[\w.]+", ast.unparse(node)):
                yield Use(node.lineno, node.attr, ast.unparse(node))


def own_private_names(class_node: ast.ClassDef) -> set[str]:
    """Return the private names in a class: its methods and class variables, and those of `self`, `cls` and `super()`."""
    names = {n.name for n in class_node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    for node in ast.walk(class_node):
        match node:
            case ast.Attribute(attr=name, value=ast.Name(id="self" | "cls")):
                names.add(name)
            case ast.Attribute(attr=name, value=ast.Call(func=ast.Name(id="super"))):
                names.add(name)
    for child in class_node.body:
        targets = (
            child.targets
            if isinstance(child, ast.Assign)
            else [child.target]
            if isinstance(child, ast.AnnAssign)
            else []
        )
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if is_private(name)}
