"""Imports go one way, nothing imports a program, and recipes hold no code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {"baton": {"baton"}, "reward": {"baton", "reward"}, "stages": {"baton", "reward", "stages"}}
PROGRAMS = {"stages.pretrain", "stages.sft", "stages.ppo", "stages.ladder", "reward.train"}
MODULES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, wherever in the file, `from a import b` as both `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which package they mean"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_there_is_something_to_look_at() -> None:
    names = {name_of(path) for path in MODULES}
    assert names >= PROGRAMS and len(names) > 40
    assert "baton.registry" in set(imported(ROOT / "stages" / "sft.py"))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name in imported(path)} & (set(MAY_IMPORT) | {"tests", "recipes"})
    assert ours <= MAY_IMPORT[package], f"{package} may import {MAY_IMPORT[package]}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_imports_a_program(path: Path) -> None:
    assert not set(imported(path)) & PROGRAMS


def test_recipes_hold_no_code() -> None:
    kinds = {path.suffix for path in (ROOT / "recipes").rglob("*") if path.is_file() and "data" not in path.parts}
    assert kinds <= {".yaml", ".md", ".jinja"}
