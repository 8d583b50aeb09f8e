"""Whether a job ever had two trainers: by what the API server says of their pods, and by their processes here.

Also what `latest` named, one after the other. All of it is collected while a test does something else.
"""

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any, Self

from fault_injection import trainer_processes

from distill_api.names import LABEL_JOB, LABEL_ROLE, Role
from distill_cli.cluster import connect
from run_evidence import Life, lives, overlapping, steps_back

CONTAINER = "trainer"
SAMPLE_SECONDS, RECONNECT_SECONDS = 0.3, 0.3


class TrainerWatch:
    """Collects from `with` on."""

    def __init__(self, namespace: str, job: str, run_folder: Path) -> None:
        self._namespace, self._job, self._latest = namespace, job, run_folder / "checkpoints" / "latest"
        self._pods: list[dict[str, Any]] = []
        self._together: list[str] = []
        """What was seen of two pods with a trainer's processes at a time."""
        self.pods_with_processes: set[str] = set()
        """The uids of pods whose trainer was seen here."""
        self.named: list[str] = []
        """What `latest` named, without repetitions."""
        self._stopping = threading.Event()
        # Daemons: a watch waits for the next event, which may never come.
        self._threads = [threading.Thread(target=part, daemon=True) for part in (self._watch, self._sample)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._threads[1].join(30)

    def lives(self) -> list[Life]:
        """Return when each trainer lived, by its pod's status."""
        return lives(list(self._pods), CONTAINER)

    def problems(self) -> list[str]:
        """Return what shows two trainers at a time, or a checkpoint that was taken back."""
        found = [f"{a} and {b} by their pods' status" for a, b in overlapping(self.lives())]
        found += self._together
        found += [f"latest went back from {a} to {b}" for a, b in steps_back(self.named)]
        unseen = {life.uid for life in self.lives()} - self.pods_with_processes
        if unseen:
            found.append(f"the processes of the trainers {sorted(unseen)} were not seen, so nothing is known of them")
        return found

    def _watch(self) -> None:
        cluster = connect(self._namespace, None, None)
        selector = f"{LABEL_JOB}={self._job},{LABEL_ROLE}={Role.TRAINER.value}"
        query = {"watch": "true", "labelSelector": selector}
        while not self._stopping.is_set():
            with contextlib.suppress(Exception):  # whatever a connection ends by: the next one begins with all pods
                for line in cluster.lines(f"/api/v1/namespaces/{self._namespace}/pods", query):
                    event = json.loads(line)
                    if event["type"] in ("ADDED", "MODIFIED", "DELETED"):
                        self._pods.append(event["object"])
            time.sleep(RECONNECT_SECONDS)

    def _sample(self) -> None:
        while not self._stopping.wait(SAMPLE_SECONDS):
            found = {process.uid: process for process in trainer_processes(self._job)}
            self.pods_with_processes |= found.keys()
            if len(found) > 1:
                self._together.append(f"at {time.strftime('%H:%M:%S')} {' and '.join(map(str, found.values()))} ran")
            try:
                name = self._latest.read_text().strip()
            except OSError:
                continue
            if name and name != (self.named[-1] if self.named else ""):
                self.named.append(name)
