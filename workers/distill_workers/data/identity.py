"""The identity of data: hashes of what prompts hold, by which a resumed run knows that they are the same."""

import array
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from distill_workers.data.sample import Prompt

Content = Mapping[str, str]
"""A hash of each field of all prompts of a source, in their order."""

ADDRESS = re.compile(r" at 0x[0-9a-f]+")
"""What Python prints of an object without a text of its own, and differs in every process."""


def content_of(prompts: Sequence[Prompt]) -> dict[str, str]:
    """Return the content of prompts: the same for the same rows, wherever and in whatever form they are stored, but for
    CSV, in which every value is a text."""
    hashes = {name: hashlib.sha256() for name in ("prompts", "answers", "responses", "teachers", "other fields")}
    for place, prompt in enumerate(prompts):
        _add(hashes["prompts"], prompt.text)
        hashes["prompts"].update(array.array("q", prompt.ids).tobytes())
        if prompt.privileged_ids is not None:
            hashes["prompts"].update(b"teacher" + array.array("q", prompt.privileged_ids).tobytes())
        _add(hashes["answers"], prompt.answer)
        _add(hashes["responses"], prompt.response)
        _add(hashes["teachers"], prompt.teacher)
        if fields := _without_nulls(prompt.metadata):
            _add(hashes["other fields"], json.dumps([place, fields], sort_keys=True, default=_as_text))
    return {name: found.hexdigest()[:16] for name, found in hashes.items()}


def changed(there: Content, here: Content) -> list[str]:
    """Return the names of the fields in which two contents differ. One that is unknown there does not differ."""
    return [name for name, found in here.items() if there.get(name, found) != found]


def _add(found: Any, text: str | None) -> None:
    data = b"" if text is None else text.encode("utf-8", "surrogatepass")
    # The length keeps "a", "bc" and "ab", "c" apart, and no text from an empty one.
    found.update(f"{-1 if text is None else len(data)}:".encode() + data)


def _without_nulls(value: Any) -> Any:
    """Return a value without the fields that are null, which Parquet gives a row that lacks them, and with texts as
    names: those of several types have no order."""
    if isinstance(value, Mapping):
        fields = ((ADDRESS.sub("", str(name)), _without_nulls(field)) for name, field in value.items())
        return {name: field for name, field in fields if field is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _as_text(value: Any) -> Any:
    """Return what stands for a value that JSON does not have: the same in every process."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return ADDRESS.sub("", str(value))
