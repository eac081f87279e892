"""Word tables for the English rules: what may stand for what, and what turns a relation over."""

from __future__ import annotations

import re

ANIMALS = ("dog", "cat", "horse", "cow", "sheep")
LIVING = ("person", *ANIMALS, "bird", "elephant", "bear", "zebra", "giraffe")
"""What can do what a sentence says its subject does."""
PEOPLE = ("man", "woman", "boy", "girl", "child")
"""Words for a person who stands where an animal stood."""
GROUPS: tuple[tuple[str, ...], ...] = (
    ANIMALS,
    ("elephant", "bear", "zebra", "giraffe"),
    ("bicycle", "motorcycle"),
    ("car", "truck", "bus", "train"),
    ("boat", "surfboard"),
    ("traffic light", "fire hydrant", "stop sign", "parking meter"),
    ("bench", "chair", "couch", "bed", "dining table"),
    ("potted plant", "vase"),
    ("backpack", "umbrella", "handbag", "suitcase"),
    ("frisbee", "sports ball", "kite"),
    ("baseball bat", "tennis racket"),
    ("skis", "snowboard", "skateboard"),
    ("bottle", "cup", "wine glass", "bowl"),
    ("fork", "knife", "spoon", "scissors", "toothbrush"),
    ("banana", "apple", "orange", "carrot", "broccoli"),
    ("sandwich", "hot dog", "pizza", "donut", "cake"),
    ("tv", "laptop", "cell phone", "remote", "keyboard", "mouse", "book", "clock", "teddy bear"),
    ("microwave", "oven", "toaster", "refrigerator", "sink", "toilet"),
)
"""Objects of which one can stand in a sentence where another stood."""

SAY = {"sports ball": "ball", "cell phone": "phone", "dining table": "table", "skis": "skis"}
"""How people say a class in a caption; the class's own name otherwise."""

CARRIED = ("backpack", "umbrella", "handbag", "suitcase", "frisbee", "sports ball", "kite",
           "tennis racket", "skateboard", "surfboard", "bottle", "cup", "cell phone",
           "book")  # fmt: skip
"""What a person may have "with" them."""

STANDING = ("bench", "bicycle", "car", "dog", "motorcycle", "truck", "horse", "umbrella", "bird")
"""What a scene may happen "near"."""

NATURAL_COLOURS = ("black", "white", "brown")
COMMON_COLOURS = ("red", "green", "blue", "yellow", "white", "black", "brown", "orange", "pink")
HAIR_COLOURS = ("brown", "black", "red")

OPPOSITE_SIZE = {"small": "large", "little": "large", "tiny": "huge", "large": "small",
                 "big": "small", "huge": "tiny", "giant": "tiny"}  # fmt: skip

OPPOSITE_RELATION = {
    "on top of": "under", "on": "under", "onto": "under", "under": "on top of",
    "underneath": "on top of", "beneath": "on top of", "below": "above", "above": "below",
    "over": "under", "in front of": "behind", "behind": "in front of", "inside of": "outside of",
    "inside": "outside", "outside of": "inside", "outside": "inside",
    "to the left of": "to the right of", "to the right of": "to the left of",
    "left of": "right of", "right of": "left of", "on the left of": "on the right of",
    "on the right of": "on the left of",
}  # fmt: skip
"""No "near, far from": nobody can see that from words that stand on one side only."""

OVER = re.compile(
    r"(?:on|onto|on top of|over) (?:(?:an?|the|his|her|their|its|some|two|one) )?(?:[a-z-]+ ){0,2}?"
    r"(?:rocks?|boulders?|bench(?:es)?|tables?|tires?|logs?|blankets?|beds?|chairs?|horses?|bikes?|"
    r"bicycles?|motorcycles?|roofs?|bridges?|trees?|branch(?:es)?|boats?|cars?|trucks?|couch|sofa|"
    r"swings?|stage|platform|fence|railing|rail|wall|ladder|box(?:es)?|trampoline|towel|mat|pillow|"
    r"hurdles?|bars?|poles?|obstacles?|hood|steps?|stairs|ledge|frisbee|skateboard|surfboard|"
    r"snowboard|dock|pier|float|raft|slide|cart|statue|sculpture|net|rope|puddle|ramp)\b",
    re.IGNORECASE,
)
"""What one can be under as well as on; "under the grass" would be false without a look."""

SMALL_WORDS = ("in", "at", "of", "with", "by", "from", "into", "to", "for", "like", "as", "and",
               "or", "while", "that", "which", "who", "is", "are")  # fmt: skip

NUMBERS = ("one", "two", "three", "four", "five", "six", "several", "many", "some", "few", "both",
           "all", "various", "multiple", "couple", "group", "these", "those")  # fmt: skip
MANY = ("two", "three", "four", "five", "six", "several", "many", "few", "both", "various",
        "multiple", "these", "those")  # fmt: skip
DETERMINERS = ("a", "an", "the", "this", "that", "his", "her", "its", "their", "another", "each",
               "one", "my", "our", "no", "any")  # fmt: skip

HUMAN = re.compile(
    r"\b(his|her|hers|him|he|she|himself|herself|themselves|shirts?|t-shirts?|shorts|pants|jeans|"
    r"\w*coats?|jackets?|dress(es|ed)?|hats?|helmets?|caps?|\w*suits?|glasses|sunglasses|uniforms?|"
    r"hair|haired|hands?|arms?|wear(s|ing)?|outfits?|costumes?|jersey|bikini|cloth(es|ing)|trunks|"
    r"hold(s|ing)?|smil(es|ing)|talk(s|ing)?|read(s|ing)?|rid(e|es|ing)|pos(e|es|ing)|camera|"
    r"throw(s|ing)?|kick(s|ing)?|climb(s|ing)?|play(s|ing)|skat\w+|surf\w+|ski(s|ing)|bik\w+|"
    r"guitar|rappel\w*|kayak\w*|\w*ball|team|game|race|speak\w*|sing\w*|danc\w+|pictures?|cook\w*|eat\w*|work\w*|"
    r"sell\w*|driv\w+|paint\w*|fish\w*|hik\w+|perform\w*|danc\w+|spray\w*|swing\w*|group|crowd|wait\w*)\b",
    re.IGNORECASE,
)
"""What tells that a sentence is about people: an animal in their place would read absurdly."""

ANIMAL = re.compile(
    r"\b(its|it|ears?|mouth|leash|collars?|collared|fur|furred|furry|tails?|paws?|bark\w*|owners?|muzzle|"
    r"muzzled|shaggy|fetch\w*|breeds?|bit(es?|ing)|chew\w*|puppy|puppies|pup|hind|male|female|"
    r"markings|spotted|saddle|graz\w+|agility|course|hurdle|sniff\w*|lick\w*|animals?)\b",
    re.IGNORECASE,
)
"""What tells that a sentence is about an animal: a person in its place would read absurdly."""


def group_of(name: str) -> tuple[str, ...]:
    """The objects that can stand in for this one; empty where there are none (person)."""
    return next((group for group in GROUPS if name in group), ())
