"""What a plan may ask for. Each is safe to do again: a crash between doing and recording costs nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_operator.runtime.kinds import Kind


@dataclass(frozen=True)
class Check:
    """Let the API server judge an object without storing it."""

    body: Mapping[str, Any]


@dataclass(frozen=True)
class Apply:
    """Make it so, by server-side apply."""

    body: Mapping[str, Any]


@dataclass(frozen=True)
class CreateSecret:
    """Make it with a fresh random value under `entry`. One that exists stays as it is, unread."""

    body: Mapping[str, Any]
    entry: str


@dataclass(frozen=True)
class Delete:
    """Delete this very object: one of the same name but another uid stays."""

    kind: Kind
    name: str
    uid: str


@dataclass(frozen=True)
class Event:
    """Something that a person should notice. Two with the same key are one that was seen again."""

    key: str
    reason: str
    message: str
    warning: bool


Effect = Check | Apply | CreateSecret | Delete | Event
