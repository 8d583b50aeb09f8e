"""Publishes the models of a run to the places of spec.output.publish: what is there already, and what is tried again.

Each try is a process of its own (publish.py). The run folder remembers what was published by the hash of its content,
so nothing is published twice after a resume. A place that cannot be reached never ends a run.
"""

import asyncio
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill_api.job import DistillationJob
from distill_api.protocol import SECRETS_FOLDER, Publication
from distill_api.spec.output import Publish, PublishedStep
from distill_workers.failures import PreflightFailed, Superseded
from distill_workers.results.manifest import Manifest
from distill_workers.results.publish import Answer, Outcome, Request
from distill_workers.run_folder.run_folder import RunFolder

FILE = "published.json"
"""The file of the run folder that remembers what was published."""
CHILD = (sys.executable, "-m", "distill_workers.results.publish")
DELAYS_SECONDS = (5.0, 20.0, 60.0, 120.0)
"""Between two tries; the hub's client and those of object stores try each request several times themselves."""
PROBE_SECONDS = 60.0
MESSAGE_CHARACTERS = 253
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "0",  # it is 1 in a pod whose models are all on volumes
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """A model that can be published."""

    folder: Path
    step: int
    problem: str | None = None
    """Why there is none in the folder, as a sentence; None where there is one."""


class Publisher:
    """The places of one job, and what this run has published to them."""

    def __init__(
        self,
        job: DistillationJob,
        folder: RunFolder,
        *,
        delays: Sequence[float] = DELAYS_SECONDS,
        command: Sequence[str] = CHILD,
    ) -> None:
        self._job, self._folder, self._delays, self._command = job.metadata.name, folder, delays, command
        self._places = job.spec.output.publish
        # A run that publishes ends no step, and the operator restarts one that has not for the whole time.
        self._seconds = job.spec.stall_timeout_seconds / 2

    async def probe(self) -> list[str]:
        """Write something to each place and delete it. Returns a note for each that was not reached.

        Raises PreflightFailed for one that would refuse the model at the end as well. A run that has a checkpoint is
        not ended by a place any more, and writes nothing.
        """
        if not self._places or self._folder.latest_checkpoint() is not None:
            return []
        notes, seen = [], self._seen()
        requests = [self._request(place, seen) for place in self._places]
        for place, answer in zip(
            self._places, await asyncio.gather(*(self._ask(r, PROBE_SECONDS) for r in requests)), strict=True
        ):
            if answer.outcome is Outcome.REFUSED:
                raise PreflightFailed(f"Publish: spec.output.publish to {place.to}: {answer.message}")
            if answer.outcome is Outcome.FAILED:
                notes.append(f"Publish: {place.to} is not reached, and is tried again at the end: {answer.message}")
        return notes

    def is_published(self, place: Publish, step: int) -> bool:
        """Return whether the model of a step is what this run has published there last."""
        known = self._seen()["places"].get(place.to, {})
        return bool(known.get("done")) and known["step"] == step

    def forget_after(self, step: int) -> None:
        """Let what is published of a later step count no more: a run that goes on from `step` makes another model of
        it."""
        seen = self._seen()
        places = {
            to: {**known, "done": False} if known["step"] > step else known for to, known in seen["places"].items()
        }
        if places != seen["places"]:
            self._folder.replace(FILE, json.dumps({**seen, "places": places}, indent=1))

    async def publish(
        self, models: Mapping[PublishedStep, Model], places: Sequence[Publish] | None = None
    ) -> list[Publication]:
        """Publish to the places, by default to all, beside each other. Returns what became of each, in their order.

        Raises Superseded where a newer trainer has the run folder.
        """
        deadline = time.monotonic() + self._seconds
        run = self._seen()["run"]
        manifests = {step: await self._manifest(model, run) for step, model in models.items() if model.problem is None}
        done = (
            self._to(p, models[p.step], manifests.get(p.step), deadline)
            for p in (self._places if places is None else places)
        )
        return list(await asyncio.gather(*done))

    async def _manifest(self, model: Model, run: str) -> Manifest:
        """Return the manifest of a model, which takes a minute for each few 10 GB; cancelled, it ends at once."""
        cancelled = threading.Event()

        def check() -> None:
            if cancelled.is_set():
                raise asyncio.CancelledError

        try:
            return await asyncio.to_thread(
                Manifest.of_folder, model.folder, job=self._job, run=run, step=model.step, check=check
            )
        finally:
            cancelled.set()

    async def _to(self, place: Publish, model: Model, manifest: Manifest | None, deadline: float) -> Publication:
        if manifest is None:
            missing = (model.problem or "")[:MESSAGE_CHARACTERS]
            return Publication(to=place.to, step=model.step, done=False, message=missing)
        known = self._seen()["places"].get(place.to, {})
        if known.get("done") and known["content"] == manifest.content:
            log.info("publish: step %d is at %s since an earlier attempt: %s", model.step, place.to, known["message"])
            return Publication(to=place.to, step=known["step"], done=True, message=known["message"])
        answer = Answer(Outcome.DONE, "")
        if not known:  # a folder counts as this run's from when it was found empty
            answer = await self._tried(self._request(place, self._seen()), deadline)
        if answer.outcome is Outcome.DONE:
            self._remember(place, manifest, done=False, message="begun")
            answer = await self._tried(self._request(place, self._seen(), model, manifest), deadline)
            self._remember(place, manifest, done=answer.outcome is Outcome.DONE, message=answer.message)
        done, message = answer.outcome is Outcome.DONE, answer.message[:MESSAGE_CHARACTERS]
        log.log(
            logging.INFO if done else logging.ERROR,
            "publish: step %d %s %s: %s",
            *(model.step, "is at" if done else "is not at", place.to, message),
        )
        return Publication(to=place.to, step=model.step, done=done, message=message)

    async def _tried(self, request: Request, deadline: float) -> Answer:
        """Return the answer to a request, which is made again after a delay where that may help."""
        for delay in self._delays:
            answer = await self._ask(request, deadline - time.monotonic())
            if answer.outcome is not Outcome.FAILED or time.monotonic() + delay >= deadline:
                return answer
            log.warning("publish: %s, tried again in %.0f s: %s", request.to, delay, answer.message)
            await asyncio.sleep(delay)
        return await self._ask(request, deadline - time.monotonic())

    async def _ask(self, request: Request, seconds: float) -> Answer:
        """Return the answer of a process, which is killed where it takes longer. Raises Superseded."""
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=pipe, stdout=pipe, env={**os.environ, **ENVIRONMENT}
            )
        except OSError as error:
            return Answer(Outcome.FAILED, f"no process could be started to publish: {error}")
        try:
            said = json.dumps(asdict(request)).encode()
            output, _ = await asyncio.wait_for(process.communicate(said), max(0.0, seconds))
            found = json.loads(output)
            outcome = Outcome(found["outcome"])
            if outcome is Outcome.SUPERSEDED:
                raise Superseded(found["message"])
            return Answer(outcome, found["message"])
        except TimeoutError:
            return Answer(Outcome.FAILED, f"it had not ended after {seconds:,.0f} s")
        except ValueError:
            return Answer(Outcome.FAILED, f"the process that publishes ended with {process.returncode}: see the log")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    def _request(
        self, place: Publish, seen: dict[str, Any], model: Model | None = None, manifest: Manifest | None = None
    ) -> Request:
        secrets = Path(SECRETS_FOLDER) / place.secret if place.secret is not None else None
        return Request(
            to=place.to,
            private=place.private,
            run=seen["run"],
            begun=place.to in seen["places"],
            # `distill run` mounts no Secret: the user's own environment has the credentials.
            secrets=str(secrets) if secrets is not None and secrets.is_dir() else None,
            folder=str(model.folder) if model is not None else None,
            manifest=manifest.text() if manifest is not None else None,
            claim=self._folder.claim_text(),
        )

    def _seen(self) -> dict[str, Any]:
        """Return what the run folder remembers: the word of this run, and its places."""
        path = self._folder.root / FILE
        if not path.exists():
            self._folder.replace(FILE, json.dumps({"run": uuid.uuid4().hex, "places": {}}))
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _remember(self, place: Publish, manifest: Manifest, *, done: bool, message: str) -> None:
        seen = self._seen()
        about = {"step": manifest.step, "content": manifest.content, "done": done, "message": message}
        self._folder.replace(FILE, json.dumps({**seen, "places": {**seen["places"], place.to: about}}, indent=1))
