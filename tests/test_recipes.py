"""Every recipe in the repository is read, and none is overlooked; the published systems' presets
hold the published values."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlalign import methods, recipe
from tests._syntax import REPOSITORY

FOLDER = REPOSITORY / "recipes"
SYSTEMS = ("ha_dpo", "povid", "rlaif_v", "rlhf_v", "silkie", "mdpo")
PRESETS = {
    "ha_dpo": {"llava15_7b.paper", "llava15_7b.script"},
    "povid": {
        "llava15_7b.paper.stage1",
        "llava15_7b.paper",
        "llava15_7b.script.stage1",
        "llava15_7b.script",
    },
    "rlaif_v": {"llava15_7b.paper", "llava15_7b.script", "llava15_7b.script_lora"},
    "rlhf_v": {"llava15_7b.paper", "llava15_7b.script"},
    "silkie": {"llava15_7b.paper", "llava15_7b.script", "qwen2_vl.script"},
    "mdpo": {"llava15_7b.paper", "llava15_7b.script"},
}
# What the papers and scripts say: objective, beta, learning rate, pairs a step, epochs or steps,
# warm-up, weight decay, adapter (rank, alpha, dropout in effect).
PUBLISHED = {
    "ha_dpo/llava15_7b.paper": ("dpo", 0.1, 2e-6, 128, "1 epoch", 0.0, 0.0, (128, 256, 0.0)),
    "ha_dpo/llava15_7b.script": ("dpo", 0.1, 2e-6, 128, "1 epoch", 0.03, 0.0, (128, 256, 0.0)),
    "povid/llava15_7b.paper.stage1": ("dpo", 0.1, 1e-7, 1, "3 epoch", 0.03, 0.0, (128, 256, 0.0)),
    "povid/llava15_7b.paper": ("povid", 0.1, 1e-7, 1, "1 epoch", 0.03, 0.0, (128, 256, 0.0)),
    "povid/llava15_7b.script.stage1": ("dpo", 0.1, 1e-7, 1, "3 epoch", 0.03, 0.0, (128, 256, 0.0)),
    "povid/llava15_7b.script": ("povid", 0.1, 1e-7, 1, "1 epoch", 0.03, 0.0, (128, 256, 0.0)),
    "rlaif_v/llava15_7b.paper": ("dpo", 0.1, 5e-7, 8, "4 epoch", 0.05, 0.01, None),
    "rlaif_v/llava15_7b.script": ("dpo", 0.1, 5e-7, 8, "2672 step", 0.05, 0.01, None),
    "rlaif_v/llava15_7b.script_lora": (
        *("dpo", 0.1, 1e-5, 8, "2672 step", 0.05, 0.01),
        (64, 16, 0.05),
    ),
    "rlhf_v/llava15_7b.paper": ("ddpo", 0.5, 5e-7, 32, "7 epoch", 0.1, 0.0, None),
    "rlhf_v/llava15_7b.script": ("ddpo", 0.1, 5e-7, 8, "2160 step", 0.03, 0.0, None),
    "silkie/llava15_7b.paper": ("dpo", 0.1, 1e-5, 256, "3 epoch", 0.1, 0.05, (64, 16, 0.0)),
    "silkie/llava15_7b.script": ("dpo", 0.1, 1e-5, 256, "3 epoch", 0.1, 0.05, (64, 16, 0.0)),
    "silkie/qwen2_vl.script": ("dpo", 0.1, 1e-5, 256, "3 epoch", 0.1, 0.05, (64, 16, 0.0)),
    "mdpo/llava15_7b.paper": ("mdpo", 0.1, 1e-5, 32, "3 epoch", 0.1, 0.05, (64, 128, 0.0)),
    "mdpo/llava15_7b.script": ("mdpo", 0.1, 1e-5, 32, "3 epoch", 0.1, 0.05, (64, 128, 0.0)),
}
# Systems that learn from rewards: what lies in each folder. A reward model has a recipe of its own.
REWARDED = {
    "llava_rlhf": {
        f"{model}{stage}"
        for model in (
            *(f"llava15_{size}.{which}" for size in ("7b", "13b") for which in ("paper", "script")),
            "microworld",
            "photos",
        )
        for stage in ("", ".reward")
    },
    "vigor": {
        f"{model}{stage}"
        for model in ("llava15_7b", "microworld", "photos")
        for stage in ("", ".reward")
    },
    "claim_grpo": {"llava15_7b", "microworld", "photos"},
}
POLICIES = sorted(
    f"{system}/{name}"
    for system, names in REWARDED.items()
    for name in names
    if f"{name}.reward" in names
)
ON_DISK = sorted(p for p in FOLDER.rglob("*") if p.suffix in (".yaml", ".yml"))


def parse(path: Path) -> Any:
    """A recipe by its schema: ``base.yaml`` has that of the ``train_base`` of its room."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(raw, dict), f"{path}: not a mapping"
    if path.name != "base.yaml":
        return recipe.load(path)
    room = importlib.import_module(f"mlalign.{path.parent.name}.train_base")
    if "sft" in raw:
        from mlalign.train.sft import SftSettings

        SftSettings.model_validate(raw["sft"])
    return room.BaseRecipe.model_validate(raw)


def method_refs(parsed: recipe.Recipe) -> list[tuple[str, recipe.MethodRef]]:
    """(room, reference) of every method that a recipe names."""
    refs: list[tuple[str, recipe.MethodRef]] = []
    refs += [("data_builders", ref) for ref in parsed.data.builders]
    refs += [("mlalign.probes", ref) for ref in parsed.probes.methods]
    refs += [("mlalign.benchmarks", ref) for ref in parsed.eval.benchmarks]
    sources = (parsed.data.source, parsed.eval.source, parsed.probes.source)
    refs += [("data_builders.sources", ref) for ref in sources if ref is not None]
    released = parsed.data.pairs.values()
    refs += [("data_builders.sources", ref) for ref in released if not isinstance(ref, str)]
    asked = (parsed.data.judge, parsed.data.writer)
    refs += [("mlalign.judges", ref) for ref in asked if ref is not None]
    for train in (parsed.train, *(parsed.train_of(arm) for arm in parsed.arms())):
        refs.append(("mlalign.train.algorithms", train.algorithm))
        if train.objective is not None:
            refs.append(("mlalign.objectives", train.objective))
        rewards = train.algorithm.settings().get("rewards", ())
        refs += [("mlalign.rewards", _reward(each)) for each in rewards]
    return refs


def _reward(raw: Any) -> recipe.MethodRef:
    """A term of ``rewards`` without its weight."""
    given = {"name": raw} if isinstance(raw, str) else dict(raw)
    given.pop("weight", None)
    return recipe.MethodRef(**given)


def test_every_recipe_on_disk_parses() -> None:
    parsed = [parse(path) for path in ON_DISK]
    assert len(parsed) == len(ON_DISK) > 0


@pytest.mark.parametrize("path", ON_DISK, ids=lambda p: str(p.relative_to(FOLDER)))
def test_recipe_names_what_is_there(path: Path) -> None:
    parsed = parse(path)
    if not isinstance(parsed, recipe.Recipe):
        return
    for room, ref in method_refs(parsed):
        method = methods.find(room, ref.name)
        # The method's own settings refuse an unknown key or a value out of range.
        settings = method.Settings(**ref.settings())
        if room == "mlalign.objectives":
            method(settings)


@pytest.mark.parametrize("path", ON_DISK, ids=lambda p: str(p.relative_to(FOLDER)))
def test_a_resolved_recipe_says_the_same(path: Path, tmp_path: Path) -> None:
    parsed = parse(path)
    if not isinstance(parsed, recipe.Recipe):
        return
    recipe.save(parsed, tmp_path / "recipe.yaml")
    assert recipe.load(tmp_path / "recipe.yaml") == parsed


def test_the_three_builders_are_in_the_quickstart() -> None:
    assert set(recipe.load(FOLDER / "quickstart.yaml").arms()) == {"ha_dpo", "povid", "rlaif_v"}


def test_recipe_names_differ() -> None:
    # Two recipes of one name would write into one run folder.
    parsed = [parse(path) for path in ON_DISK]
    names = [p.name for p in parsed if isinstance(p, recipe.Recipe)]
    assert len(names) == len(set(names)), sorted(names)


def test_every_system_has_its_presets_its_worlds_and_nothing_else() -> None:
    for system in SYSTEMS:
        found = {p.name.removesuffix(".yaml") for p in (FOLDER / system).glob("*.yaml")}
        assert found == PRESETS[system] | {"microworld", "photos"}, system
    assert {f"{s}/{name}" for s, names in PRESETS.items() for name in names} == set(PUBLISHED)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_holds_the_published_values(preset: str) -> None:
    parsed = recipe.load(FOLDER / f"{preset}.yaml")
    train, adapter = parsed.train, parsed.model.adapter
    length = f"{train.epochs:g} epoch" if train.epochs else f"{train.steps} step"
    settings = train.preferring().settings()
    held = (
        train.preferring().name,
        settings["beta"],
        train.learning_rate,
        train.batch_size,
        length,
    )
    held += (train.warmup, train.weight_decay)
    held += (None if adapter == "none" else (adapter.rank, adapter.alpha, adapter.dropout),)
    assert held == PUBLISHED[preset]
    assert train.schedule == "cosine" and parsed.seed == 42
    # The batch divides over the processes that it names.
    assert train.batch_size % (train.micro_batch_size * parsed.launch.processes) == 0
    # These two systems kept their reference log-probs on disk.
    assert (train.reference == "cached") == preset.startswith(("rlaif_v", "rlhf_v"))


def test_what_was_run_stands_in_the_script_presets() -> None:
    def of(name: str) -> recipe.Recipe:
        return recipe.load(FOLDER / f"{name}.yaml")

    ha_dpo = [of(f"ha_dpo/llava15_7b.{which}") for which in ("paper", "script")]
    saved = [r.model.adapter.modules_to_save for r in ha_dpo if r.model.adapter != "none"]
    assert saved == [(), ("multi_modal_projector",)]
    povid = [of(f"povid/llava15_7b.{w}").train.preferring().settings() for w in ("paper", "script")]
    assert [(s["form"], s["wrap"], s["reference_tokens"]) for s in povid] == [
        ("one", False, "policy"),
        ("two", True, "own"),
    ]
    assert [of(f"rlaif_v/llava15_7b.{w}").model.image for w in ("paper", "script")] == [
        "pad",
        "crop",
    ]
    rlhf_v = [
        of(f"rlhf_v/llava15_7b.{w}").train.preferring().settings() for w in ("paper", "script")
    ]
    assert [(s["gamma"], s["average"]) for s in rlhf_v] == [(5.0, True), (1.1, False)]
    # No checkpoint is chosen on a benchmark that is reported.
    assert [of(f"rlaif_v/llava15_7b.{w}").train.choose for w in ("paper", "script")] == [
        "best",
        "last",
    ]
    epsilons = [of(f"silkie/llava15_7b.{w}").train.adam_epsilon for w in ("paper", "script")]
    assert epsilons == [1e-6, 1e-8]


@pytest.mark.parametrize("preset", ["paper", "script"])
def test_the_second_stage_starts_from_the_first(preset: str) -> None:
    first = recipe.load(FOLDER / "povid" / f"llava15_7b.{preset}.stage1.yaml")
    second = recipe.load(FOLDER / "povid" / f"llava15_7b.{preset}.yaml")
    (arm,) = first.arms()
    assert second.model.start_adapter == f"runs/{first.name}/{arm}/adapter"
    assert first.model == second.model.model_copy(update={"start_adapter": None})
    assert first.data == second.data


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(
    ("world", "yardstick"), [("microworld", "microworld/align"), ("photos", "photos/run")]
)
def test_worlds_differ_in_method_alone(system: str, world: str, yardstick: str) -> None:
    """A table over systems compares methods: model, budget and evaluation are the same."""
    ours = recipe.load(FOLDER / system / f"{world}.yaml")
    model = recipe.load(FOLDER / f"{yardstick}.yaml")
    assert len(ours.arms()) == 1
    assert ours.name == f"{system}-{world}"
    assert ours.model == model.model
    assert ours.data.source == model.data.source
    assert ours.eval == model.eval and ours.launch == model.launch
    assert ours.probes.records == model.probes.records
    free = {"objective", "learning_rate"}
    if system == "rlaif_v" and world == "photos":
        # As in the yardstick's own arm of that builder.
        free.add("steps")
        assert ours.train.steps == model.train_of("rlaif_v").steps
    keys = set(type(ours.train).model_fields) - free
    assert {k: getattr(ours.train, k) for k in keys} == {k: getattr(model.train, k) for k in keys}
    if world == "microworld":
        assert ours.data.examples == model.data.examples


def test_every_rewarded_system_has_its_recipes_and_nothing_else() -> None:
    for system, names in REWARDED.items():
        assert {p.name.removesuffix(".yaml") for p in (FOLDER / system).glob("*.yaml")} == names
    systems = {p.parent.name for p in ON_DISK if p.name == "photos.yaml"}
    assert systems == {*SYSTEMS, *REWARDED}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_reads_its_own_reward_model(name: str) -> None:
    policy, trained = (recipe.load(FOLDER / f"{name}{end}.yaml") for end in ("", ".reward"))
    assert trained.train.algorithm.name == "reward_model"
    (arm,) = trained.arms()
    seed = "" if "llava15" in name else f"-{policy.seed}"
    settings = policy.train.algorithm.settings()
    assert settings["reward_model"] == f"runs/{trained.name}{seed}/{arm}/adapter"
    # It shares the policy's frozen base.
    assert policy.model == trained.model
    form = trained.train.algorithm.settings().get("form", "answer")
    terms = {term["name"]: term for term in settings["rewards"]}
    assert terms["reward_model"].get("form", "answer") == form


@pytest.mark.parametrize("name", [p for p in POLICIES if p.startswith("llava_rlhf/llava15")])
def test_llava_rlhf_holds_the_released_values(name: str) -> None:
    policy, trained = (recipe.load(FOLDER / f"{name}{end}.yaml") for end in ("", ".reward"))
    script = "script" in name
    for each in (policy, trained):
        adapter = each.model.adapter
        assert adapter != "none" and (adapter.rank, adapter.alpha, adapter.dropout) == (64, 16, 0)
        assert each.seed == 42 and each.model.image == "pad" and each.train.weight_decay == 0
        assert each.train.batch_size % (each.train.micro_batch_size * each.launch.processes) == 0
    held, train = trained.train.algorithm.settings(), trained.train
    assert held["facts"] and held["centering"] == 1e-3 and held["centering_form"] == "abs_mean"
    assert (train.learning_rate, train.batch_size) == (2e-5, 32)
    assert train.schedule == "constant_with_warmup" and train.max_length == 2048
    assert (train.steps, train.epochs) == ((200, None) if script else (None, 1))
    method = methods.find("mlalign.train.algorithms", "ppo")
    own, train = method.Settings(**policy.train.algorithm.settings()), policy.train
    assert (own.rollout, train.batch_size, own.iterations, train.epochs) == (512, 256, 2, 4)
    assert (train.learning_rate, train.schedule, train.max_grad_norm) == (3e-5, "cosine", 1.0)
    assert (own.clip, own.value_clip, own.vf_coef, own.max_new_tokens) == (0.2, 0.2, 0.1, 896)
    credit = own.credit
    assert (credit.kl_coef, credit.gamma, credit.lam, credit.reward_scale) == (0.1, 1, 1, 10)
    assert (credit.kl, credit.as_released) == (("clamped", True) if script else ("k1", False))
    # A checkpoint every ten rollouts.
    assert train.save_every == 10 * own.rollout // train.batch_size * own.iterations
    terms = {term.name: term for term in own.rewards}
    assert {n: t.weight for n, t in terms.items()} == dict.fromkeys(
        ("reward_model", "correctness", "length_penalty", "no_stop"), 1.0
    )
    assert terms["correctness"].settings() == {"scale": 2.0, "option": 1.0, "no": 0.5, "yes": 0.0}
    assert terms["length_penalty"].settings() == {"scale": 10.0, "limit": 896}
    assert terms["no_stop"].settings() == {"penalty": 8.0}


def test_a_reward_models_prompt_has_a_place_for_question_and_facts() -> None:
    shown = 0
    for path in ON_DISK:
        parsed = parse(path)
        if not isinstance(parsed, recipe.Recipe) or parsed.train.algorithm.name != "reward_model":
            continue
        settings = parsed.train.algorithm.settings()
        if "template" in settings:
            filled = settings["template"].format(prompt="<question>", facts="<facts>")
            assert filled.startswith("<question>") and filled.count("<facts>") == 1
            shown += 1
    assert shown == 4


def test_vigor_learns_from_ratings_and_from_the_best_answer() -> None:
    for world in ("llava15_7b", "microworld", "photos"):
        policy, trained = (
            recipe.load(FOLDER / "vigor" / f"{world}{end}.yaml") for end in ("", ".reward")
        )
        settings = trained.train.algorithm.settings()
        assert (settings["form"], settings["pair_weight"]) == ("sentence", 0.0)
        assert policy.train.algorithm.name == "online_dpo"
        assert policy.train.preferring().name == "sft"
        assert policy.train.algorithm.settings()["group"] == 5
    released = recipe.load(FOLDER / "vigor" / "llava15_7b.reward.yaml").data.pairs["vigor"]
    assert isinstance(released, recipe.MethodRef) and released.settings()["ratings"]


@pytest.mark.parametrize("system", REWARDED)
def test_rewarded_photos_share_the_yardstick(system: str) -> None:
    yardstick = recipe.load(FOLDER / "photos" / "run.yaml")
    for path in (FOLDER / system).glob("photos*.yaml"):
        ours = recipe.load(path)
        assert ours.model == yardstick.model and ours.data.source == yardstick.data.source
        assert ours.launch == yardstick.launch
        if not path.stem.endswith(".reward"):
            assert ours.eval == yardstick.eval
            assert ours.probes.records == yardstick.probes.records
