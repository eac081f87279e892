"""The other families: parameters, tower and projector FLOPs, tokens and kept bytes of small models
against the models themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    InternVLVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from mlalign.branching.layout import attention_mask, lay_out
from mlalign.branching.logps import completion_logps
from mlalign.estimate import activations, flops
from mlalign.estimate.auto import fits
from mlalign.estimate.geometry import Geometry, GeometryError, geometry_of, read
from mlalign.estimate.images import largest_grid
from mlalign.estimate.memory import estimate, trained_parameters
from mlalign.estimate.plan import Plan, adapter_of, plan_of
from mlalign.estimate.projector import read_projector
from mlalign.estimate.rows import PlanError, Rows
from mlalign.estimate.tower import read_tower
from mlalign.models._vlm import VLM
from mlalign.models.loading import family_named, load_vlm_from, lora_config
from mlalign.sections import LoraSection, ModelSection
from tests.estimate.test_activations import kept
from tests.estimate.test_auto import recipe
from tests.models import exact
from tests.models.folders import BUILD

FAMILIES = [name for name in BUILD if not name.startswith("llava")]
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The small model of a family, written once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = BUILD[family](tmp_path_factory.mktemp(family))
        return made[family]

    return get


def loaded(path: Path) -> tuple[VLM, Geometry]:
    return load_vlm_from(path, dtype="float32"), geometry_of(ModelSection(path=str(path)))


def counted(modules: list[Any]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def assert_counts(core: Any, geometry: Geometry) -> None:
    """Every part has as many parameters as the model."""
    tower, projector = family_named(type(core).__name__).frozen_towers(core)
    assert geometry.tower.parameters == counted([tower])
    assert geometry.projector_parameters == counted([projector])
    assert geometry.parameters == counted([core])


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_a_small_model(family: str, folder: Folder) -> None:
    vlm, geometry = loaded(folder(family))
    assert_counts(vlm.core, geometry)
    assert set(geometry.projector.modules) == set(vlm.family.projectors(vlm.core))


PUBLISHED: list[Any] = [
    Qwen2VLConfig(),
    Qwen2_5_VLConfig(tie_word_embeddings=True),
    Qwen3VLConfig(),
    Idefics3Config(),
    SmolVLMConfig(vision_config={"image_size": 512, "patch_size": 16}, scale_factor=4),
    InternVLConfig(),
    InternVLConfig(
        text_config=Qwen3Config(),
        vision_config=InternVLVisionConfig(
            attention_bias=True, use_qk_norm=True, norm_type="rms_norm", use_mean_pooling=False
        ),
    ),
    Gemma3Config(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        }
    ),
]


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: config.model_type)
def test_parameters_of_a_default_config_on_the_meta_device(config: Any) -> None:
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        core = AutoModelForImageTextToText.from_config(config)
    assert_counts(core, read(config, Processor()))


class Processor:
    """Settings of every image processor that is asked for one."""

    def __init__(self, **settings: Any) -> None:
        self.size, self.max_image_size = {"longest_edge": 28 * 28 * 40}, {"longest_edge": 364}
        self.do_image_splitting = self.do_resize = True
        self.max_patches = 12
        vars(self).update(settings)


@pytest.mark.parametrize("size", [(112, 112), (84, 196), (56, 308)])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_tower_and_projector_equal_torchs_own_count(
    family: str, size: tuple[int, int], folder: Folder
) -> None:
    vlm, geometry = loaded(folder(family))
    vlm.core.set_attn_implementation({"vision_config": "eager"})
    image = vlm.image(exact.picture(*size, seed=0))
    images = vlm.family.collate([image])
    tiles = 1
    if family.startswith("qwen"):
        _, rows, columns = image.tensors["image_grid_thw"][0].tolist()
        tower = read_tower(vlm.core.config.vision_config, (rows, columns))
        geometry = replace(geometry, tower=tower, projector=read_projector(vlm.core.config, tower))
    elif family != "gemma3":
        tiles = image.tensors["pixel_values"].flatten(0, -4).shape[0]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found = vlm.family.features(vlm.core, images)
    assert counter.get_total_flops() == flops.vision(geometry, tiles).vision
    assert len(found.pooler_output[0]) == tiles * geometry.tile_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_no_image_takes_more_tokens(family: str, folder: Folder) -> None:
    """And one of them takes as many, marks included, but for what a tokenizer joins."""
    vlm, geometry = loaded(folder(family))

    def tokens(size: tuple[int, int]) -> int:
        text = vlm.family.image_text(vlm.processor, size)
        return len(vlm.tokenizer(text, add_special_tokens=False)["input_ids"])

    # A strip narrower than a token is as wide as one all the same, and so above Qwen-VL's limit.
    @given(st.integers(30, 2000), st.floats(0.05, 20))
    def never_more(width: int, shape: float) -> None:
        height = max(round(width * shape), width // 20 + 1)
        assert tokens((width, height)) <= geometry.image_tokens

    never_more()
    if family.startswith("qwen"):
        patch = vlm.processor.image_processor.patch_size
        rows, columns = largest_grid(vlm.core.config, vlm.processor.image_processor)
        assert tokens((columns * patch, rows * patch)) == geometry.image_tokens
    else:
        largest = max(tokens((500 * a, 500 * b)) for a in range(1, 9) for b in range(1, 9))
        assert largest == geometry.image_tokens


@given(
    st.integers(1, 9),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.sampled_from(["shared", "padded", "separate"]),
    st.one_of(st.none(), st.integers(1, 12)),
    st.integers(0, 6),
)
def test_attended_pairs_in_windows_and_image_blocks(
    prefix: int, completions: list[int], layout: Any, window: int | None, block: int
) -> None:
    block = min(block, prefix)
    rows = Rows(prefix=prefix, completions=tuple(completions), layout=layout)
    groups = [completions] if layout == "shared" else [[n] for n in completions]
    if layout == "padded":
        groups = [[max(completions)] for _ in completions]
    batch = lay_out(
        [[1] * prefix for _ in groups], [[[2] * n for n in each] for each in groups], pad_id=0
    )
    block_RT = torch.full_like(batch.segment_RT, -1)
    block_RT[:, :block] = 0
    seen = attention_mask(replace(batch, block_RT=block_RT), window)
    padding = int((batch.segment_RT < 0).sum())
    assert rows.attended_in(window, block) == int(seen.sum()) - padding


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_kept_by_a_pass_of_the_engine(family: str, folder: Folder) -> None:
    vlm, geometry = loaded(folder(family))
    vlm = exact.with_adapter(vlm)
    batch, rows = branches(vlm)
    section = LoraSection(rank=4)
    attention = "dense" if geometry.masked else "split"
    plan = Plan(rows=rows, adapter=adapter_of(section, geometry.decoder), attention=attention)
    batch = vlm.encode(batch)
    measured = kept(vlm.model, lambda: completion_logps(vlm.model, batch, attention).logps_CS)
    need = estimate(geometry, plan)
    assert need.activations + need.head == pytest.approx(measured, rel=0.01)


def branches(vlm: VLM) -> tuple[Any, Rows]:
    """One image and two long completions."""
    image = exact.picture(112, 112, seed=0)
    prefix = vlm.prefix_ids(exact.PROMPTS[0], image.size)
    word = prefix[-1]
    completions = [[word] * 40, [word] * 50]
    batch = vlm.rows([prefix], [completions], [vlm.image(image)])
    return batch, Rows(prefix=len(prefix), completions=(40, 50))


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_kept_by_a_projector_that_trains(family: str, folder: Folder) -> None:
    vlm, geometry = loaded(folder(family))
    vlm.core.requires_grad_(False)
    vlm.family.frozen_towers(vlm.core)[-1].requires_grad_(True)
    batch, rows = branches(vlm)
    tiles = 1
    if not family.startswith("qwen") and family != "gemma3":
        tiles = next(iter(batch.images.values())).flatten(0, -4).shape[0]
    rows = replace(rows, tiles=tiles)

    def encoded() -> Any:
        return vlm.encode(batch).features.pooler_output[0]

    tokens = len(encoded())
    plan = Plan(rows=rows, adapter=adapter_of(LoraSection(), geometry.decoder), projector=True)
    outputs = tokens * geometry.decoder.width * 4 * geometry.projector.levels
    # Of images of any size the geometry has the largest: taken down to this one.
    share = tokens / (min(tiles * geometry.tile_tokens, rows.prefix))
    found = activations.features(geometry, plan) * share - outputs
    # Besides: in which order Qwen2.5-VL's windows are put back.
    assert found == pytest.approx(kept(vlm.model, encoded), rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_parameters_of_a_recipe(family: str, folder: Folder) -> None:
    vlm, geometry = loaded(folder(family))
    names = [name.removeprefix("model.") for name in vlm.family.projectors(vlm.core)]
    section = {"rank": 4, "modules_to_save": names}
    asked = recipe(model={"path": str(folder(family)), "adapter": section})
    plan = plan_of(asked, geometry, rows=Rows(prefix=100, completions=(9,)))
    assert plan.attention == ("dense" if family == "gemma3" else "split")
    from peft import get_peft_model

    model = get_peft_model(vlm.model, lora_config(LoraSection(**section), vlm))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_parameters(geometry, plan) == trained
    if len(names) > 1:
        section = {"rank": 4, "modules_to_save": names[:1]}
        with pytest.raises(PlanError, match=r"only the whole projector: visual\.merger, visual"):
            plan_of(recipe(model={"adapter": section}), geometry, rows=plan.rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_reads_config_and_processor_of_a_folder(family: str, folder: Folder) -> None:
    asked = recipe(model={"path": str(folder(family))})
    assert fits(asked, 2**34) and not fits(asked, 2**20)


@pytest.mark.parametrize(
    ("config", "processor", "words"),
    [
        (Qwen2VLConfig(), None, "qwen2_vl: .*image processor"),
        (InternVLConfig(), None, "internvl: .*image processor"),
        (Idefics3Config(), Processor(do_resize=False), "image of any size.*longest_edge"),
        (AutoConfig.for_model("paligemma"), None, "paligemma.*gemma3.*internvl"),
        (
            InternVLConfig(vision_config=InternVLVisionConfig(image_size=(448, 224))),
            Processor(),
            r"image_size: \[448, 224\].*only squares",
        ),
        (
            Gemma3Config(text_config={"use_bidirectional_attention": True}),
            None,
            "use_bidirectional_attention",
        ),
        (
            Qwen2_5_VLConfig(text_config={"use_sliding_window": True, "max_window_layers": 0}),
            Processor(),
            "sliding_window",
        ),
    ],
    ids=["qwen", "internvl", "idefics3", "other", "oblong", "both ways", "window"],
)
def test_what_cannot_be_estimated_is_refused(config: Any, processor: Any, words: str) -> None:
    with pytest.raises(GeometryError, match=words):
        read(config, processor)
