"""How far each layer has moved from the base model, on the same tokens, and by what update.

Per decoder layer, base against adapted, over the image, prompt and response tokens of a row. With
a the neuron coefficients (input of down_proj: what weighs the rows of W_down), g the gate before
its activation, h the block's output, subscript 0 the base, t the adapted model:

    rms                 sqrt(sum (a_t - a_0)^2 / sum a_0^2)           relative; 0 = not moved
    offset              || mean(h_t - h_0) || / mean || h_0 ||        the shift common to all tokens
    offset_coherence    || mean(h_t - h_0) || / mean || h_t - h_0 ||  1 = the same for every token
    firing_rate_change  mean over neurons | P(act(g_t) > 0) - P(act(g_0) > 0) |
    cka                 debiased linear CKA of h_0 and h_t            1 = same geometry
    lora_norm           || s B A ||_F / || W ||_F                     per adapted module
    lora_effective_rank exp(entropy of the singular values of B A)    0 .. r, per adapted module

Definitions: offset, Lee et al. arXiv 2401.01967; firing, MMNeuron arXiv 2406.11193; effective rank,
Roy and Vetterli 2007. Sums run over tokens of all records; per-record values use its own tokens.
CKA takes evenly spaced tokens of each record, since its cost is their number squared. Everything
is on side "delta". rms has a 95 % interval over records; the others are not ratios of what records
add up, and have none. The noise is the same statistic between two runs of the same model; LoRA
numbers are read off the weights and have none (0). Padding is in no group. Without a LoRA adapter
there are no lora_* readings. Not a list of responsible neurons: what alignment changes is spread
widely (arXiv 2411.06424).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from peft.utils.integrations import dequantize_module_weight
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mlalign.branching.batch import ProbeReading
from mlalign.models._vlm import VLM
from mlalign.probes._probe import GROUPS, HIDDEN, Probe, ProbeBatch, Watch
from mlalign.probes._stats import (
    debiased_cka,
    effective_rank,
    relative,
    resampled,
    update_spectrum,
)
from mlalign.probes._weights import gathered, lora_modules

TOKEN_METRICS = ("rms", "offset", "offset_coherence", "firing_rate_change")


class Settings(BaseModel):
    """Settings of the probe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    cka_tokens: int = Field(default=4, ge=1)
    """Tokens of each record and group that enter the CKA."""


class _States(Watch):
    """Activations of every real token, on the model's device and in its dtype, for one batch."""

    def __init__(self, batch: ProbeBatch, activations: list[nn.Module]) -> None:
        super().__init__(batch)
        self._activations = activations
        self.held: dict[tuple[int, int, str], Tensor] = {}
        """(item index, layer, kind) -> (tokens, width); "gate" is held as bool: did it fire."""

    def hidden(self, layer: int, kind: str, states_RTD: Tensor) -> None:
        """Keep each row without its padding."""
        if kind == "gate":
            states_RTD = self._activations[layer](states_RTD) > 0
        for row, item in enumerate(self.batch.items):
            kept = states_RTD[row, : self.batch.length(row)].clone()
            self.held[item.index, layer, kind] = kept


class NeuronDrift(Probe):
    """The probe; see the module's first lines for what it reads."""

    Settings = Settings
    name = "neuron_drift"
    prefix = "drift"
    headline = "delta"
    needs = frozenset({HIDDEN})
    inert = frozenset({"lora_norm", "lora_effective_rank"})

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._activations: list[nn.Module] = []
        self._norms: dict[str, float] = {}
        """Frobenius norm of each adapted module's frozen weight."""

    def prepare(self, vlm: VLM) -> None:
        """Refuse a language model whose MLP is not gated: its neurons are defined otherwise."""
        for number, layer in enumerate(vlm.layers):
            block: Any = layer
            missing = [
                name
                for name in ("gate_proj", "down_proj", "act_fn")
                if not hasattr(getattr(block, "mlp", None), name)
            ]
            if missing:
                raise ValueError(
                    f"neuron_drift: layer {number} has no mlp.{missing[0]}; only gated MLPs "
                    "(Llama, Mistral, Qwen2) are read. Leave the probe out of probes.methods"
                )
            self._activations.append(block.mlp.act_fn)

    def watch(self, vlm: VLM, batch: ProbeBatch) -> Watch:
        """Keeps the activations of one batch."""
        return _States(batch, self._activations)

    def compare(self, batch: ProbeBatch, before: Watch, after: Watch) -> list[Any]:
        """Sums over tokens, and the states that enter the CKA, by item."""
        assert isinstance(before, _States) and isinstance(after, _States)
        values = []
        for row, item in enumerate(batch.items):
            groups = batch.groups(row)
            sums: dict[tuple[int, str], dict[str, Any]] = {}
            for layer in range(len(self._activations)):
                pairs = {
                    kind: (
                        before.held[item.index, layer, kind],
                        after.held[item.index, layer, kind],
                    )
                    for kind in ("gate", "coefficient", "residual")
                }
                for group, index in groups.items():
                    sums[layer, group] = self._token_sums(pairs, index)
            values.append({"id": item.record.id, "sums": sums})
        return values

    def _token_sums(self, pairs: dict[str, tuple[Tensor, Tensor]], index: Tensor) -> dict[str, Any]:
        """What adds up over tokens, for one record, layer and group."""

        def both(kind: str) -> tuple[Tensor, Tensor]:
            old, new = pairs[kind]
            at = index.to(old.device)
            return old[at].float(), new[at].float()

        old, new = both("coefficient")
        fired_old, fired_new = both("gate")
        state_old, state_new = both("residual")
        moved = state_new - state_old
        # Evenly spaced and always the same tokens; fewer where the group is smaller.
        count = min(self.settings.cka_tokens, len(index))
        spaced = np.linspace(0, len(index) - 1, count).round().astype(int) if count else []
        picked = torch.as_tensor(np.unique(spaced), dtype=torch.long, device=moved.device)
        return {
            "tokens": len(index),
            "square_moved": float((new - old).double().square().sum()),
            "square_base": float(old.double().square().sum()),
            "fired_base": fired_old.sum(0).cpu().numpy(),
            "fired_adapted": fired_new.sum(0).cpu().numpy(),
            "moved": moved.double().sum(0).cpu().numpy(),
            "norm_moved": float(moved.double().norm(dim=-1).sum()),
            "norm_base": float(state_old.double().norm(dim=-1).sum()),
            "states": (state_old[picked].cpu().numpy(), state_new[picked].cpu().numpy()),
        }

    def condense(self, values: list[Any]) -> Any:
        """Per-record numbers, and one sum over this rank's records: widths travel once."""
        records = [
            {
                "id": value["id"],
                "metrics": {
                    key: (_metrics(sums), sums["tokens"]) for key, sums in value["sums"].items()
                },
                "squares": {
                    key: (sums["square_moved"], sums["square_base"])
                    for key, sums in value["sums"].items()
                },
                "states": {key: sums["states"] for key, sums in value["sums"].items()},
            }
            for value in values
        ]
        return {"records": records, "sums": _added([value["sums"] for value in values])}

    def weights(self, vlm: VLM) -> dict[str, tuple[float, float]]:
        """Module name -> (relative norm, effective rank) of its LoRA update. All ranks call it."""
        return {
            name: self._update(name, module, adapter)
            for name, module, adapter in lora_modules(vlm.model)
        }

    def _update(self, name: str, module: Any, adapter: str) -> tuple[float, float]:
        lora_a, lora_b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        if name not in self._norms:
            base = module.get_base_layer()
            with gathered([base.weight]):
                weight = dequantize_module_weight(base)
                self._norms[name] = float(weight.detach().float().norm())
        with gathered([lora_a, lora_b]):
            singular = update_spectrum(lora_b, lora_a, float(module.scaling[adapter]))
        norm = relative(float(singular.norm()), self._norms[name])
        return norm, effective_rank(singular)

    def readings(
        self, step: int, values: list[Any], noise: list[Any], weights: Any
    ) -> list[ProbeReading]:
        """Per record and layer; over the set per layer, and over the layers' mean."""
        fixed: dict[str, Any] = {"step": step, "probe": self.name, "side": "delta"}
        records = [record for rank in values for record in rank["records"]]
        whole = _of_set(records, _added([rank["sums"] for rank in values]))
        repeats = [record for rank in noise for record in rank["records"]]
        floor = _of_set(repeats, _added([rank["sums"] for rank in noise]))
        made = []
        for group in GROUPS:
            layers = sorted(layer for layer, each in whole if each == group)
            for metric in (*TOKEN_METRICS, "cka"):
                each = [whole[layer, group][metric] for layer in layers]
                floors = [floor[layer, group][metric] for layer in layers]
                tokens = int(whole[0, group]["tokens"])
                ends_2X = _ends(records, layers, group) if metric == "rms" else _no_ends(layers)
                rows = [
                    (-1, np.mean(each), np.mean(floors)),
                    *zip(layers, each, floors, strict=True),
                ]
                made += [
                    ProbeReading(
                        metric=metric,
                        record="",
                        layer=layer,
                        group=group,
                        value=float(value),
                        noise=float(floor_here),
                        lo=float(low),
                        hi=float(high),
                        n=tokens,
                        **fixed,
                    )
                    for (layer, value, floor_here), low, high in zip(rows, *ends_2X, strict=True)
                ]
        return made + _per_record(fixed, records) + _lora_readings(fixed, weights)


def _added(
    many: list[dict[tuple[int, str], dict[str, Any]]],
) -> dict[tuple[int, str], dict[str, Any]]:
    """Sums of several records or ranks, key by key."""
    total: dict[tuple[int, str], dict[str, Any]] = {}
    for sums in many:
        for key, values in sums.items():
            into = total.setdefault(key, {})
            for name, value in values.items():
                if name != "states":
                    into[name] = into.get(name, 0) + value
    return total


def _metrics(sums: dict[str, Any]) -> dict[str, float]:
    """TOKEN_METRICS from sums over tokens; NaN for a group without tokens."""
    tokens = sums["tokens"]
    if not tokens:
        return dict.fromkeys(TOKEN_METRICS, float("nan"))
    shift = float(np.linalg.norm(sums["moved"]))
    fired = np.abs(sums["fired_adapted"] - sums["fired_base"]) / tokens
    return {
        "rms": relative(sums["square_moved"] ** 0.5, sums["square_base"] ** 0.5),
        "offset": relative(shift, sums["norm_base"]),
        "offset_coherence": relative(shift, sums["norm_moved"]),
        "firing_rate_change": float(fired.mean()),
    }


def _of_set(
    records: list[Any], sums: dict[tuple[int, str], dict[str, Any]]
) -> dict[Any, dict[str, float]]:
    """(layer, group) -> metrics over all records, CKA among them."""
    out = {}
    for key, values in sums.items():
        base, adapted = (
            np.concatenate([record["states"][key][side] for record in records]) for side in (0, 1)
        )
        cka = debiased_cka(base, adapted)
        out[key] = {**_metrics(values), "cka": cka, "tokens": values["tokens"]}
    return out


def _ends(records: list[Any], layers: list[int], group: str) -> np.ndarray:
    """(2, 1 + layers): ends of the interval of rms; of the layers' mean, then of each layer."""
    moved_NL, base_NL = (
        np.array([[record["squares"][layer, group][i] for layer in layers] for record in records])
        for i in (0, 1)
    )
    rms_BL = np.sqrt(resampled(moved_NL, base_NL))
    return np.percentile(np.c_[rms_BL.mean(1), rms_BL], [2.5, 97.5], axis=0)


def _no_ends(layers: list[int]) -> np.ndarray:
    return np.full((2, 1 + len(layers)), np.nan)


def _per_record(fixed: dict[str, Any], records: list[Any]) -> list[ProbeReading]:
    return [
        ProbeReading(
            metric=metric,
            record=record["id"],
            layer=layer,
            group=group,
            value=values[metric],
            n=tokens,
            **fixed,
        )
        for record in records
        for (layer, group), (values, tokens) in record["metrics"].items()
        for metric in TOKEN_METRICS
    ]


def _lora_readings(
    fixed: dict[str, Any], weights: dict[str, tuple[float, float]]
) -> list[ProbeReading]:
    """One reading per module (group: its name inside the layer), and the mean over modules."""
    made = []
    for number, metric in enumerate(("lora_norm", "lora_effective_rank")):
        for name, values in weights.items():
            at = re.search(r"layers\.(\d+)\.(.+)$", name)
            where = (int(at[1]), at[2]) if at else (-1, name)
            made.append(
                ProbeReading(
                    metric=metric,
                    record="",
                    layer=where[0],
                    group=where[1],
                    value=values[number],
                    noise=0.0,
                    **fixed,
                )
            )
        if weights:
            value = float(np.mean([each[number] for each in weights.values()]))
            made.append(
                ProbeReading(
                    metric=metric, record="", value=value, noise=0.0, n=len(weights), **fixed
                )
            )
    return made


METHOD = NeuronDrift
