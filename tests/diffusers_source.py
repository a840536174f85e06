"""Functions of diffusers' pipelines, taken from their source: the modules import packages that we do not need."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch

ROOT = Path(diffusers.__file__).parent


@cache
def function_of(module: str, name: str) -> Callable[..., Any]:
    """A static method or function of the module `diffusers.MODULE` that needs nothing but torch."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text())
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    found.decorator_list = []
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)  # annotations may name what is not imported
    alone = ast.fix_missing_locations(ast.Module([future, found], []))
    scope: dict[str, Any] = {"torch": torch}
    exec(compile(alone, str(path), "exec"), scope)  # noqa: S102 the installed package's own code
    function: Callable[..., Any] = scope[name]
    return function
