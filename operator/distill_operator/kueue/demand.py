"""Demand: how many pods a Workload has, and of which size, to be compared with another's. Pure.

Versions of the operator render the pods of one spec differently. Whether a reservation still covers them is a question
of numbers and sizes alone.
"""

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from distill_operator.model.observed import Raw

Amounts = Mapping[str, Decimal]
"""By resource."""
QUANTITY = re.compile(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)")
UNITS = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1), "k": Decimal(10**3),
    **{unit: Decimal(1000**n) for n, unit in enumerate("MGTPE", 2)},
    **{f"{unit}i": Decimal(1024**n) for n, unit in enumerate("KMGTPE", 1)},
}  # fmt: skip


def counts(workload: Raw) -> dict[str, int]:
    """Return the number of pods of each pod set."""
    return {each["name"]: each["count"] for each in workload["spec"]["podSets"]}


def exceeds(wanted: Raw, admitted: Raw, *, capped: bool) -> bool:
    """Return whether a Workload has more pods than the admitted one, unless they are `capped`, or larger ones."""
    reserved = {each["name"]: each for each in admitted["spec"]["podSets"]}
    for each in wanted["spec"]["podSets"]:
        if each["name"] not in reserved:
            return True
        known = reserved[each["name"]]
        if each["count"] > known["count"] and not capped:
            return True
        size, before = (pod_size(pod_set["template"]["spec"]) for pod_set in (each, known))
        if any(amount > before.get(resource, Decimal()) for resource, amount in size.items()):
            return True
    return False


def pod_size(spec: Raw) -> Amounts:
    """Return what a pod takes: its containers together, or more where an init container takes that before."""
    beside: Amounts = {}
    peak: Amounts = {}
    for container in spec.get("initContainers") or []:
        at_once = _sum([beside, _requests(container)])
        peak = _most(peak, at_once)
        if container.get("restartPolicy") == "Always":
            beside = at_once
    together = _most(_sum([beside, *(_requests(c) for c in spec.get("containers") or [])]), peak)
    # Where the pod itself says how much it takes, that counts.
    return _sum([{**together, **_requests(spec)}, _amounts(spec.get("overhead"))])


def _requests(of: Raw) -> Amounts:
    resources = of.get("resources") or {}
    return {**_amounts(resources.get("limits")), **_amounts(resources.get("requests"))}


def _amounts(found: Mapping[str, Any] | None) -> Amounts:
    return {resource: _amount(str(quantity)) for resource, quantity in (found or {}).items()}


def _amount(quantity: str) -> Decimal:
    """Return a quantity of Kubernetes as a number."""
    if (found := QUANTITY.fullmatch(quantity)) is None:
        raise ValueError(f"{quantity} is no quantity")
    number, unit = found.groups()
    return Decimal(number) * UNITS[unit]


def _sum(parts: Iterable[Amounts]) -> Amounts:
    found: dict[str, Decimal] = {}
    for part in parts:
        for resource, amount in part.items():
            found[resource] = found.get(resource, Decimal()) + amount
    return found


def _most(one: Amounts, other: Amounts) -> Amounts:
    return {r: max(one.get(r, Decimal()), other.get(r, Decimal())) for r in {*one, *other}}
