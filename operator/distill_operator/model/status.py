"""The status on the wire: read leniently, written as the smallest merge patch."""

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from distill_api.base import Model

logger = logging.getLogger(__name__)
StatusT = TypeVar("StatusT", bound=Model)


def read_status(raw: Mapping[str, Any], model: type[StatusT]) -> StatusT:
    """A field that we cannot read is dropped: another version wrote it, and ours must not stop at that."""
    fields = dict(raw.get("status") or {})
    while True:
        try:
            return model.model_validate(fields)
        except ValidationError as error:
            bad = {str(e["loc"][0]) for e in error.errors(include_url=False)} & set(fields)
            if not bad:
                raise
            logger.warning("status of %s: dropped %s", raw["metadata"].get("name"), ", ".join(sorted(bad)))
            fields = {key: value for key, value in fields.items() if key not in bad}


def status_patch(raw: Mapping[str, Any], status: Model) -> dict[str, Any] | None:
    """None when nothing changed. Carries the resourceVersion, so that it holds for what was read alone."""
    before = raw.get("status") or {}
    after = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    change = _difference(before, after)
    if not change:
        return None
    meta = raw["metadata"]
    return {"metadata": {"resourceVersion": meta["resourceVersion"], "uid": meta["uid"]}, "status": change}


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """RFC 7386: null removes a field; lists are replaced whole."""
    change: dict[str, Any] = {key: None for key in before if key not in after}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, Mapping):
            if nested := _difference(old, value):
                change[key] = nested
        elif old != value:
            change[key] = value
    return change
