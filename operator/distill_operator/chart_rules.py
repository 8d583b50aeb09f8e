"""python -m distill_operator.chart_rules: prints the chart's templates/_rules.tpl, made from rbac.py."""

import sys
from collections.abc import Iterable

from distill_operator.rbac import (
    CLUSTER_RULES,
    GANG_RULES,
    KUEUE_CLUSTER_RULES,
    KUEUE_RULES,
    LEASE_RULES,
    NAMESPACE_RULES,
    NAMESPACED_RULES,
    Rule,
)

GANG_GROUPS = {
    "scheduler-plugins": "scheduling.x-k8s.io",
    "volcano": "scheduling.volcano.sh",
    "kai": "scheduling.run.ai",
}
"""API group of each value that the chart's gangSchedulers may list."""
HEAD = "{{/* Made from operator/distill_operator/rbac.py, which says what each right is for, by `make crds`. */}}\n"
LEASE_NAME = '{{ include "distillation-operator.fullname" . }}'


def rules_template() -> str:
    """Return the template: one named template for each kind of role, and a loop over the gang schedulers."""
    verbs = {tuple(rule["verbs"]) for rule in GANG_RULES}
    groups = {group for rule in GANG_RULES for group in rule["apiGroups"]}
    if len(verbs) != 1 or groups != set(GANG_GROUPS.values()):
        raise ValueError("the gang schedulers' rules differ in more than their group, or a group has no name here")
    names = " ".join(f'"{name}" "{group}"' for name, group in GANG_GROUPS.items())
    gang = (
        f"{{{{- $groups := dict {names} }}}}\n"
        "{{- range .Values.gangSchedulers }}\n"
        + _rule("{{ get $groups . }}", GANG_RULES[0]["resources"], GANG_RULES[0]["verbs"])
        + "{{- end }}\n"
    )
    kueue = "{{- if .Values.kueue }}\n" + _rules(KUEUE_RULES) + "{{- end }}\n"
    namespaced = _define("namespacedRules", _rules(NAMESPACED_RULES) + gang + kueue)
    selected = "{{- if .Values.watchNamespaceSelector }}\n" + _rules(NAMESPACE_RULES) + "{{- end }}\n"
    cluster = _define("clusterRules", _rules(CLUSTER_RULES) + selected)
    return HEAD + "\n".join((namespaced, cluster, _define("kueueRules", _rules(KUEUE_CLUSTER_RULES)), _lease_rules()))


def _lease_rules() -> str:
    """Return the rules of the lease. RBAC cannot limit create to a name, as the request carries none in its path."""
    text = ""
    for rule in LEASE_RULES:
        group, named = ", ".join(rule["apiGroups"]), [verb for verb in rule["verbs"] if verb != "create"]
        text += _rule(group, rule["resources"], ["create"])
        text += _rule(group, rule["resources"], named, f"  resourceNames: [{LEASE_NAME}]\n")
    return _define("leaseRules", text)


def _rules(rules: Iterable[Rule]) -> str:
    return "".join(
        _rule(", ".join(group or '""' for group in rule["apiGroups"]), rule["resources"], rule["verbs"])
        for rule in rules
    )


def _rule(groups: str, resources: list[str], verbs: list[str], names: str = "") -> str:
    return f"- apiGroups: [{groups}]\n  resources: [{', '.join(resources)}]\n{names}  verbs: [{', '.join(verbs)}]\n"


def _define(name: str, text: str) -> str:
    return f'{{{{- define "distillation-operator.{name}" -}}}}\n{text}{{{{- end -}}}}\n'


if __name__ == "__main__":
    sys.stdout.write(rules_template())
