"""Which trainer a run folder belongs to, so that an older one that still runs publishes nothing more.

The operator begins an attempt once the trainers of earlier ones are gone, but a node that nobody hears of may run one
on, and so may a pod whose job was deleted and applied again. The folder names its newest owner (a fencing token, as in
Kleppmann, "How to do distributed locking", 2016): claiming it is a trainer's first write, and each later one reads the
token again just before. What remains is the moment between that and the write.
"""

import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from distill_api.job import DistillationJob
from distill_workers.failures import Superseded
from distill_workers.run_folder.atomic_file import write_whole

FILE = "owner.json"


@dataclass(frozen=True)
class Owner:
    """One trainer of a run folder."""

    created: str
    """Creation time of its job, RFC 3339: a job applied again is younger. Empty without a cluster."""
    uid: str
    """The job's uid. Empty without a cluster."""
    attempt: int
    """The operator's number of the attempt, 0 without one."""
    instance: str
    """A random word for this very process: a pod that replaces another of its attempt is another owner."""

    @classmethod
    def of_this_process(cls, job: DistillationJob, attempt: int) -> "Owner":
        """Return an owner that nobody else is."""
        return cls(job.metadata.creation_timestamp or "", job.metadata.uid, attempt, uuid.uuid4().hex)

    def older_than(self, other: "Owner") -> bool:
        """Whether the other's job is younger, or its attempt of the same job is later."""
        if self.uid != other.uid:
            return (self.created, self.uid) < (other.created, other.uid)
        return self.attempt < other.attempt


class Ownership:
    """The claim of one owner on one run folder."""

    def __init__(self, folder: Path, owner: Owner) -> None:
        self._file, self._owner = folder / FILE, owner

    def claim(self) -> None:
        """Make the folder the owner's. Raises Superseded if its owner is younger, and OSError if it cannot be
        written."""
        found = self._read()
        if found is not None and self._owner.older_than(found):
            raise Superseded(self._sentence(found))
        write_whole(self._file, json.dumps(asdict(self._owner)))

    def text(self) -> str:
        """Return the claim for another process, which checks it by `from_text`."""
        return json.dumps({"folder": str(self._file.parent), "owner": asdict(self._owner)})

    @classmethod
    def from_text(cls, text: str) -> "Ownership":
        """Return the claim that `text` gave."""
        found = json.loads(text)
        return cls(Path(found["folder"]), Owner(**found["owner"]))

    def check(self) -> None:
        """Raise Superseded once another trainer has claimed the folder, or somebody has removed the claim."""
        found = self._read()
        if found != self._owner:
            raise Superseded(self._sentence(found))

    def _read(self) -> Owner | None:
        try:
            return Owner(**json.loads(self._file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def _sentence(self, found: Owner | None) -> str:
        if found is None:
            return f"{self._file} is gone, so the run folder is not this trainer's any more; it publishes nothing more"
        who = f"attempt {found.attempt} of job {found.uid}" if found.uid else "another trainer"
        return f"{who} has taken over {self._file.parent}; this trainer publishes nothing more"
