"""Which objects an operator owns, and how each of them names the object that it was made for.

The runtime knows no kind or label of a project by itself: it gets them as one Ownership.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from distill_operator.kinds import Kind


class Key(NamedTuple):
    """Identifies an owner, which is an object that the operator reconciles."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind.value.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True)
class Ownership:
    """The owners of one operator, their children, and the labels that tie them together."""

    group: str
    """API group of the owners, which begins every name that is the operator's own."""
    field_manager: str
    """Manager of the fields that the operator applies."""
    managed_label: str
    """Label of every child and its pods; its value is the field manager."""
    owner_labels: Mapping[Kind, str]
    """Kinds of the owners. Each with the label that carries an owner's name on what is made for it; where an object
    has several of the labels, the first counts."""
    watched: tuple[Kind, ...]
    """Kinds of children, pods among them, whose every change is watched."""
    listed: tuple[Kind, ...]
    """Kinds of children that are listed now and then, as nothing happens to them by itself."""
    optional: frozenset[Kind]
    """Kinds that the API server may not know."""
    private_names: Callable[[str, str], tuple[str, ...]]
    """Return the texts in which the children of two equal owners differ, from an owner's name and uid."""

    @property
    def managed_selector(self) -> str:
        """Label selector of all children and their pods."""
        return f"{self.managed_label}={self.field_manager}"

    @property
    def child_kinds(self) -> frozenset[Kind]:
        """Kinds of children that memory holds: all but pods."""
        return frozenset((*self.watched, *self.listed)) - {Kind.POD}

    def is_owner(self, kind: Kind) -> bool:
        """Return whether objects of the kind are reconciled."""
        return kind in self.owner_labels

    def owner_of(self, kind: Kind, metadata: Mapping[str, Any]) -> Key | None:
        """Return the owner that an object was made for, or is; None where it names none.

        It goes by label and not by owner reference, as pods are controlled by Jobs and Deployments.
        """
        if self.is_owner(kind):
            return Key(kind, metadata["namespace"], metadata["name"])
        labels = metadata.get("labels") or {}
        for owner, label in self.owner_labels.items():
            if name := labels.get(label):
                return Key(owner, metadata["namespace"], name)
        return None
