"""Text -> the objects, attributes and relations that it mentions, with character spans; and its
sentences. No torch.

A vocabulary is a YAML file under ``mlalign/vocabularies`` (or anywhere): canonical names with the
words people use for them, phrases that only look like an object ("train station"), and guards for
ambiguous words (the colour orange, the verb "to sink"). The rules stand in the file, not here.

``Vocabulary.official`` reads CHAIR's released synonym list instead and counts as CHAIR's script
does, faults included: for figures that must be comparable with published ones.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

FOLDER = Path(__file__).parent / "vocabularies"
Kind = Literal["object", "attribute", "relation"]

_WORD = re.compile(r"[A-Za-z]+")
_JOIN = re.compile(r"[\s'\u2019-]+")
"""What may stand between the words of one phrase: "teddy-bear", "catcher's mitt"."""
_SENTENCE = re.compile(r"\S.*?(?:[.!?]+[\"')\]]*(?=\s|$)|$)", re.DOTALL)
_KEYS = {
    "name", "objects", "plurals", "young", "not_objects", "closers", "guards",
    "attributes", "relations", "companions",
}  # fmt: skip


class VocabularyError(ValueError):
    """A vocabulary that cannot be used. The message names the file, the key and the mend."""


@dataclass(frozen=True)
class Span:
    """One mention."""

    name: str
    """Canonical name."""
    start: int
    end: int
    """Characters [start, end) of the text."""
    kind: Kind
    word: str
    """The text as it stands there."""


@dataclass(frozen=True, kw_only=True)
class Guard:
    """When an ambiguous word counts as its object; see the head of ``vocabularies/coco.yaml``."""

    only_previous: tuple[str, ...] = ()
    unless_previous: tuple[str, ...] = ()
    unless_next: tuple[str, ...] = ()
    only_near: tuple[str, ...] = ()
    noun: bool = False
    unless_color_follows: bool = False


@dataclass(frozen=True)
class _Entry:
    """One phrase of a vocabulary."""

    words: tuple[str, ...]
    name: str | None
    """None: the phrase is known and names nothing."""
    guard: Guard | None = None
    plural: bool = False


_Trie = dict[str, list[_Entry]]


@dataclass(frozen=True)
class _Token:
    text: str
    """In lower case."""
    start: int
    end: int
    joined: bool
    """Nothing but blanks, a hyphen or an apostrophe stands between it and the token before."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Object, attribute and relation words, and what is typically seen together."""

    name: str
    names: tuple[str, ...]
    """Canonical object names, in the file's order."""
    attribute_groups: Mapping[str, tuple[str, ...]]
    """Group ("color", "size") -> words. A word can be swapped for another of its group."""
    relation_groups: Mapping[str, tuple[str, ...]]
    """Group -> phrases; likewise."""
    companions: Mapping[str, tuple[str, ...]]
    """Name -> objects typically seen with it, most typical first."""
    closers: frozenset[str] = frozenset()
    _objects: _Trie = field(default_factory=dict, repr=False)
    _attributes: _Trie = field(default_factory=dict, repr=False)
    _relations: _Trie = field(default_factory=dict, repr=False)

    @property
    def attribute_names(self) -> tuple[str, ...]:
        """Every attribute word."""
        return tuple(word for group in self.attribute_groups.values() for word in group)

    @property
    def relation_names(self) -> tuple[str, ...]:
        """Every relation phrase."""
        return tuple(word for group in self.relation_groups.values() for word in group)

    def objects(self, text: str) -> list[Span]:
        """The object mentions, repeats included, in text order."""
        tokens = _tokens(text)
        return [span for span in self._scan(text, tokens, self._objects, "object") if span.name]

    def attributes(self, text: str) -> list[Span]:
        """Colours, sizes and the like, outside object mentions ("orange" the fruit is none)."""
        return self._outside_objects(text, self._attributes, "attribute")

    def relations(self, text: str) -> list[Span]:
        """Prepositions and positions, outside object mentions; the longest phrase wins."""
        return self._outside_objects(text, self._relations, "relation")

    def canonical(self, word: str) -> str | None:
        """The object that a word or phrase names, by itself and unguarded; None where none."""
        words = tuple(token.text for token in _tokens(word))
        found = [e for e in self._objects.get(words[0], []) if e.words == words] if words else []
        return found[0].name if found else None

    def alternatives(self, span: Span) -> tuple[str, ...]:
        """The other words of the group of an attribute or relation, in the file's order."""
        groups = self.attribute_groups if span.kind == "attribute" else self.relation_groups
        for words in groups.values():
            if span.name in words:
                return tuple(word for word in words if word != span.name)
        return ()

    @staticmethod
    def official(path: str | Path) -> Vocabulary:
        """CHAIR's released ``synonyms.txt``, counted as its script does: ``OfficialVocabulary``."""
        from mlalign.vocabularies.chair_official import OfficialVocabulary

        return OfficialVocabulary.read(Path(path))

    def _outside_objects(self, text: str, trie: _Trie, kind: Kind) -> list[Span]:
        taken = [(span.start, span.end) for span in self.objects(text)]
        return [
            span
            for span in self._scan(text, _tokens(text), trie, kind)
            if not any(span.start < end and start < span.end for start, end in taken)
        ]

    def _scan(self, text: str, tokens: Sequence[_Token], trie: _Trie, kind: Kind) -> Iterator[Span]:
        """Leftmost longest match; spans of phrases that name nothing have an empty name."""
        i = 0
        while i < len(tokens):
            entry = next((e for e in trie.get(tokens[i].text, []) if _matches(e, tokens, i)), None)
            if entry is None or not self._allowed(entry, tokens, i):
                i += 1
                continue
            last = i + len(entry.words) - 1
            start, end = tokens[i].start, tokens[last].end
            yield Span(entry.name or "", start, end, kind, text[start:end])
            i = last + 1

    def _allowed(self, entry: _Entry, tokens: Sequence[_Token], i: int) -> bool:
        guard = entry.guard
        if guard is None:
            return True
        after = i + len(entry.words)
        previous = tokens[i - 1].text if i > 0 and tokens[i].joined else ""
        following = tokens[after].text if after < len(tokens) and tokens[after].joined else ""
        if previous in guard.unless_previous or following in guard.unless_next:
            return False
        if guard.only_near:
            said = {t.text for t in tokens[:i]} | {t.text for t in tokens[after:]}
            if not any(w in said or plural(w) in said for w in guard.only_near):
                return False
        if entry.plural:
            return True
        if guard.only_previous and previous not in guard.only_previous:
            return False
        if guard.noun and following and not self._closes(following):
            return False
        return not (guard.unless_color_follows and self._color_follows(tokens, after))

    def _closes(self, word: str) -> bool:
        """Whether a noun phrase can end before this word."""
        return word in self.closers or word.endswith(("ing", "ed"))

    def _color_follows(self, tokens: Sequence[_Token], i: int) -> bool:
        """The word is one of several colours: "orange and white cat", "orange, white and black"."""
        colors = self.attribute_groups.get("color", ())
        if i < len(tokens) and tokens[i].text in ("and", "or"):
            i += 1
        return i < len(tokens) and tokens[i].text in colors


def vocabulary(name_or_path: str | Path) -> Vocabulary:
    """The vocabulary that ships under this name, or that lies in this file.

    A ``.txt`` file is read as CHAIR's synonym list, with CHAIR's counting. Raises VocabularyError.
    """
    path = FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
        if not path.is_file():
            known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
            near = difflib.get_close_matches(str(name_or_path), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise VocabularyError(
                f"no vocabulary {str(name_or_path)!r}.{hint} There are: {', '.join(known)}; "
                "or give the path of a file"
            )
    return _read(path.resolve())


def plural(word: str, irregular: Mapping[str, str] | None = None) -> str:
    """The plural of a word or phrase (its last word), by rule and the irregular forms given."""
    head, blank, last = word.rpartition(" ")
    if irregular and last in irregular:
        ending = irregular[last]
    elif last.endswith("man") and last != "human":
        ending = last[:-3] + "men"
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        ending = last + "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        ending = last[:-1] + "ies"
    else:
        ending = last + "s"
    return head + blank + ending


def with_article(noun: str) -> str:
    """The noun with "a" or "an", by the first letter, which is enough for object words."""
    vowel = noun[:1].lower() in "aeiou" and not noun.startswith(("uni", "uri"))
    return f"{'an' if vowel else 'a'} {noun}"


def presence_question(name: str) -> str:
    """The question whether an object is there: "Is there an oven in the image?"."""
    return f"Is there {with_article(name)} in the image?"


def sentences(text: str) -> list[tuple[int, int]]:
    """Characters [start, end) of each sentence, in order; none of a blank text.

    A sentence ends behind full stops, exclamation or question marks (and what closes a quotation)
    that a blank or the end follows. "e.g. " so ends one: as ViGoR's released ratings were cut.
    """
    return [match.span() for match in _SENTENCE.finditer(text)]


@cache
def _read(path: Path) -> Vocabulary:
    if path.suffix == ".txt":
        return Vocabulary.official(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise VocabularyError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict) or not raw.get("objects"):
        raise VocabularyError(f"{path}: a vocabulary is a mapping with the key objects")
    unknown = sorted(set(raw) - _KEYS)
    if unknown:
        raise VocabularyError(
            f"{path}: unknown key {unknown[0]}. Known: {', '.join(sorted(_KEYS))}"
        )
    _check_strings(raw, str(path), "")
    companions = {name: tuple(near) for name, near in (raw.get("companions") or {}).items()}
    strangers = {n for name, near in companions.items() for n in (name, *near)} - set(
        raw["objects"]
    )
    if strangers:
        raise VocabularyError(
            f"{path}: companions names {sorted(strangers)}, which objects does not have"
        )
    attributes, relations = raw.get("attributes") or {}, raw.get("relations") or {}
    return Vocabulary(
        name=raw.get("name") or path.stem,
        names=tuple(raw["objects"]),
        attribute_groups={key: tuple(words) for key, words in attributes.items()},
        relation_groups={key: tuple(words) for key, words in relations.items()},
        companions=companions,
        closers=frozenset(raw.get("closers") or ()),
        _objects=_object_trie(raw, path),
        _attributes=_trie(_Entry(_split(w), w) for group in attributes.values() for w in group),
        _relations=_trie(_Entry(_split(w), w) for group in relations.values() for w in group),
    )


def _object_trie(raw: dict[str, Any], path: Path) -> _Trie:
    irregular = raw.get("plurals") or {}
    guards = {}
    for word, rules in (raw.get("guards") or {}).items():
        try:
            values: dict[str, Any] = {k: _tupled(v) for k, v in rules.items()}
            guards[word] = Guard(**values)
        except TypeError as error:
            raise VocabularyError(f"{path}: guards.{word}: {error}") from error
    young = raw.get("young") or {"words": [], "classes": []}
    known: dict[tuple[str, ...], _Entry] = {}

    def add(phrase: str, name: str | None, guard: Guard | None, is_plural: bool) -> None:
        words = _split(phrase)
        before = known.setdefault(words, _Entry(words, name, guard, is_plural))
        if before.name != name:
            raise VocabularyError(f"{path}: {phrase!r} names both {before.name!r} and {name!r}")

    for phrase in raw.get("not_objects") or ():
        add(phrase, None, None, False)
    for name, others in raw["objects"].items():
        for word in dict.fromkeys([name, *(others or ())]):
            guard = guards.get(word)
            add(word, name, guard, False)
            add(plural(word, irregular), name, guard, True)
            for prefix in young["words"] if name in young["classes"] else ():
                add(f"{prefix} {word}", name, None, False)
                add(f"{prefix} {plural(word, irregular)}", name, None, True)
    idle = set(guards) - {" ".join(entry.words) for entry in known.values()}
    if idle:
        raise VocabularyError(f"{path}: guards for {sorted(idle)}, which objects does not have")
    return _trie(known.values())


def _trie(entries: Iterable[_Entry]) -> _Trie:
    """Entries by first word, the longest first."""
    trie: _Trie = {}
    for entry in sorted(entries, key=lambda e: -len(e.words)):
        trie.setdefault(entry.words[0], []).append(entry)
    return trie


def _matches(entry: _Entry, tokens: Sequence[_Token], i: int) -> bool:
    part = tokens[i : i + len(entry.words)]
    return tuple(t.text for t in part) == entry.words and all(t.joined for t in part[1:])


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    for match in _WORD.finditer(text):
        gap = text[tokens[-1].end : match.start()] if tokens else ""
        joined = bool(_JOIN.fullmatch(gap))
        tokens.append(_Token(match[0].lower(), match.start(), match.end(), joined))
    return tokens


def _split(phrase: str) -> tuple[str, ...]:
    return tuple(token.text for token in _tokens(phrase))


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_strings(value: Any, file: str, key: str) -> None:
    """YAML reads a bare ``on`` or ``no`` as a truth value: refuse it by name."""
    if isinstance(value, dict):
        for k, v in value.items():
            _check_strings(k, file, f"{key}.{k}")
            _check_strings(v, file, f"{key}.{k}")
    elif isinstance(value, list):
        for v in value:
            if not isinstance(v, str):
                raise VocabularyError(
                    f"{file}: {key.lstrip('.')}: {v!r} is no text. Put it in quotes"
                )
    elif isinstance(value, bool) and not key.startswith(".guards."):
        _not_text(value, file, key)


def _not_text(value: Any, file: str, key: str) -> None:
    raise VocabularyError(f"{file}: {key.lstrip('.')}: {value!r} is no text. Put it in quotes")
