"""A method is found by its file name; a miss lists what is there; a broken file says so itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlalign import methods

ROOM = "room_of_a_test"


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with two methods, a shared part, a broken file and one without a METHOD."""
    folder = tmp_path / ROOM
    folder.mkdir()
    files = {
        "__init__": "NOT_METHODS = ('shared',)\n",
        "apple": "class Apple:\n    pass\n\n\nMETHOD = Apple\n",
        "pear": "METHOD = dict\n",
        "broken": "import a_package_that_is_not_there\n\nMETHOD = None\n",
        "empty": "",
        "shared": "",
        "_private": "",
    }
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield ROOM
    for name in [n for n in sys.modules if n.partition(".")[0] == ROOM]:
        del sys.modules[name]


def test_names(room: str) -> None:
    assert methods.names(room) == ["apple", "broken", "empty", "pear"]


def test_find(room: str) -> None:
    assert methods.find(room, "apple").__name__ == "Apple"


def test_unknown_name_lists_those_there_and_the_nearest(room: str) -> None:
    with pytest.raises(methods.UnknownMethod) as caught:
        methods.find(room, "aple")
    assert "Did you mean 'apple'?" in str(caught.value)
    assert "There are: apple, broken, empty, pear" in str(caught.value)


@pytest.mark.parametrize("name", ["shared", "_private", "zzz", ""])
def test_what_is_no_method_is_not_found(room: str, name: str) -> None:
    with pytest.raises(methods.UnknownMethod, match="There are: apple"):
        methods.find(room, name)


def test_broken_import_is_raised_as_it_is(room: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        methods.find(room, "broken")


def test_file_without_a_method(room: str) -> None:
    with pytest.raises(methods.UnknownMethod, match=r"empty\.py defines no METHOD"):
        methods.find(room, "empty")


def test_method_of_another_package(room: str) -> None:
    assert methods.find("mlalign.objectives", f"{room}.apple:Apple").__name__ == "Apple"
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        methods.find(room, "not_there:Thing")
    with pytest.raises(AttributeError, match="Plum"):
        methods.find(room, f"{room}.apple:Plum")
