"""The teachers of a job, each with its pool of replicas, by name."""

import asyncio
from collections.abc import Mapping
from types import MappingProxyType

from distill_api.protocol import Variable, read_teacher_addresses, teacher_key
from distill_api.spec.job_spec import Spec
from distill_api.status import TeacherRequests
from distill_workers.failures import ConfigurationError
from distill_workers.teacher.cross_tokenizer.translation import Translator
from distill_workers.teacher.pool import TeacherPool
from distill_workers.teacher.protocol import Observer
from distill_workers.teacher.refreshed import RefreshedTeacher
from distill_workers.teacher.stored_scores.store import ScoreStore

NONE: Mapping[str, TeacherPool] = MappingProxyType({})


class Teachers:
    """The pools and coefficients of all teachers of a job, and the stores of their scores.

    A job whose scores are precomputed has stores alone.
    """

    def __init__(self, pools: Mapping[str, TeacherPool], coefficients: Mapping[str, float] | None = None) -> None:
        """Both mappings are by the teachers' names; a coefficient that is left out is 1."""
        self.pools, self._coefficients = dict(pools), dict(coefficients or {})
        self.stores: dict[str, ScoreStore] = {}
        """By the teachers' names, where the data set's responses are scored once."""

    @classmethod
    def of_job(
        cls, spec: Spec, environment: Mapping[str, str], observer: Observer, own: Mapping[str, TeacherPool] = NONE
    ) -> "Teachers":
        """Return the live teachers of a job, whose addresses and keys are in the environment (distill_api.protocol);
        but those of `own`, which the engines are.

        Raises ConfigurationError where one is missing.
        """
        addresses = read_teacher_addresses(environment.get(Variable.TEACHER, ""))
        pools = dict(own)
        for teacher in (t for t in spec.live_teachers if t.name not in own):
            key = ""
            if teacher.endpoint is None and teacher.name not in addresses:
                raise ConfigurationError(
                    f"{Variable.TEACHER.value} has no address of teacher {teacher.name} ({teacher.title}); it must be "
                    "NAME=HOST:PORT, several with ; between them"
                )
            if teacher.endpoint is not None and teacher.endpoint.key_secret is not None:
                variable = teacher_key(teacher.name)
                if not (key := environment.get(variable, "").strip()):
                    raise ConfigurationError(
                        f"{variable} is not set: it must hold the key of {teacher.title}, which spec names by "
                        f"keySecret {teacher.endpoint.key_secret.name}; without a cluster, set it yourself"
                    )
            address = addresses.get(teacher.name, "")
            kind = TeacherPool if teacher.student is None else RefreshedTeacher
            pools[teacher.name] = kind(address, spec, observer, teacher=teacher, key=key)
        return cls(pools, {t.name: t.coefficient for t in spec.all_teachers})

    def bound_ids(self, student_tokens: int) -> None:
        """Tell all pools how many tokens the student's tokenizer has (TeacherPool.student_tokens)."""
        for pool in self.pools.values():
            pool.student_tokens = student_tokens

    def translate(self, translators: Mapping[str, Translator]) -> None:
        """Give the pools of teachers with a tokenizer of their own, by name, what translates responses for them."""
        for name, translator in translators.items():
            self.pools[name].translator, self.pools[name].student_tokens = translator, len(translator.teacher)

    def of(self, name: str) -> TeacherPool:
        """Return the pool of a teacher. Raises ConfigurationError where its scores are precomputed."""
        if name not in self.pools and name in self.stores:
            raise ConfigurationError(
                f"{self.stores[name].folder} has not every score any more that it had before the first step, or a "
                "damaged one; run the job once with objective.teacherLogprobs cached"
            )
        return self.pools[name]

    def coefficient(self, name: str) -> float:
        """Return the factor of the divergence of samples that the teacher scores, besides objective.coefficient."""
        return self._coefficients.get(name, 1.0)

    def shared_requests(self) -> list[TeacherRequests]:
        """Return the open requests of each teacher that other jobs may share: its autoscaler adds them up."""
        shared = {name: pool for name, pool in self.pools.items() if pool.teacher.ref is not None}
        return [TeacherRequests(name=name, requests=pool.requests) for name, pool in shared.items()]

    async def start(self) -> None:
        """Wait until each teacher scores, and the stores are read. Raises TeacherUnreachable; and OSError where scores
        are precomputed."""
        await asyncio.gather(
            *(pool.start() for pool in self.pools.values()), *(store.open() for store in self.stores.values())
        )

    async def close(self) -> None:
        """Close the connections of all pools, and write what is to be stored."""
        await asyncio.gather(
            *(pool.close() for pool in self.pools.values()), *(store.close() for store in self.stores.values())
        )
