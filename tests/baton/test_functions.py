"""Functions named in a recipe: their files are found without running them, and loading says what is wrong."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton import functions
from baton.errors import UserError
from baton.functions import load_function, source_file, split


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory that is not on Python's path, and modules that are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


def write(path: str, text: str = "raise RuntimeError('run')\n") -> Path:
    file = Path(path).absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_names_are_split() -> None:
    assert split("a.b:c") == ("a.b", "c") and split("a:C.d") == ("a", "C.d")
    for wrong in ("a.b", "a.b:", ":c", "a/b.py:c", "a..b:c", "a:b:c", "", "a b:c"):
        with pytest.raises(UserError, match="is not pkg.module:function"):
            split(wrong)


def test_files_are_found_without_running_anything() -> None:
    """Every file would raise: a single module, one in a package, one in nested folders, and a package itself."""
    assert write("own_rules.py") == source_file("own_rules:f")
    package = write("own_package/__init__.py")
    inner = write("own_package/rules.py")
    assert source_file("own_package:f") == package and source_file("own_package.rules:f") == inner
    assert write("own_folder/deep/rules.py") == source_file("own_folder.deep.rules:f")
    assert not [name for name in sys.modules if name.startswith("own_")]


def test_installed_modules_come_before_those_of_the_current_directory() -> None:
    write("reward/rules.py")
    found = source_file("reward.rules:exact_answer")
    assert found == Path(functions.__file__).parent.parent / "reward" / "rules.py"


def test_what_has_no_file_is_refused(here: Path) -> None:
    for missing in ("own_nothing", "own_nothing.rules", "json.nothing", "sys", "own_empty", "__main__.x"):
        with pytest.raises(UserError, match=f"there is no module {missing} "):
            source_file(f"{missing}:f")
    (here / "own_empty").mkdir()
    with pytest.raises(UserError, match="there is no module own_empty "):
        source_file("own_empty:f")


def test_a_function_is_imported_with_its_neighbours() -> None:
    write("own_more/rules.py", "from own_more.words import word\ndef f(): return word\n")
    write("own_more/words.py", "word = 'found'\n")
    assert load_function("own_more.rules:f")() == "found"
    write("own_late.py", "def f():\n    import own_neighbour\n    return own_neighbour.word\n")
    write("own_neighbour.py", "word = 'late'\n")
    assert load_function("own_late:f")() == "late"


def test_a_module_that_fails_says_why() -> None:
    write("own_broken.py", "import own_absent\n")
    with pytest.raises(UserError, match="importing own_broken failed: ModuleNotFoundError: .*'own_absent'"):
        load_function("own_broken:f")
    write("own_raising.py")
    with pytest.raises(UserError, match="importing own_raising failed: RuntimeError: run"):
        load_function("own_raising:f")


def test_near_names_are_told() -> None:
    write("own_names.py", "exact = lambda: 0\nnumber = 3\ndef length(): ...\n")
    for wrong, message in (
        ("exakt", "own_names has no exakt; it has exact"),
        ("zzz", "it has exact, length"),
        ("number", "own_names:number is int, which cannot be called"),
        ("length.inner", "has no length.inner"),
    ):
        with pytest.raises(UserError, match=message):
            load_function(f"own_names:{wrong}")
