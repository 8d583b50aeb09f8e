"""Which accelerators of this machine each role of a job has: a pure plan, without a look at any device.

Every rank of the trainer, and every tensor parallel rank of an engine or a teacher's server, has a device of its own.
Where there is one device alone and no role needs more than one, all share it: the trainer has TRAINER_SHARE of its
memory, and each server an equal part of SERVERS_SHARE for its weights and key-value cache. What is left is for CUDA
contexts, activations and graphs of the servers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distill_api.spec.job_spec import Rollout, Serving, Spec
from distill_workers.failures import ConfigurationError
from distill_workers.serving.server import cache_tokens, concurrency, sequence_tokens
from distill_workers.serving.server_devices import ServerDevices

TRAINER_SHARE, SERVERS_SHARE = 0.6, 0.3
ALONE_SHARE = 0.85
"""Of the servers together, where nothing is trained."""
GB = 1e9


@dataclass(frozen=True)
class Device:
    """A device that this process may use."""

    name: str
    """As CUDA_VISIBLE_DEVICES names it."""
    size_bytes: int


@dataclass(frozen=True)
class Footprint:
    """What a model takes of a server's memory."""

    weight_bytes: int
    token_bytes: int
    """Of the keys and values of one token."""


@dataclass(frozen=True)
class Placement:
    """The devices of each role."""

    trainer: tuple[str, ...] = ()
    """One for each rank, by LOCAL_RANK."""
    engines: tuple[ServerDevices, ...] = ()
    teachers: Mapping[str, tuple[ServerDevices, ...]] = field(default_factory=dict)
    """By the teacher's name, one for each replica."""

    @property
    def shared(self) -> bool:
        """Return whether all roles are on one device."""
        return any(server.shared for server in (*self.engines, *(s for t in self.teachers.values() for s in t)))


@dataclass(frozen=True)
class Server:
    """A server that is to be placed."""

    role: str
    part: Rollout | Serving
    model: Footprint | None


def place(
    spec: Spec,
    devices: Sequence[Device],
    footprints: Mapping[str, Footprint],
    *,
    ranks: int,
    engines: int,
    teachers: bool,
) -> Placement:
    """Return the devices of `ranks` ranks of the trainer, of `engines` engines and, with `teachers`, of all servers of
    the job's own teachers.

    footprints: of the models of "student" and of each teacher by its name; used where they share a device alone.
    Raises ConfigurationError where the devices do not suffice, with what is asked and what is there.
    """
    served = spec.served_teachers if teachers else []
    sizes = [spec.rollout.tensor_parallel_size] * engines
    sizes += [teacher.tensor_parallel_size for teacher in served for _ in range(teacher.replicas)]
    wanted = ranks + sum(sizes)
    if wanted <= len(devices):
        names = iter([device.name for device in devices])

        def take(count: int) -> tuple[str, ...]:
            return tuple(next(names) for _ in range(count))

        return Placement(
            trainer=take(ranks),
            engines=tuple(ServerDevices(take(spec.rollout.tensor_parallel_size)) for _ in range(engines)),
            teachers={
                t.name: tuple(ServerDevices(take(t.tensor_parallel_size)) for _ in range(t.replicas)) for t in served
            },
        )
    if len(devices) == 1 and ranks <= 1 and set(sizes) <= {1}:
        [only] = devices
        of_servers = SERVERS_SHARE if ranks else ALONE_SHARE
        room = int(only.size_bytes * of_servers / len(sizes))

        def share(role: str, part: Rollout | Serving, footprint: Footprint) -> ServerDevices:
            return ServerDevices((only.name,), _tokens(spec, role, part, footprint, only, room))

        return Placement(
            trainer=(only.name,) * ranks,
            engines=tuple(share("an engine", spec.rollout, footprints["student"]) for _ in range(engines)),
            teachers={
                t.name: tuple(share(f"teacher {t.name}", t, footprints[t.name]) for _ in range(t.replicas))
                for t in served
            },
        )
    raise ConfigurationError(_too_few(spec, len(devices), wanted, ranks=ranks, engines=engines, teachers=teachers))


def _tokens(
    spec: Spec, role: str, part: Rollout | Serving, footprint: Footprint, device: Device, room_bytes: int
) -> int:
    """Return the tokens of the cache that fit beside the weights in `room_bytes`, of those that a server can use."""
    least = sequence_tokens(spec) + 64
    fitting = (room_bytes - footprint.weight_bytes) // footprint.token_bytes
    if fitting < least:
        needed = (footprint.weight_bytes + least * footprint.token_bytes) / GB
        raise ConfigurationError(
            f"the one device has {device.size_bytes / GB:.1f} GB, of which {role} may take {room_bytes / GB:.1f} GB, "
            f"and it needs {needed:.1f} GB: {footprint.weight_bytes / GB:.1f} GB of weights and a cache of one "
            f"sequence of {least} tokens; take smaller models, shorter responses, or a device for each role"
        )
    return min(fitting, cache_tokens(spec, concurrency(spec, part.max_concurrent_requests)))


def _too_few(spec: Spec, there: int, wanted: int, *, ranks: int, engines: int, teachers: bool) -> str:
    asked = []
    if ranks:
        asked.append(f"trainer {ranks}")
    if engines:
        asked.append(f"engines {engines} × {spec.rollout.tensor_parallel_size}")
    if teachers:
        asked += [f"teacher {t.name} {t.replicas} × {t.tensor_parallel_size}" for t in spec.served_teachers]
    visible = {0: "none is", 1: "1 is"}.get(there, f"{there} are")
    ways = "lower trainer.gpusPerNode, rollout.replicas, teacher.replicas or a tensorParallelSize (--set)"
    if there == 0:
        ways = "see nvidia-smi and CUDA_VISIBLE_DEVICES; accelerator none runs on the CPU (--set spec.accelerator=none)"
    elif ranks <= 1 and wanted == ranks + engines + sum(t.replicas for t in spec.served_teachers if teachers):
        ways += ", or let all roles share one device: CUDA_VISIBLE_DEVICES=0"
    return f"the job asks for {wanted} accelerators on this machine ({', '.join(asked)}), and {visible} visible: {ways}"
