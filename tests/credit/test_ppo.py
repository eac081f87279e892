"""PPO's credit and losses against references in plain floats, on random trajectories with spans."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from mlalign.credit.gae import Settings, gae, placed, ppo_credit, token_kl, whitened
from mlalign.credit.losses import policy_loss, value_loss
from tests.credit.trajectories import Rollout, column, laid, rollouts


def run(made: list[Rollout], pad: int = 2, dtype=torch.float64, **settings):
    spans, mask = laid(made, pad)
    width = mask.shape[1]
    return mask, ppo_credit(
        Settings(**settings),
        level_R=torch.tensor([r.level for r in made], dtype=torch.float64),
        spans=spans,
        policy_RT=column(made, "policy", width).to(dtype),
        reference_RT=column(made, "reference", width, junk=-3.0).to(dtype),
        values_RT=column(made, "values", width, junk=100.0).to(dtype),
        mask_RT=mask,
    )


def kl_of(p: float, q: float, kind: str) -> float:
    d = p - q
    return {"k1": d, "clamped": max(d, 0.0), "k3": math.exp(-d) - 1 + d}[kind]


def rewards_of(rollout: Rollout, coef: float, kind: str) -> list[float]:
    pairs = zip(rollout.policy, rollout.reference, strict=True)
    rewards = [-coef * kl_of(p, q, kind) for p, q in pairs]
    for span in rollout.spans:
        rewards[max(rollout.tokens(span))] += span[2]
    rewards[-1] += rollout.level
    return rewards


def advantages_of(rewards: list[float], values: list[float], gamma: float, lam: float):
    """The defining sum, not the recursion."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [
        sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


@pytest.mark.parametrize(
    ("gamma", "lam", "scale", "kind"),
    [(1.0, 1.0, 10.0, "clamped"), (0.97, 0.9, 1.0, "k1"), (1.0, 0.0, 2.0, "k3")],
)
def test_rewards_advantages_and_returns(gamma: float, lam: float, scale: float, kind: str):
    made = rollouts(50)
    settings = {"gamma": gamma, "lam": lam, "reward_scale": scale, "kl": kind, "kl_coef": 0.3}
    mask, out = run(made, whiten_advantages=False, **settings)
    white_mask, white = run(made, **settings)
    raw = []
    for row, rollout in enumerate(made):
        n = rollout.length
        rewards = rewards_of(rollout, 0.3, kind)
        advantages = advantages_of([scale * r for r in rewards], rollout.values, gamma, lam)
        returns = [a + v for a, v in zip(advantages, rollout.values, strict=True)]
        assert out.rewards_RT[row, :n].tolist() == pytest.approx(rewards, abs=1e-6)
        assert out.advantages_RT[row, :n].tolist() == pytest.approx(advantages, abs=1e-6)
        assert out.returns_RT[row, :n].tolist() == pytest.approx(returns, abs=1e-6)
        assert white.returns_RT[row, :n].tolist() == pytest.approx(returns, abs=1e-6)
        raw += advantages
    for name in ("rewards_RT", "advantages_RT", "returns_RT", "kl_RT"):
        assert not getattr(out, name)[~mask].any()
    mean, var = statistics.fmean(raw), statistics.variance(raw)
    expected = [(a - mean) / math.sqrt(var + 1e-8) for a in raw]
    assert white.advantages_RT[white_mask].tolist() == pytest.approx(expected, abs=1e-6)


def test_raw_rewards_sum_to_the_sequence_reward():
    made = rollouts(50, seed=1)
    spans, mask = laid(made, pad=3)
    on = placed(torch.tensor([r.level for r in made], dtype=torch.float64), spans, mask)
    assert on.sum(1).tolist() == pytest.approx([r.total for r in made], abs=1e-12)
    assert not on[~mask].any()


def test_the_width_of_the_batch_does_not_matter():
    made = rollouts(12, seed=2)
    mask, near = run(made, pad=0)
    wide_mask, far = run(made, pad=9)
    torch.testing.assert_close(near.advantages_RT[mask], far.advantages_RT[wide_mask])
    torch.testing.assert_close(near.returns_RT[mask], far.returns_RT[wide_mask])


def test_float32_is_near():
    made = rollouts(20, seed=3)
    mask, exact = run(made)
    _, near = run(made, dtype=torch.float32)
    assert near.advantages_RT.dtype == torch.float32
    torch.testing.assert_close(
        near.advantages_RT.double(), exact.advantages_RT, atol=1e-5, rtol=1e-5
    )
    assert mask.any()


def test_as_released_nothing_is_masked():
    """Two tokens, two columns of padding: the level lands on the last one, its values count."""
    rollout = Rollout(2, [], 5.0, [-1.0, -1.0], [-2.0, -1.0], [0.5, 0.25])
    _, out = run([rollout], pad=2, as_released=True, whiten_advantages=False, reward_scale=1.0)
    # Padding has log-probs 7 and -3 (a KL of 10) and values of 100.
    assert out.rewards_RT[0].tolist() == pytest.approx([-0.1, 0, -1, 4])
    assert out.returns_RT[0].tolist() == pytest.approx([2.9, 3, 3, 4])
    assert out.advantages_RT[0].tolist() == pytest.approx([2.4, 2.75, -97, -96])
    _, masked = run([rollout], pad=2, whiten_advantages=False, reward_scale=1.0)
    assert masked.rewards_RT[0].tolist() == pytest.approx([-0.1, 5, 0, 0])


def test_kl_estimators_agree_to_first_order_and_are_named():
    policy = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    reference = policy - torch.tensor([0.01, -0.01, 0.0])
    assert token_kl(policy, reference, "k1").tolist() == pytest.approx([0.01, -0.01, 0])
    assert token_kl(policy, reference, "clamped").tolist() == pytest.approx([0.01, 0, 0])
    third = token_kl(policy, reference, "k3")
    assert (third >= 0).all()
    assert third.tolist() == pytest.approx([5e-5, 5e-5, 0], abs=1e-6)


def test_a_row_without_a_token_has_nothing():
    mask = torch.tensor([[True, True], [False, False]])
    spans, _ = laid([Rollout(2, [], 0.0), Rollout(2, [], 0.0)])
    on = placed(torch.tensor([2.0, 3.0]), spans, mask)
    assert on.tolist() == [[0, 2], [0, 0]]
    advantages, returns = gae(on, torch.full((2, 2), 0.5, dtype=torch.float64), mask)
    assert advantages[1].tolist() == [0, 0]
    assert returns[1].tolist() == [0, 0]


def test_whitening():
    values = torch.tensor([[1.0, 2.0, 99.0], [3.0, 6.0, 99.0]], dtype=torch.float64)
    mask = values < 50
    white = whitened(values, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[mask].std().item() == pytest.approx(1, abs=1e-6)
    assert not white[~mask].any()
    assert whitened(values, mask, shift_mean=False)[mask].mean().item() == pytest.approx(3)
    alone = whitened(values, torch.tensor([[True, False, False], [False] * 3]))
    assert alone.tolist() == [[1, 0, 0], [0, 0, 0]]


def losses_of(made: list[Rollout], rng: random.Random):
    """Policy, advantages, old values and returns by rollout, some far beyond the clips."""
    return [
        {
            "new": [p + rng.gauss(0, 0.3) for p in r.policy],
            "advantage": [rng.gauss(0, 1) for _ in r.policy],
            "value": [v + rng.gauss(0, 0.3) for v in r.values],
            "return": [rng.gauss(0, 1) for _ in r.policy],
        }
        for r in made
    ]


@pytest.mark.parametrize("high", [None, 0.28])
def test_losses_equal_the_formula(high: float | None):
    made, rng = rollouts(50, seed=4), random.Random(4)
    drawn = losses_of(made, rng)
    policy, value, cut, cut_value = [], [], [], []
    for rollout, own in zip(made, drawn, strict=True):
        rows = zip(own["new"], rollout.policy, own["advantage"], strict=True)
        terms = []
        for new, old, a in rows:
            w = math.exp(new - old)
            held = min(max(w, 0.8), 1.2 if high is None else 1.28)
            terms.append(max(-a * w, -a * held))
            cut.append(-a * held > -a * w)
        policy.append(terms)
        errors = []
        for v, old, wanted in zip(own["value"], rollout.values, own["return"], strict=True):
            held = min(max(v, old - 0.2), old + 0.2)
            errors.append(0.5 * max((v - wanted) ** 2, (held - wanted) ** 2))
            cut_value.append((held - wanted) ** 2 > (v - wanted) ** 2)
        value.append(errors)
    _, mask = laid(made, pad=2)

    def padded(rows: list[list[float]], junk: float = 1e4) -> torch.Tensor:
        width = mask.shape[1]
        return torch.tensor([[*r, *[junk] * (width - len(r))] for r in rows], dtype=torch.float64)

    new, old = padded([d["new"] for d in drawn]), padded([r.policy for r in made], -1e4)
    advantages = padded([d["advantage"] for d in drawn])
    out = policy_loss(new, old, advantages, mask, high=high)
    flat = [t for terms in policy for t in terms]
    assert out.loss.item() == pytest.approx(statistics.fmean(flat), abs=1e-6)
    assert out.clipped.item() == pytest.approx(statistics.fmean(map(float, cut)))
    assert 0 < out.clipped.item() < 1
    rows = policy_loss(new, old, advantages, mask, high=high, reduction="sequences").loss
    assert rows.item() == pytest.approx(statistics.fmean(map(statistics.fmean, policy)), abs=1e-6)
    found = value_loss(
        padded([d["value"] for d in drawn]),
        padded([r.values for r in made]),
        padded([d["return"] for d in drawn], -5.0),
        mask,
    )
    assert found.loss.item() == pytest.approx(
        statistics.fmean(t for terms in value for t in terms), abs=1e-6
    )
    assert found.clipped.item() == pytest.approx(statistics.fmean(map(float, cut_value)))


@pytest.mark.parametrize("reduction", ["tokens", "sequences"])
def test_micro_batches_add_up(reduction: str):
    made = rollouts(12, seed=5)
    _, mask = laid(made)
    torch.manual_seed(0)
    new, old, advantages = torch.randn(3, *mask.shape, dtype=torch.float64)
    new.requires_grad_()
    count = mask.sum() if reduction == "tokens" else len(mask)

    def loss(rows: slice, whole=None):
        picked = (each[rows] for each in (new, old, advantages, mask))
        return policy_loss(*picked, reduction=reduction, count=whole).loss

    (together,) = torch.autograd.grad(loss(slice(None)), new)
    parts = sum(loss(slice(i, i + 3), count) for i in range(0, 12, 3))
    (apart,) = torch.autograd.grad(parts, new)
    torch.testing.assert_close(apart, together, atol=1e-12, rtol=0)
    assert not together[~mask].any()


def test_gradients_are_finite_and_stop_where_the_clip_holds():
    mask = torch.tensor([[True, True, True, False]])
    new = torch.tensor([[0.5, -0.5, 0.05, 500.0]], requires_grad=True)
    old = torch.zeros(1, 4)
    advantages = torch.tensor([[1.0, -1.0, 1.0, math.nan]])
    policy_loss(new, old, advantages, mask).loss.backward()
    assert new.grad is not None
    assert new.grad[0].tolist() == pytest.approx([0, 0, -math.exp(0.05) / 3, 0])


def test_at_the_policy_that_sampled_the_loss_is_minus_the_mean_advantage():
    mask = torch.tensor([[True, True, False]])
    logps = torch.randn(1, 3)
    out = policy_loss(logps, logps, torch.tensor([[1.0, 2.0, 9.0]]), mask)
    assert (out.loss.item(), out.ratio.item(), out.approx_kl.item()) == (-1.5, 1, 0)


def test_advantages_must_be_per_token():
    mask = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"advantages_RT has shape \(2,\), not \(2, 3\)"):
        policy_loss(mask, mask, torch.zeros(2), mask)
    with pytest.raises(ValueError, match="returns_RT has shape"):
        value_loss(mask, mask, torch.zeros(2, 1), mask)


def test_nothing_real_is_no_loss():
    nothing = torch.zeros(2, 3)
    assert policy_loss(nothing, nothing, nothing, nothing.bool()).loss.item() == 0
    assert value_loss(nothing, nothing, nothing, nothing.bool()).loss.item() == 0
