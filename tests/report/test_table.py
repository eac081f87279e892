"""The summary table and the verdict: numbers, intervals, and what must never be hidden."""

from __future__ import annotations

import copy
from typing import Any

from rich.console import Console

from mlalign.report import metrics as m
from mlalign.report import table, verdict
from tests.report import synthetic


def printed(summary: dict[str, Any]) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table.summary_table(summary))
    return console.export_text()


def test_table_fits_a_terminal_and_holds_every_number() -> None:
    text = printed(synthetic.summary(paired=True))
    assert all(len(line.rstrip()) <= 100 for line in text.splitlines())
    for piece in ("before", "ha_dpo", "CHAIR_i %", "[18.0, 24.0]", "0.630", "200 images"):
        assert piece in text
    assert "\u2026" not in text, "something was cut"


def test_before_is_shown_per_arm_where_it_differs() -> None:
    summary = synthetic.summary(paired=False)
    assert table.columns(summary)[0].title == "before"
    other = copy.deepcopy(summary["builders"]["povid"]["before"])
    other["halluc/recall"] = 0.5
    summary["builders"]["povid"]["before"] = other
    assert "povid before" in [c.title for c in table.columns(summary)]
    text = printed(summary)
    assert "\u2026" not in text
    assert "50.0" in text


def test_blind_control_has_its_column() -> None:
    summary = synthetic.summary(paired=True)
    summary["builders"]["povid"]["blind"] = summary["builders"]["rlaif_v"]["after"]
    assert "povid blind" in [c.title for c in table.columns(summary)]
    assert "| povid blind |" in table.markdown(summary)


def test_markdown_is_a_table() -> None:
    lines = table.markdown(synthetic.summary(paired=True)).splitlines()
    assert lines[0] == "| | before | ha_dpo after | povid after | rlaif_v after |"
    assert lines[2] == (
        "| CHAIR_i % | 21.0 [18.0, 24.0] | 8.0 [5.0, 11.0] | 5.0 [2.0, 8.0] | 20.0 [17.0, 23.0] |"
    )


def test_metric_of_a_split_keeps_its_unit_and_an_unknown_one_is_kept() -> None:
    summary = synthetic.summary(paired=False)
    summary["builders"]["povid"]["after"]["own/thing"] = 0.125
    units = {metric.key: metric.unit for metric in m.metrics_of(summary, known=False)}
    assert units["pope/random/accuracy"] == "%"
    assert units["own/thing"] == ""


def test_warnings_name_what_a_lower_rate_cost() -> None:
    found = {v.arm: v for v in verdict.verdicts(synthetic.summary(paired=True))}
    assert found["ha_dpo"].warnings == ()
    assert any("recall fell by 10.0 points" in w for w in found["povid"].warnings)
    assert any("fewer words" in w for w in found["povid"].warnings)
    assert any("language got worse" in w for w in found["rlaif_v"].warnings)
    assert "within chance" in found["rlaif_v"].sentence


def test_clear_follows_the_paired_interval_where_there_is_one() -> None:
    metric = m.BY_KEY["halluc/recall"]
    sides: dict[str, Any] = {
        "before": {"halluc/recall": 0.9, "halluc/recall_ci95": [0.85, 0.95]},
        "after": {"halluc/recall": 0.88, "halluc/recall_ci95": [0.83, 0.93]},
    }
    assert m.is_clear(sides, metric) is False
    sides["change"] = {"halluc/recall": -0.02, "halluc/recall_ci95": [-0.03, -0.01]}
    assert m.is_clear(sides, metric) is True
    assert m.is_clear({"before": {}, "after": {}}, metric) is None


def test_rounding() -> None:
    assert m.rounded(0.3, (0.27, 0.33)) == "0.30 [0.27, 0.33]"
    assert m.rounded(-12.34, (-20.0, -5.0)) == "\u221212 [\u221220, \u22125]"
    assert m.signed(-0.04) == "0.0"
