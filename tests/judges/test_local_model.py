"""A local model's answers: the same by branches as one question at a time."""

import pytest
import torch
from PIL import Image

from mlalign.images import open_image, to_png
from mlalign.judges.local_model import METHOD
from mlalign.microworld import world
from mlalign.records import Example, Facts, ImageRef, RecordError

QUESTIONS = [
    "Is there a pot in the image?",
    "Is there a red kettle at the top left?",
    "Is the dog blue?",
    "Can you see a flag in this photo?",
]


@pytest.fixture(scope="module")
def vlm(tiny_llava):
    from mlalign.models.loading import load_vlm_from

    return load_vlm_from(tiny_llava, dtype="float32")


def judge(vlm, **settings):
    return METHOD(METHOD.Settings(**settings), vlm=vlm)


def test_equals_plain_forward_of_each_question(vlm):
    examples = [world.example("pairs", i) for i in range(3)]
    asked = [QUESTIONS, QUESTIONS[:1], QUESTIONS[1:3]]
    answers = judge(vlm, images_per_batch=2, questions_per_row=3).ask_many(examples, asked)
    yes, no = (
        [vlm.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in words]
        for words in (("yes", "Yes"), ("no", "No"))
    )
    for example, questions, given in zip(examples, asked, answers, strict=True):
        pixels = vlm.image(open_image(example.image, example.id)).tensors["pixel_values"]
        assert len(given) == len(questions)
        for question, answer in zip(questions, given, strict=True):
            ids = torch.tensor([vlm.prefix_ids(question, (96, 96))])
            with torch.no_grad():
                logits = vlm.core(input_ids=ids, pixel_values=pixels).logits[0, -1]
            p = logits.softmax(-1)
            assert answer.p_yes == pytest.approx(float(p[yes].sum()), rel=1e-4)
            assert answer.p_no == pytest.approx(float(p[no].sum()), rel=1e-4)


def test_neither_answer_at_all_is_undecided(vlm, monkeypatch):
    from mlalign.judges import local_model

    monkeypatch.setattr(
        local_model,
        "next_token_logps",
        lambda model, rows: torch.full((len(rows.row_C), len(vlm.tokenizer)), -1e4),
    )
    (answer,) = judge(vlm).ask(world.example("pairs", 0), QUESTIONS[:1])
    assert not answer.decided and answer.verdict is None


def test_no_question_no_answer(vlm):
    examples = [world.example("pairs", i) for i in range(2)]
    assert judge(vlm).ask_many(examples, [[], QUESTIONS[:1]])[0] == []
    assert judge(vlm).ask(examples[0], []) == []


def test_unknown_spellings_and_templates_are_refused(vlm):
    example = world.example("pairs", 0)
    with pytest.raises(ValueError, match="knows none of the spellings"):
        judge(vlm, yes=("qwertz",)).ask(example, QUESTIONS)
    with pytest.raises(ValueError, match="same token"):
        judge(vlm, yes=("no",)).ask(example, QUESTIONS)
    with pytest.raises(ValueError, match="question"):
        judge(vlm, template="Say yes or no.")
    with pytest.raises(ValueError, match="no model"):
        METHOD(METHOD.Settings())


def test_a_bad_image_is_named(vlm, tmp_path):
    whole = to_png(Image.effect_noise((64, 64), 50).convert("RGB"))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    bad = Example(
        id="broken-7",
        image=ImageRef(path=str(tmp_path / "cut.png")),
        image_sha256="",
        prompt="?",
        facts=Facts(),
        source="test",
    )
    with pytest.raises(RecordError, match=r"broken-7.*cut\.png.*Fetch the file again"):
        judge(vlm).ask(bad, QUESTIONS)
