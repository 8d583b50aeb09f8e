"""A status on the wire: read leniently, written as the smallest merge patch."""

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from distill_api.base import Model

logger = logging.getLogger(__name__)
StatusT = TypeVar("StatusT", bound=Model)


def read_status(raw: Mapping[str, Any], model: type[StatusT]) -> StatusT:
    """Return the status of an object. A field that cannot be read is dropped: another version may have written it."""
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
    """Return the patch that makes an object's status this one; None when nothing changed.

    It carries the resourceVersion, so that it is refused when the object was written since it was read.
    """
    before = raw.get("status") or {}
    after = status.model_dump(mode="json", by_alias=True, exclude_none=True)
    change = _difference(before, after)
    if not change:
        return None
    meta = raw["metadata"]
    return {"metadata": {"resourceVersion": meta["resourceVersion"], "uid": meta["uid"]}, "status": change}


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return a merge patch by RFC 7386: null removes a field; lists are replaced whole."""
    change: dict[str, Any] = {key: None for key in before if key not in after}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, Mapping):
            if nested := _difference(old, value):
                change[key] = nested
        elif old != value:
            change[key] = value
    return change
