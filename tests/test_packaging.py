"""Packaging: every dependency pinned, every package shipped, the commands of people and CI the same."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = ("s3", "sign", "ui", "rules", "corpus", "test", "dev")


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): pinned for name, pinned in (line.split("==") for line in lines)}


def required() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"]
    texts = PROJECT["project"]["dependencies"] + [text for extra in EXTRAS for text in extras[extra]]
    found = [Requirement(text) for text in texts + PROJECT["build-system"]["requires"]]
    # `test` asks for the other extras by the project's own name
    return [requirement for requirement in found if requirement.name != "baton"]


def test_the_tests_have_every_optional_library() -> None:
    (own,) = [text for text in PROJECT["project"]["optional-dependencies"]["test"] if text.startswith("baton[")]
    assert Requirement(own).extras == set(EXTRAS) - {"test", "dev"}


def test_every_dependency_has_a_lower_bound_that_its_pin_meets() -> None:
    for requirement in required():
        pinned = pins()[canonicalize_name(requirement.name)]
        assert any(each.operator == ">=" for each in requirement.specifier), requirement
        assert requirement.specifier.contains(pinned), f"{requirement} is pinned to {pinned}"


def test_the_pins_are_closed_under_what_is_installed() -> None:
    """Whatever a pinned package needs here is pinned too, so no install takes a version that was not tested."""
    seen: set[str] = set()
    waiting = [canonicalize_name(requirement.name) for requirement in required()]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        assert name in pins(), f"{name} is installed, but constraints.txt does not pin it"
        try:
            needs = [Requirement(text) for text in distribution(name).requires or []]
        except PackageNotFoundError:
            continue
        # GPU builds of torch pin their own libraries
        needs = [need for need in needs if not need.name.startswith(("nvidia-", "cuda-", "triton"))]
        waiting += [
            canonicalize_name(need.name) for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})
        ]


def test_no_pin_asks_for_one_build() -> None:
    assert not [name for name, pinned in pins().items() if "+" in pinned]


def test_what_is_tested_is_what_is_pinned() -> None:
    names = [canonicalize_name(requirement.name) for requirement in required()]
    assert {name: version(name).partition("+")[0] for name in names} == {name: pins()[name] for name in names}


def test_every_package_is_shipped() -> None:
    folders = {path.parent for top in ("baton", "stages", "reward") for path in (ROOT / top).rglob("*.py")}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} == set(
        PROJECT["tool"]["setuptools"]["packages"]
    )


def test_every_template_is_shipped() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["baton"]
    shipped = {path for pattern in patterns for path in (ROOT / "baton").glob(pattern)}
    others = {path for path in (ROOT / "baton").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert shipped == others and others


def test_a_top_level_folder_is_a_package_recipes_or_tests() -> None:
    made_by_tools = {"build"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))}
    folders = {name for name in folders if not name.endswith(".egg-info")} - made_by_tools
    assert folders == {"baton", "stages", "reward", "recipes", "tests"}


def test_the_console_script_exists() -> None:
    from baton.cli import main

    assert PROJECT["project"]["scripts"] == {"baton": "baton.cli:main"} and callable(main)


def test_one_linter_and_one_type_checker_are_configured() -> None:
    assert {"ruff", "mypy", "pytest"} <= set(PROJECT["tool"])
    assert set(PROJECT["tool"]["ruff"]["lint"]["select"]) == {"E", "F", "I", "B", "UP", "SIM"}
    assert set(PROJECT["tool"]["mypy"]["packages"]) == {"baton", "stages", "reward"}


def test_benchmarks_and_gpu_tests_are_not_run_by_default() -> None:
    options = PROJECT["tool"]["pytest"]["ini_options"]
    assert "bench" in options["norecursedirs"] and "not gpu" in options["addopts"]
    assert any(marker.startswith("gpu:") for marker in options["markers"])


def test_no_benchmark_imports_from_its_own_folder() -> None:
    """Started as a script, its folder comes first, where reward.py would stand for the package."""
    scripts = {path.name: path.read_text() for path in (ROOT / "tests" / "bench").glob("*.py")}
    started = {name: text for name, text in scripts.items() if f"python tests/bench/{name}" in text}
    assert len(started) >= 5
    assert [name for name, text in started.items() if "sys.path" not in text] == []


@pytest.mark.parametrize("target", ["quickstart", "test", "lint", "types", "smollm2"])
def test_make_has_the_target(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_ci_runs_what_a_person_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make lint types test" in script.read_text()


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
