"""One try to publish a model to one place: `python -m distill_workers.results.publish`, a process of its own.

So the credentials of a place are in the environment of nothing else, a client that hangs or takes all memory can be
killed, and what the Secret holds is read anew at each try. The request comes on stdin and the answer goes to stdout,
each as JSON; neither has a credential.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TextIO

from distill_workers.child_processes import end_with_parent
from distill_workers.failures import Superseded
from distill_workers.results.manifest import Manifest
from distill_workers.results.place import Place, PlaceRefused, is_permanent, sentence
from distill_workers.run_folder.ownership import Ownership

HUB = "hf://"
SECRET_NAMES = ("KEY", "SECRET", "TOKEN", "PASSWORD", "CONNECTION_STRING")
"""Parts of the names of variables whose values are kept out of messages, as all of a mounted Secret are."""
SHORTEST_SECRET = 8
"""Characters of such a value: a shorter one, such as a region, is no secret."""


class Outcome(StrEnum):
    DONE = "done"
    REFUSED = "refused"
    """Another try would end the same."""
    FAILED = "failed"
    SUPERSEDED = "superseded"
    """The run folder is a newer trainer's: this one changes nothing more."""


@dataclass(frozen=True)
class Request:
    """What is to be done; without a model a probe."""

    to: str
    private: bool
    run: str
    begun: bool
    """Whether this run has written there before."""
    secrets: str | None
    """Folder of a mounted Secret; None for the environment as it is."""
    folder: str | None = None
    manifest: str | None = None
    claim: str | None = None
    """The claim of the trainer on its run folder (run_folder/ownership.py); None for one that has none."""


@dataclass(frozen=True)
class Answer:
    outcome: Outcome
    message: str


def answer(request: Request, endpoint: str | None = None) -> Answer:
    """Do what is asked, once. Never raises. `endpoint` is another hub than that of the environment."""
    secrets: tuple[str, ...] = ()
    try:
        check = _check_of(request.claim)
        check()
        secrets = _take_up(request.secrets)
        place = place_of(request, endpoint)
        if request.manifest is None or request.folder is None:
            place.probe()
            return Answer(Outcome.DONE, "")
        manifest = Manifest.read(request.manifest)
        assert manifest is not None
        return Answer(Outcome.DONE, place.publish(manifest, Path(request.folder), check))
    except Superseded as error:
        return Answer(Outcome.SUPERSEDED, str(error))
    except Exception as error:
        return Answer(Outcome.REFUSED if is_permanent(error) else Outcome.FAILED, sentence(error, secrets))


def place_of(request: Request, endpoint: str | None = None) -> Place:
    """Return the place of a request. Raises PlaceRefused where its client is not installed."""
    if request.to.startswith(HUB):
        from distill_workers.results.hub import Hub

        return Hub(request.to.removeprefix(HUB), private=request.private, endpoint=endpoint)
    from distill_workers.results.store import Store

    return Store(request.to, request.run, begun=request.begun)


def _check_of(claim: str | None) -> Callable[[], None]:
    """Return what raises Superseded once the run folder of a claim is another trainer's."""
    return Ownership.from_text(claim).check if claim is not None else lambda: None


def _take_up(folder: str | None) -> tuple[str, ...]:
    """Put the entries of a mounted Secret into the environment. Returns what no message may hold. Raises PlaceRefused
    for a Secret that is missing: the folder of one is empty."""
    found = {}
    if folder is not None:
        entries = [path for path in sorted(Path(folder).iterdir()) if path.is_file()]
        if not entries:
            raise PlaceRefused(
                f"the Secret {Path(folder).name} does not exist or has no key; create it, then a new job"
            )
        found = {path.name: path.read_text(encoding="utf-8", errors="replace").strip() for path in entries}
    os.environ.update({name: value for name, value in found.items() if name.isidentifier()})
    found |= {name: os.environ[name] for name in os.environ if any(part in name.upper() for part in SECRET_NAMES)}
    hidden = {value for value in found.values() if len(value) >= SHORTEST_SECRET}
    return tuple(sorted(hidden, key=len, reverse=True))


def main(source: TextIO, sink: TextIO) -> None:
    """Answer the request of `source` in `sink`."""
    json.dump(asdict(answer(Request(**json.load(source)))), sink)


if __name__ == "__main__":
    end_with_parent()
    # A client that prints must not end up in the answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with answers:
        main(sys.stdin, answers)
