"""Many questions on one image: one row of branches against what a user would otherwise run.

    single   one forward per question, image included, as a loop over a dataset does
    padded   all questions as one batch of rows, prefix and image in each; one tower call
    copied   prefix computed once with a key-value cache, the cache copied for every question, the
             questions as one padded batch after it
    shared   ours: all questions behind one prefix in one row

Each gives the log-probs of the next token after every question.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlalign.bench.setting import Setting, image_size, new_vlm, picture, questions
from mlalign.branching.logps import next_token_logps


class Asking:
    """The questions of one image, and every way to ask them; all on the same model."""

    def __init__(self, setting: Setting, count: int, tokens: int) -> None:
        self.vlm = new_vlm(setting)
        size = image_size(setting)
        self.picture = picture(size, 0)
        self.inputs = self.vlm.image(self.picture)
        base = len(self.vlm.question_ids(questions(self.vlm, size, 2, tokens), size)[0])
        fill = questions(self.vlm, size, 1, setting.prefix - base + tokens)[0].split()
        lead = " ".join(fill[: max(0, setting.prefix - base)])
        asked = [f"{lead} {q}".strip() for q in questions(self.vlm, size, count, tokens)]
        self.prefix, self.branches = self.vlm.question_ids(asked, size)
        self.rows = [self.prefix + branch for branch in self.branches]

    def sides(self) -> dict[str, Callable[[], Tensor]]:
        """Name -> call; each gives (questions, V) float32."""
        return {
            "shared": self.shared,
            "single": self.single,
            "padded": self.padded,
            "copied": self.copied,
        }

    @torch.inference_mode()
    def shared(self) -> Tensor:
        """One row."""
        vlm = self.vlm
        batch = vlm.rows([self.prefix], [self.branches], [vlm.image(self.picture)])
        return next_token_logps(vlm.model, vlm.encode(batch.to(vlm.device)))

    @torch.inference_mode()
    def single(self) -> Tensor:
        """A stock forward for each question, head at the last position."""
        found = []
        for row in self.rows:
            inputs = self._images()
            ids = torch.tensor([row], device=self.vlm.device)
            out = self.vlm.model(input_ids=ids, logits_to_keep=1, use_cache=False, **inputs)
            found.append(out.logits[0, -1])
        return torch.stack(found).float().log_softmax(-1)

    @torch.inference_mode()
    def padded(self) -> Tensor:
        """One left-padded batch."""
        ids, mask = self._left_padded(self.rows)
        features = self.vlm.features([self.inputs] * len(self.rows))
        out = self.vlm.model(
            input_ids=ids,
            attention_mask=mask,
            mm_encoder_outputs={"image": features},
            logits_to_keep=1,
            use_cache=False,
        )
        return out.logits[:, -1].float().log_softmax(-1)

    @torch.inference_mode()
    def copied(self) -> Tensor:
        """Prefill, copy the cache, ask."""
        vlm, count = self.vlm, len(self.branches)
        ids = torch.tensor([self.prefix], device=vlm.device)
        first = vlm.model(input_ids=ids, logits_to_keep=1, use_cache=True, **self._images())
        cache = first.past_key_values
        cache.batch_repeat_interleave(count)
        width = max(map(len, self.branches))
        asked = torch.full((count, width), vlm.pad_id, device=vlm.device)
        seen = torch.zeros(count, len(self.prefix) + width, dtype=torch.long, device=vlm.device)
        seen[:, : len(self.prefix)] = 1
        last = []
        for row, branch in enumerate(self.branches):
            asked[row, : len(branch)] = torch.tensor(branch)
            seen[row, len(self.prefix) : len(self.prefix) + len(branch)] = 1
            last.append(len(branch) - 1)
        keep = torch.tensor(sorted(set(last)), device=vlm.device)
        out = vlm.model(
            input_ids=asked, attention_mask=seen, past_key_values=cache, logits_to_keep=keep
        )
        places = torch.searchsorted(keep, torch.tensor(last, device=vlm.device))
        return out.logits[torch.arange(count), places].float().log_softmax(-1)

    def _images(self) -> dict[str, Any]:
        """Tower inputs of the image, on the device."""
        tensors = self.vlm.image(self.picture).tensors
        weight = self.vlm.core.get_input_embeddings().weight
        return {
            key: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for key, value in tensors.items()
        }

    def _left_padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.vlm.pad_id)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :] = torch.tensor(row)
            mask[number, width - len(row) :] = 1
        return ids.to(self.vlm.device), mask.to(self.vlm.device)
