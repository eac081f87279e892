"""What the documents name is there: paths, commands, recipes, overrides."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlalign import recipe
from tests._syntax import REPOSITORY

HIDDEN = (".venv", ".git", "runs", ".pytest_cache")
DOCUMENTS = sorted(
    p for p in REPOSITORY.rglob("*.md") if p.relative_to(REPOSITORY).parts[0] not in HIDDEN
)
TOP = ("mlalign", "data_builders", "recipes", "launch", "tests")
PLACEHOLDER = re.compile(r"[<>*{}]|\.\.\.")
NAMES = re.compile(rf"(?<![\w./-])((?:{'|'.join(TOP)})/[\w./<>*{{}}-]*)")
LINKS = re.compile(r"\]\(([^)#:\s]+)\)")
CODE = re.compile(r"^(?: {4}|\t)(.*)$|^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")


def commands(document: Path) -> list[list[str]]:
    """Command lines of a document, indented, fenced or inline."""
    text = document.read_text(encoding="utf-8")
    lines = [line for match in CODE.finditer(text) for line in (match[1] or match[2]).splitlines()]
    lines += [match[1] for match in INLINE.finditer(text)]
    found = []
    for line in lines:
        line = line.strip().removeprefix("$ ")
        if line.split(" ")[0] in ("make", "mlalign", "python", "deepspeed"):
            found.append(shlex.split(line, comments=True))
    return found


def test_there_are_documents() -> None:
    names = {str(p.relative_to(REPOSITORY)) for p in DOCUMENTS}
    assert {"README.md", "launch/README.md", "recipes/in_house/README.md"} <= names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_paths_are_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    gone = []
    for match in NAMES.finditer(text):
        # A name in pointed brackets stands for any; what comes before it has to be there.
        fixed = PLACEHOLDER.split(match[1])[0]
        fixed = fixed if fixed == match[1] else fixed.rpartition("/")[0]
        if not (REPOSITORY / fixed.rstrip("./")).exists():
            gone.append(match[1])
    gone += [link for link in LINKS.findall(text) if not (document.parent / link).exists()]
    assert not gone, f"{document.name} names what is not there: {gone}"


def make_targets() -> set[str]:
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):(?!=)", text, re.MULTILINE))


def verbs() -> set[str]:
    import typer

    from mlalign import cli

    command = typer.main.get_command(cli.app)
    return set(getattr(command, "commands", {}))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_commands_are_there(document: Path) -> None:
    faults = []
    for words in commands(document):
        program, *rest = words
        if program == "make" and rest and rest[0] not in make_targets():
            faults.append(f"no make target {rest[0]}")
        if program == "mlalign" and rest and not rest[0].startswith("-") and rest[0] not in verbs():
            faults.append(f"no verb {rest[0]}")
        if program == "python" and rest[:1] == ["-m"] and find_spec(rest[1]) is None:
            faults.append(f"no module {rest[1]}")
        faults += recipe_faults(rest)
    assert not faults, faults


def recipe_faults(words: list[str]) -> list[str]:
    """What is wrong with a recipe that a command names, read with the command's overrides."""
    for at, word in enumerate(words):
        if word.endswith(".yaml") and word.startswith("recipes/") and not PLACEHOLDER.search(word):
            overrides = [w for w in words[at + 1 :] if "=" in w and not w.startswith("-")]
            if Path(word).name == "base.yaml":  # of another schema
                return []
            try:
                recipe.load(REPOSITORY / word, overrides)
            except recipe.RecipeError as error:
                return [str(error)]
    return []


def test_recipe_comments_name_commands_that_are_there() -> None:
    faults = []
    for path in sorted((REPOSITORY / "recipes").rglob("*.yaml")):
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.lstrip("# ").split()
            if (
                line.startswith("#")
                and words[:2] == ["python", "-m"]
                and find_spec(words[2]) is None
            ):
                faults.append(f"{path.name}: no module {words[2]}")
    assert not faults, faults


def test_every_recipe_folder_says_how_to_run_it() -> None:
    folders = {p.parent for p in (REPOSITORY / "recipes").rglob("*.yaml")} - {
        REPOSITORY / "recipes"
    }
    bare = [str(f.relative_to(REPOSITORY)) for f in folders if not (f / "README.md").is_file()]
    assert not bare, f"no README.md in {sorted(bare)}"


def test_skips_are_explained() -> None:
    explained = (REPOSITORY / "tests" / "SKIPS.md").read_text(encoding="utf-8")
    skipping = re.compile(r"pytest\.(skip|importorskip)\(|mark\.(skip|skipif|gpu|data)\b")
    unexplained = [
        str(path.relative_to(REPOSITORY))
        for path in sorted((REPOSITORY / "tests").rglob("*.py"))
        if skipping.search(path.read_text(encoding="utf-8"))
        and str(path.relative_to(REPOSITORY)) not in explained
        and path.name != Path(__file__).name
    ]
    assert not unexplained, f"say in tests/SKIPS.md why these skip: {unexplained}"
