"""What the surrogate is trained to say."""

from __future__ import annotations

import random
from collections import Counter

from mlalign.objects import vocabulary
from mlalign.photos.sft_data import Mix, Photo, describe, present, read_photos, rows, tidy

DOG = ("A brown dog runs on the grass.", "The dog plays.", "A dog with a red ball on grass.")
MAN = ("A man rides a bicycle.", "A man in a blue shirt on a bike in the street.", "A cyclist.")
SEA = ("Waves at the beach.", "The sea and sand.", "An empty beach by the ocean.")


def photos(number: int) -> list[Photo]:
    return [Photo(f"{i}.jpg", (DOG, MAN, SEA)[i % 3]) for i in range(number)]


def test_tidy() -> None:
    assert tidy("a dog , running  on grass .") == "A dog, running on grass."


def test_present_reads_coco_and_surroundings() -> None:
    words = vocabulary("coco")
    assert {"dog", "grass", "sports ball"} <= present(Photo("a", DOG), words)
    assert {"person", "bicycle", "street", "shirt"} <= present(Photo("b", MAN), words)
    assert "person" not in present(Photo("c", SEA), words)


def test_description_joins_what_differs() -> None:
    text = describe(DOG, random.Random(0))
    assert 2 <= sum(caption in text for caption in DOG) <= 3


def test_as_many_no_as_yes_per_word() -> None:
    words = vocabulary("coco")
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows(photos(120), words, Mix(questions=100), seed=0):
        for prompt, answer in row.branches:
            if answer in ("Yes", "No") and "there" in prompt:
                counts[prompt, answer] += 1
    yes = sum(n for (_, answer), n in counts.items() if answer == "Yes")
    no = sum(n for (_, answer), n in counts.items() if answer == "No")
    assert yes and abs(yes - no) <= 0.1 * yes


def test_questions_are_true_of_the_captions() -> None:
    words = vocabulary("coco")
    made = photos(60)
    there = {p.name: present(p, words) for p in made}
    for row in rows(made, words, Mix(), seed=1):
        for prompt, answer in row.branches:
            if prompt == "Is there a dog in the image?":
                assert (answer == "Yes") == ("dog" in there[row.name])
            if prompt == "Is the dog brown?":
                assert answer == "Yes"


def test_the_seed_decides() -> None:
    words = vocabulary("coco")
    assert rows(photos(9), words, Mix(), 0) == rows(photos(9), words, Mix(), 0)
    assert rows(photos(9), words, Mix(), 0) != rows(photos(9), words, Mix(), 1)


def test_reads_the_photographs(shared_data) -> None:
    train = read_photos(shared_data / "flickr8k", "train")
    dev = read_photos(shared_data / "flickr8k", "dev")
    assert len(train) == 4000 and len(dev) == 300
    assert not {p.name for p in train} & {p.name for p in dev}
    assert all(p.captions for p in train)
