"""The sections of a recipe: what may stand under each key, its unit and its default. No torch.

``mlalign.recipe`` reads and checks a file of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PROBE_EVERY = 250
"""Steps between probe passes where a recipe says nothing: at most 2 % of the FLOPs of the steps for
LLaVA-1.5-7B, 16 records and all probes (``estimate.passes``)."""


class Section(BaseModel):
    """Base of every section: frozen, no unknown key."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class MethodRef(BaseModel):
    """The name of a method file and its settings: ``povid`` or ``{name: povid, corruptions: 2}``.

    The settings are validated by the method's own ``Settings`` class.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    def settings(self) -> dict[str, Any]:
        """All keys but the name."""
        return dict(self.model_extra or {})


def _as_ref(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Ref = Annotated[MethodRef, BeforeValidator(_as_ref)]


class BuilderRef(MethodRef):
    """A builder: its name, its settings, and how many examples it reads."""

    examples: int | None = Field(default=None, ge=1)
    """Examples that this builder reads; None: data.examples."""
    train: dict[str, Any] = {}
    """Keys of the train section that differ for this arm, e.g. {learning_rate: 1e-5, steps: 40}."""


Builder = Annotated[BuilderRef, BeforeValidator(_as_ref)]


class LoraSection(Section):
    """The adapter. Targets default to the language model's linears, named by the family file."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Zeroed in training unless train.layout is padded: a shared prefix shares one dropout mask."""
    targets: str | None = None
    """Regular expression over module names; None: every linear of the language model's blocks."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full beside LoRA, through PEFT (e.g. multi_modal_projector)."""


class ModelSection(Section):
    """The model to align."""

    path: str
    """Folder, Hub id, or ``builtin:microworld``."""
    revision: str | None = None
    """Hub revision; pin it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 where the hardware has it, else float32."""
    quantize: Literal["none", "4bit", "8bit"] = "none"
    """bitsandbytes load (nf4 for 4bit)."""
    image: Literal["pad", "crop"] = "crop"
    """pad: to a square with the processor's mean colour, as LLaVA-1.5 was trained; crop: the
    stock processor as it comes."""
    adapter: LoraSection | Literal["none"] = LoraSection()
    """none: full fine-tuning, with a second frozen copy as the reference."""
    start_adapter: str | None = None
    """Folder of a PEFT adapter merged into the model before anything else (an SFT stage's)."""


class DataSection(Section):
    """Where images and pairs come from: a source and builders, or ready pairs."""

    source: Ref | None = None
    """Source file of data_builders/sources with its settings; needed by builders."""
    examples: int | None = Field(default=None, ge=1)
    """Examples that each builder reads, but for one with an ``examples`` key of its own."""
    builders: tuple[Builder, ...] = ()
    """Builders of data_builders/; each is one arm: its pairs train one adapter."""
    prompts: int | None = Field(default=None, ge=1)
    """Examples whose prompts the policy answers while it is trained (grpo, rloo...): one arm, by
    the algorithm's name."""
    pairs: dict[str, str | Ref] = {}
    """Ready pairs by arm: a Parquet, JSONL or folder with TRL's columns; or a source that reads a
    released preference set, e.g. ``{name: rlhf_v, path: openbmb/RLHF-V-Dataset}``."""
    judge: Ref | None = None
    """Judge of mlalign/judges that builders ask; None: the builder's own default."""
    writer: Ref | None = None
    """Model of mlalign/judges that splits, corrects and rewrites text; None: by rule."""
    vocabulary: str = "coco"
    """Object vocabulary: a name under mlalign/vocabularies, or a file."""
    max_skipped: float = Field(default=0.1, ge=0, le=1)
    """Share of records that a builder may skip before the build fails."""
    bad_records: Literal["refuse", "skip"] = "refuse"
    """What a faulty row of ready pairs does: refuse lists every fault and stops; skip counts it."""

    @model_validator(mode="after")
    def _one_of(self) -> DataSection:
        if self.builders and self.source is None:
            raise ValueError("data.builders need data.source: name a source or give data.pairs")
        if self.prompts and self.source is None:
            raise ValueError("data.prompts need data.source: name a source of images with facts")
        return self


class TrainSection(Section):
    """Training of one arm."""

    algorithm: Ref = MethodRef(name="preference")
    """File of mlalign/train/algorithms with its settings: preference (DPO and its kin, by the
    objective), reward_model..."""
    objective: Ref | None = None
    """Objective file of mlalign/objectives with its settings, e.g. {name: dpo, beta: 0.1}; what
    the algorithm preference needs."""
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    """Pairs per optimiser step over all processes."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Pairs per forward pass on one process."""
    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; exactly one of epochs and steps."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps; constant has none."""
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_length: int | None = Field(default=None, ge=1)
    """Tokens of prompt and completion; a completion that is cut to nothing is a counted skip."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """auto: off where the estimate without it fits into 0.8 of the free memory (`mlalign estimate`
    says what it would be), on elsewhere, and for models that cannot be estimated."""
    layout: Literal["shared", "padded"] = "shared"
    """shared: one row per image prefix; padded: one row per completion (needed for dropout)."""
    pack_to: int | None = Field(default=None, ge=1)
    """Tokens of a row that several short pairs share; None: a row for every pair."""
    attention: Literal["auto", "split", "dense"] = "auto"
    """How rows of branches attend; both are exact. auto: split wherever the model allows it."""
    reference: Literal["live", "cached"] = "live"
    """cached: per-token reference log-probs are kept on disk and used again across epochs, sweeps
    and resumes."""
    reference_folder: str = "runs/references"
    """Where caches lie, each in a folder of its own by what it was computed with."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: none, only the result: a run that was stopped starts anew."""
    heldout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the images whose pairs no step sees; their loss is logged every save_every steps."""
    choose: Literal["last", "best"] = "last"
    """best: the weights with the lowest loss on the held-out pairs become the result."""
    log_every: int = Field(default=1, ge=1)
    blank_images: bool = False
    """Train on blank images: the control that asks whether the image matters."""

    def preferring(self) -> MethodRef:
        """The objective. Raises ValueError where none is named."""
        if self.objective is None:
            raise ValueError(
                f"objective: {self.algorithm.name} needs one: {{name: dpo, beta: 0.1}}"
            )
        return self.objective

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.algorithm.name == "preference":
            self.preferring()
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        if self.schedule == "constant" and self.warmup:
            raise ValueError("schedule: constant has no warmup: write constant_with_warmup")
        if self.choose == "best" and not self.heldout:
            raise ValueError("choose: best needs heldout: a share of the pairs, e.g. 0.05")
        if self.pack_to is not None and self.layout == "padded":
            raise ValueError("pack_to needs layout: shared")
        return self


class ProbeSection(Section):
    """Probes while training. When they run is fixed at the start: by steps, or by a share of time
    that is made into steps once."""

    methods: tuple[Ref, ...] = ()
    every: int | None = Field(default=None, ge=0)
    """Steps between passes; 0: only at the start and the end. Without this and ``share``:
    ``PROBE_EVERY``."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the training time that passes may take: one pass and the first steps are timed, and
    the number of steps between passes follows and stays (e.g. 0.02)."""
    rare: bool = True
    """Whether probes of the rare tier run: at the start, at the end, and in the passes that fall on
    checkpoints."""
    strict: bool = False
    """A probe that raises stops the run; else it is left out and the run ends with status 3."""
    records: int = Field(default=16, ge=1)
    """Records of the fixed probe set."""
    source: Ref | None = None
    """Where the probe set's images and facts come from; None: the data source."""
    batch_size: int = Field(default=4, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _default_cadence(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("every") is None and raw.get("share") is None:
            return {**raw, "every": PROBE_EVERY}
        return raw

    @model_validator(mode="after")
    def _one_cadence(self) -> ProbeSection:
        if self.every is not None and self.share is not None:
            raise ValueError(
                f"every: {self.every} and share: {self.share:g} exclude each other: take one of "
                "them out (probes.every=null or probes.share=null)"
            )
        return self


class EvalSection(Section):
    """Evaluation before and after."""

    benchmarks: tuple[Ref, ...] = ()
    source: Ref | None = None
    """Held-out examples; None: the data source's own held-out split."""
    images: int = Field(default=200, ge=1)
    """Images taken from the source."""
    batch_size: int = Field(default=32, ge=1)
    """Images per generation batch."""
    bootstrap: int = Field(default=1000, ge=100)
    """Resamples over images for the 95 % intervals."""


class LaunchSection(Section):
    """How training is launched."""

    launcher: Literal["deepspeed", "none"] = "deepspeed"
    """none: one process, started in place."""
    processes: int = Field(default=1, ge=1)
    """Processes (GPUs, or CPU processes) on each node."""
    zero: Literal[0, 2, 3] = 2
    """DeepSpeed ZeRO stage; 0 is plain data parallelism."""
    offload: bool = False
    """ZeRO-3 with optimiser and parameters offloaded to the CPU."""
    hostfile: str | None = None
    """Hostfile for several nodes."""

    @model_validator(mode="after")
    def _offload_needs_three(self) -> LaunchSection:
        if self.offload and self.zero != 3:
            raise ValueError("launch.offload needs launch.zero: 3")
        return self


class Recipe(Section):
    """One run, whole."""

    name: str
    """Run folder: runs/<name>."""
    seed: int = 0
    model: ModelSection
    data: DataSection
    train: TrainSection
    probes: ProbeSection = ProbeSection()
    eval: EvalSection = EvalSection()
    launch: LaunchSection = LaunchSection()
    report_to: Literal["none", "tensorboard", "wandb"] = "none"

    @model_validator(mode="after")
    def _arms(self) -> Recipe:
        if not self.data.builders and not self.data.pairs and not self.data.prompts:
            raise ValueError(
                "data: give builders (with a source), pairs or prompts; there is nothing to "
                "train on"
            )
        lora = self.model.adapter
        if lora != "none" and lora.dropout > 0 and self.train.layout == "shared":
            raise ValueError(
                "model.adapter.dropout > 0 needs train.layout: padded "
                "(a shared prefix shares one mask)"
            )
        return self

    @model_validator(mode="after")
    def _arms_train(self) -> Recipe:
        for arm in self.arms():
            self.train_of(arm)
        return self

    def train_of(self, arm: str) -> TrainSection:
        """The train section of one arm: the recipe's, with what its builder says otherwise.

        An override of ``epochs`` takes the place of ``steps``, and the other way round.
        """
        changed = next((b.train for b in self.data.builders if b.name == arm), {})
        whole = self.train.model_dump(mode="json")
        if "steps" in changed or "epochs" in changed:
            whole |= {"steps": None, "epochs": None}
        return TrainSection.model_validate({**whole, **changed})

    def pairs_of(self, arm: str, run: Path) -> Path:
        """Where an arm's pairs lie: the file that the recipe names, or what the build wrote."""
        named = self.data.pairs.get(arm)
        return Path(named) if isinstance(named, str) else run / "data" / arm

    def arms(self) -> list[str]:
        """Names of what is trained: an adapter per builder, per pairs file, and for the prompts."""
        answering = [self.train.algorithm.name] if self.data.prompts else []
        return [b.name for b in self.data.builders] + list(self.data.pairs) + answering
