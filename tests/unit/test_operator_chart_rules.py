"""The chart's rules are generated from the operator's rights."""

from pathlib import Path

from distill_operator.chart_rules import rules_template

TEMPLATE = Path(__file__).parents[2] / "charts" / "distillation-operator" / "templates" / "_rules.tpl"


def test_the_charts_rules_are_generated_from_the_operators_rights() -> None:
    assert TEMPLATE.read_text() == rules_template(), "run make crds"
