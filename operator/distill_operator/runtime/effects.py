"""The effects that a plan may ask for. Each is safe to repeat: a crash between doing and recording costs nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_operator.kinds import Kind


@dataclass(frozen=True)
class Check:
    """Lets the API server judge an object without storing it."""

    body: Mapping[str, Any]


@dataclass(frozen=True)
class Apply:
    """Creates or changes an object by server-side apply."""

    body: Mapping[str, Any]


@dataclass(frozen=True)
class CreateSecret:
    """Creates a Secret with a fresh random value under `entry`. One that exists stays as it is, unread."""

    body: Mapping[str, Any]
    entry: str


@dataclass(frozen=True)
class Delete:
    """Deletes this very object: one of the same name but another uid stays."""

    kind: Kind
    name: str
    uid: str


@dataclass(frozen=True)
class PatchStatus:
    """Writes a part of a child's status, which another controller reads; the patch has the resourceVersion in it."""

    kind: Kind
    name: str
    patch: Mapping[str, Any]


@dataclass(frozen=True)
class Event:
    """Something that a person should notice. Two with the same key are one Event, counted twice."""

    key: str
    reason: str
    message: str
    warning: bool


Effect = Check | Apply | CreateSecret | Delete | PatchStatus | Event
