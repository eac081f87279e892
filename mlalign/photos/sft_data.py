"""Captioned photographs -> what the surrogate is trained to say: captions, descriptions, yes/no.

Each photograph gives one row of independent question-and-answer branches (they share the image and
do not see each other): human captions as they are, a description that joins two or three captions
which say different things, and balanced yes/no questions. Balance is per object and per colour:
over the data set a word has as many "No" as "Yes", else the model learns that "person" is always
right. Half of the false objects are typical companions of what is there.
Caption-derived: an object in none of the five captions may still be in the photograph.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlalign.objects import Vocabulary, plural, with_article

SHORT_PROMPTS = (
    "Describe this image in one sentence.",
    "Write a short caption for this image.",
    "What is happening in this picture?",
)
DETAIL_PROMPTS = (
    "Describe this image in detail.",
    "Please describe this image in detail.",
    "Describe the image.",
)
_QUESTIONS = (
    "Is there {} in the image?",
    "Is there {} in the image?",
    "Is there {} in the image?",
    "Can you see {} in this picture?",
)
_MASS = frozenset({"grass", "water", "snow", "sand"})
SURROUNDINGS = {
    "grass": ("lawn",), "water": ("ocean", "sea", "lake", "river", "wave"), "snow": ("snowy",),
    "sand": ("sandy",), "beach": ("shore",), "tree": ("forest", "woods"),
    "rock": ("boulder", "cliff"),
    "mountain": ("hill",), "street": ("road", "sidewalk"), "building": ("house",), "fence": (),
    "wall": (), "flower": (), "toy": (), "stick": (), "swimming pool": ("pool",), "helmet": (),
    "hat": ("cap",), "shirt": ("t-shirt",), "jacket": ("coat",), "dress": (), "rope": (),
    "ramp": (), "swing": (), "bridge": (), "crowd": (), "field": (), "tent": (), "slide": (),
}  # fmt: skip
"""What surrounds the 80 COCO classes in everyday captions, with further words: most photographs
have only one or two COCO objects, and a model that is asked of no others learns little to see."""
_COLOURS = (
    "black", "white", "brown", "red", "blue", "green", "yellow", "orange", "pink", "purple", "gray",
)  # fmt: skip
_ALIKE = ({"brown", "orange", "yellow"}, {"pink", "purple", "red"}, {"gray", "black", "white"})
"""Colours that people mix up: never used as a false colour of one another."""
_STOP = frozenset(
    (
        "a", "an", "the", "of", "in", "on", "at", "to", "and", "with", "is", "are", "his", "her",
        "its", "their", "by", "from", "for", "as", "it", "through", "while", "up",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Photo:
    """One photograph and its captions."""

    name: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """What is trained on one photograph in one epoch: independent (prompt, answer) branches."""

    name: str
    branches: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Mix:
    """How many branches of each kind a row gets."""

    captions: int = 3
    descriptions: int = 1
    questions: int = 6
    """At most, of objects and surroundings."""
    colours: int = 1
    """At most."""
    quota: int = 700
    """Yes-questions of one word in one epoch, at most; as many No-questions."""


def read_photos(root: str | Path, split: str) -> list[Photo]:
    """The photographs that ``<split>.txt`` names, with tidied captions."""
    folder = Path(root)
    captions = {}
    for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        captions[entry["image"]] = tuple(tidy(text) for text in entry["captions"] if text.strip())
    names = (folder / f"{split}.txt").read_text(encoding="utf-8").split()
    return [Photo(name, captions[name]) for name in names]


def tidy(caption: str) -> str:
    """One sentence: single blanks, a capital first, a full stop last and none before."""
    text = re.sub(r"\s+", " ", caption).strip().strip('"').rstrip(" .")
    text = re.sub(r" ([,.;:!?])", r"\1", text)
    return text[:1].upper() + text[1:] + "."


def describe(captions: Sequence[str], rng: random.Random) -> str:
    """Two or three captions that say different things, the first drawn at random."""
    chosen = [rng.choice(captions)]
    said = _content(chosen[0])
    while len(chosen) < 3:
        rest = [c for c in captions if c not in chosen]
        best = max(rest, key=lambda c: len(_content(c) - said), default=None)
        if best is None or (len(chosen) == 2 and len(_content(best) - said) < 3):
            break
        chosen.append(best)
        said |= _content(best)
    return " ".join(chosen)


def rows(photos: Sequence[Photo], vocabulary: Vocabulary, mix: Mix, seed: int) -> list[Row]:
    """One epoch, in a random order; another seed draws other branches."""
    rng = random.Random(seed)
    asked = _presence(photos, vocabulary, mix, rng)
    colours = _colours(photos, vocabulary, mix, rng)
    out = []
    for photo in photos:
        branches = [
            (rng.choice(SHORT_PROMPTS), text)
            for text in rng.sample(photo.captions, min(mix.captions, len(photo.captions)))
        ]
        branches += [
            (rng.choice(DETAIL_PROMPTS), describe(photo.captions, rng))
            for _ in range(mix.descriptions)
        ]
        branches += asked[photo.name] + colours[photo.name]
        out.append(Row(photo.name, tuple(branches)))
    rng.shuffle(out)
    return out


def present(photo: Photo, vocabulary: Vocabulary) -> frozenset[str]:
    """COCO classes and surroundings that some caption mentions."""
    found = {span.name for text in photo.captions for span in vocabulary.objects(text)}
    words = set(re.findall(r"[a-z-]+", " ".join(photo.captions).lower()))
    text = " ".join(photo.captions).lower()
    for name, others in SURROUNDINGS.items():
        for word in (name, *others):
            if (word in text) if " " in word else ({word, plural(word)} & words):
                found.add(name)
    return frozenset(found)


def _presence(
    photos: Sequence[Photo], vocabulary: Vocabulary, mix: Mix, rng: random.Random
) -> dict[str, list[tuple[str, str]]]:
    """Questions of presence by photograph: per word as many No as Yes."""
    there = {photo.name: present(photo, vocabulary) for photo in photos}
    counts = Counter(name for names in there.values() for name in names)
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for names in there.values():
        for one in names:
            together[one].update(names - {one})
    asked: dict[str, list[tuple[str, str]]] = {photo.name: [] for photo in photos}
    order = [photo.name for photo in photos]
    for word in sorted(counts, key=lambda w: counts[w]):  # rare words take their place first
        rng.shuffle(order)
        with_word = [n for n in order if word in there[n]]
        without = [n for n in order if word not in there[n]]
        number = min(len(with_word), len(without), mix.quota)
        # The first half by companions: photographs whose objects often come with the word.
        without.sort(key=lambda n: -_closeness(word, there[n], together, counts) * rng.random())
        half = without[: number // 2]
        rest = without[number // 2 :]
        rng.shuffle(rest)
        for answer, names in (
            ("Yes", with_word[:number]),
            ("No", half + rest[: number - len(half)]),
        ):
            for name in names:
                asked[name].append((rng.choice(_QUESTIONS).format(_noun(word)), answer))
    for name, questions in asked.items():
        rng.shuffle(questions)
        asked[name] = _balanced(questions, mix.questions)
    return asked


def _balanced(questions: list[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    """At most ``most`` questions, Yes and No in turn as long as both are there."""
    yes = [q for q in questions if q[1] == "Yes"]
    no = [q for q in questions if q[1] == "No"]
    half = most // 2
    return yes[: max(half, most - len(no))] + no[: max(half, most - len(yes))]


def _closeness(
    word: str,
    names: frozenset[str],
    together: Mapping[str, Counter[str]],
    counts: Counter[str],
) -> float:
    """How typical the word is beside the most telling of these names."""
    return max((together[name][word] / counts[name] for name in names), default=0.0)


def _colours(
    photos: Sequence[Photo], vocabulary: Vocabulary, mix: Mix, rng: random.Random
) -> dict[str, list[tuple[str, str]]]:
    """Questions of colour by photograph; a false colour is drawn as often as it is true."""
    found = {photo.name: _coloured(photo, vocabulary) for photo in photos}
    pool = [c for pairs in found.values() for colours in pairs.values() for c in colours]
    asked: dict[str, list[tuple[str, str]]] = {photo.name: [] for photo in photos}
    for name, pairs in found.items():
        for noun, colours in rng.sample(sorted(pairs.items()), min(mix.colours, len(pairs))):
            if rng.random() < 0.5:
                asked[name].append((f"Is the {noun} {rng.choice(sorted(colours))}?", "Yes"))
                continue
            near = set(colours).union(*(group for group in _ALIKE if group & colours))
            wrong = [c for c in pool if c not in near]
            if wrong:
                asked[name].append((f"Is the {noun} {rng.choice(wrong)}?", "No"))
    return asked


def _coloured(photo: Photo, vocabulary: Vocabulary) -> dict[str, set[str]]:
    """Object -> colours said right before it. People are left out: their "black" is no paint."""
    out: dict[str, set[str]] = defaultdict(set)
    for text in photo.captions:
        ends = {s.end: s.name for s in vocabulary.attributes(text) if s.name in _COLOURS}
        for span in vocabulary.objects(text):
            colour = ends.get(span.start - 1)
            if colour and span.name != "person":
                out[span.name].add(colour)
        for colour, noun in re.findall(
            r"\b([a-z]+) (shirt|jacket|hat|dress|helmet)\b", text.lower()
        ):
            if colour in _COLOURS:
                out[noun].add(colour)
    return out


def _content(text: str) -> set[str]:
    return {w for w in re.findall(r"[a-z]+", text.lower()) if w not in _STOP}


def _noun(word: str) -> str:
    return word if word in _MASS or word == "skis" else with_article(word)
