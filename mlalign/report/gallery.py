"""Sections of records with their images: attention, training pairs, answers before and after."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

from markupsafe import Markup
from PIL import Image

from mlalign.images import open_image
from mlalign.objects import Vocabulary, vocabulary
from mlalign.records import RecordError
from mlalign.report import figures as fg
from mlalign.report import marks, overlays, pictures
from mlalign.report.folder import Run
from mlalign.report.join import Index, Known, answer_of
from mlalign.report.section import Group, Section, render

CAPTIONS = "chair"
"""The benchmark whose free answers are shown."""
PROBED = 6
"""Cards of the probe set."""
PAIRS = 9
"""Cards of training pairs, over all arms."""
ANSWERS = 9
"""Cards of held-out answers."""
PAIR_KEY = Markup(
    '<p class="key"><mark class="chosen">only in chosen</mark>'
    '<mark class="rejected">only in rejected</mark></p>'
)
ANSWER_KEY = Markup(
    '<p class="key"><mark class="false">not known to be in the image</mark>'
    '<mark class="true">in the image</mark></p>'
)


class Album:
    """What the cards of one run share."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.index = Index(run)
        self.mode = str((run.recipe.get("model") or {}).get("image", "crop"))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The run's object vocabulary."""
        return vocabulary((self.run.recipe.get("data") or {}).get("vocabulary", "coco"))

    def card(self, known: Known, details: list[str], answers: list[dict[str, Any]]) -> Markup:
        """One record as a card."""
        image, missing = self.image(known)
        listed = ", ".join(sorted(self.there(known))) or "no objects known"
        return render(
            "card.html.j2",
            id=known.id,
            details=details,
            image=pictures.data_uri(pictures.boxed(image, known.facts.objects)) if image else "",
            missing=missing,
            alt=f"image of {known.id}; in it: {listed}",
            prompt=known.prompt,
            answers=answers,
            maps=overlays.of(known.maps, image, self.run.arms, self.mode) if image else [],
        )

    def there(self, known: Known) -> frozenset[str]:
        """What is known to be in the image."""
        return marks.present(known.facts, self.vocabulary)

    def claims(self, name: str, text: str, there: Any) -> dict[str, Any]:
        """An answer with its object words marked, and what it leaves out."""
        html = marks.marked(text, marks.claimed(text, there, self.vocabulary))
        left_out = sorted(set(there) - {span.name for span in self.vocabulary.objects(text)})
        if left_out:
            html += Markup(' <span class="missed">leaves out: {}</span>').format(
                ", ".join(left_out)
            )
        return {"name": name, "html": html}

    @staticmethod
    def image(known: Known) -> tuple[Image.Image | None, str]:
        """The record's picture; or None, and why there is none."""
        if known.image is None:
            return None, "no image is stored with this record"
        try:
            return open_image(known.image, known.id), ""
        except RecordError as error:
            return None, str(error)


@lru_cache(maxsize=1)
def album_of(run: Run) -> Album:
    """The album of a run, made once for all its sections."""
    return Album(run)


def looks_section(run: Run, figures: fg.Figures) -> Section:
    """The probe set's records: what each model attends to while it writes an object's name."""
    title, anchor = "Where the model looks", "looks"
    album = album_of(run)
    probed = [k for k in album.index.by_id.values() if k.maps and k.probe_pair]
    if not probed:
        return Section(id=anchor, title=title, empty="no attention maps were logged")
    cards = [_probe_card(album, known) for known in spread(probed, PROBED)]
    note = (
        f"{len(cards)} of the {len(run.probe_set)} records of the probe set, evenly spaced. Boxes "
        "are the facts. Attention is the mean over layers and heads from the token before the "
        "word; one scale for all maps of a word. The base model beside the aligned ones."
    )
    html = PAIR_KEY + ANSWER_KEY + Markup("").join(cards)
    return Section(id=anchor, title=title, note=note, html=html)


def pairs_section(run: Run, figures: fg.Figures) -> Section:
    """Training pairs by arm."""
    album = album_of(run)
    arms = [arm for arm in run.arms if run.preferences.get(arm)]
    groups = []
    for arm in arms:
        chosen = spread(run.preferences[arm], max(1, PAIRS // len(arms)))
        cards = [_pair_card(album, arm, album.index.by_id[pair.id]) for pair in chosen]
        groups.append(Group(name=arm, html=Markup("").join(cards)))
    return Section(
        id="pairs",
        title="Training pairs",
        note="Evenly spaced over each builder's pairs, not picked." if groups else "",
        html=PAIR_KEY if groups else "",
        groups=tuple(groups),
        empty="" if groups else "no pairs under data/",
    )


def answers_section(run: Run, figures: fg.Figures) -> Section:
    """Held-out answers of the base and of every arm: what was mended, what broke, and the rest."""
    title, anchor = "Answers before and after", "answers"
    album = album_of(run)
    asked = [k for k in album.index.by_id.values() if "base" in k.answers.get(CAPTIONS, {})]
    if not asked:
        empty = f"no eval/base-{CAPTIONS}.jsonl: no answers were stored"
        return Section(id=anchor, title=title, empty=empty)
    kinds: dict[str, list[Known]] = {"mended": [], "broken": [], "same": []}
    for known in asked:
        kinds[_kind(album, known)].append(known)
    each = ANSWERS // len(kinds)
    cards = [
        _answer_card(album, known, kind)
        for kind, members in kinds.items()
        for known in spread(members, each)
    ]
    counts = {kind: len(members) for kind, members in kinds.items()}
    note = (
        f"Of {len(asked)} images, over the {len(_aligned(run))} aligned models: {counts['mended']} "
        f"lost false objects, {counts['broken']} gained some, {counts['same']} kept as many. "
        f"Up to {each} of each are shown, evenly spaced, whatever their share."
    )
    html = ANSWER_KEY + Markup("").join(cards)
    return Section(id=anchor, title=title, note=note, html=html)


def spread(items: list[Any], count: int) -> list[Any]:
    """At most ``count`` items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _pair_card(album: Album, arm: str, known: Known) -> Markup:
    pair = known.pairs[arm]
    ours, theirs = marks.pair_marks(pair)
    answers = [
        {"name": "chosen", "html": marks.marked(pair.chosen, ours)},
        {"name": "rejected", "html": marks.marked(pair.rejected, theirs)},
    ]
    details = [str(pair.origin[k]) for k in ("builder", "how", "source") if pair.origin.get(k)]
    logged = known.logged.get(arm) or []
    margins = [row["margin"] for row in logged if row.get("margin") is not None]
    if margins:
        details.append(f"margin {margins[0]:+.2f} \u2192 {margins[-1]:+.2f}")
    return album.card(known, details, answers)


def _probe_card(album: Album, known: Known) -> Markup:
    assert known.probe_pair is not None
    chosen, rejected = known.probe_pair
    ours, theirs = marks.difference(chosen, rejected)
    answers = [
        album.claims("base model's own answer", known.own, album.there(known)),
        {"name": "chosen", "html": marks.marked(chosen, ours)},
        {"name": "rejected", "html": marks.marked(rejected, theirs)},
    ]
    return album.card(known, [], answers)


def _answer_card(album: Album, known: Known, kind: str) -> Markup:
    answers = []
    for arm, row in _rows(album, known).items():
        name = "base" if arm == "base" else f"aligned by {arm}"
        answers.append(album.claims(name, answer_of(row), _there(album, known, row)))
    words = {"mended": "lost false objects", "broken": "gained false objects", "same": "as before"}
    return album.card(known, [words[kind]], answers)


def _kind(album: Album, known: Known) -> str:
    rows = _rows(album, known)
    counts = {arm: _false(album, known, row) for arm, row in rows.items()}
    after = [count for arm, count in counts.items() if arm != "base"]
    if not after:
        return "same"
    change = sum(after) - counts["base"] * len(after)
    return "mended" if change < 0 else "broken" if change > 0 else "same"


def _false(album: Album, known: Known, row: dict[str, Any]) -> int:
    there = _there(album, known, row)
    found = marks.claimed(answer_of(row), there, album.vocabulary)
    return sum(mark.kind == "false" for mark in found)


def _there(album: Album, known: Known, row: dict[str, Any]) -> Any:
    """What the benchmark took as there, so that the page marks what the score counted."""
    gold = row.get("gold")
    return gold if isinstance(gold, list) else album.there(known)


def _rows(album: Album, known: Known) -> dict[str, dict[str, Any]]:
    """Base first, then the arms in their order; the first answer of each."""
    found = known.answers[CAPTIONS]
    order = ["base", *album.run.arms]
    return {arm: found[arm][0] for arm in order + sorted(set(found) - set(order)) if arm in found}


def _aligned(run: Run) -> list[str]:
    return [arm for arm, benchmark in run.evals if benchmark == CAPTIONS and arm != "base"]
