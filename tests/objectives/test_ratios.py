"""What is not a batch of pairs is refused: slices of odd length would be broadcast."""

from __future__ import annotations

import pytest
import torch

from mlalign.objectives import _ratios
from tests.objectives import checks


def test_an_odd_number_of_completions_is_refused() -> None:
    three = checks.logps(checks.POLICY + checks.OTHERS[:1])
    with pytest.raises(ValueError, match=r"chosen and rejected by turns.*\(3, 4\)"):
        _ratios.log_ratios(three, three)


def test_a_reference_of_other_completions_is_refused() -> None:
    policy, one_pair = checks.logps(checks.POLICY + checks.OTHERS), checks.logps(checks.POLICY, 2)
    with pytest.raises(ValueError, match=r"\(6, 6\) and \(2, 6\)"):
        _ratios.log_ratios(policy, one_pair)


def test_an_answer_without_tokens_has_no_mean() -> None:
    empty = checks.logps([[-1.0], []])
    ratios = _ratios.log_ratios(empty, empty)
    means = _ratios.per_token(ratios, empty)
    assert means.chosen_N.item() == 0 and torch.isnan(means.rejected_N).all()
