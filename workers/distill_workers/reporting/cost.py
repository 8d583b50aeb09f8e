"""What a run holds while it goes on: the price of what it learns."""

from distill_api.names import Role
from distill_api.spec.job_spec import Spec


def accelerators(spec: Spec, engines: int) -> dict[str, int]:
    """Of each role; in the CPU mode the processes that stand for them. Another's teacher costs the run nothing.
    `engines`: those that have a place now."""
    rollout, trainer = spec.rollout, spec.trainer
    return {
        Role.TEACHER.value: sum(t.replicas * t.tensor_parallel_size for t in spec.served_teachers),
        Role.ROLLOUT.value: engines * rollout.tensor_parallel_size,
        Role.TRAINER.value: trainer.nodes * trainer.gpus_per_node,
    }
