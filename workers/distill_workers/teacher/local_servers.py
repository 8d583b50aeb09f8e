"""SGLang servers of a job's own teachers on this machine, for a run without a cluster."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from distill_api.protocol import teacher_addresses
from distill_api.spec.job_spec import Spec
from distill_workers.failures import ConfigurationError, Failure, TeacherLost
from distill_workers.model_folder import model_folder
from distill_workers.serving.ports import reserve_port
from distill_workers.serving.server import SGLangServer
from distill_workers.serving.server_devices import ServerDevices


class TeacherServers:
    """A server for each replica of each teacher with a model; teachers with an endpoint need none."""

    def __init__(
        self,
        spec: Spec,
        logs: Path,
        devices: Mapping[str, Sequence[ServerDevices]] | None = None,
        key: str | None = None,
    ) -> None:
        """`devices` are those of each replica, by the teacher's name; without, a server takes what it sees. `key` is
        that of their administration, by default one that nobody knows.

        Raises ConfigurationError for a model that does not exist, and for a teacher by `ref`."""
        if shared := [t.ref.name for t in spec.live_teachers if t.ref is not None]:
            raise ConfigurationError(
                f"Teacher {', '.join(shared)} (ref) is an object of a cluster, and this is none: give a model or an "
                "endpoint instead"
            )
        self._servers: dict[str, list[SGLangServer]] = {}
        for teacher in spec.served_teachers:
            assert teacher.model is not None, "a served teacher has a model"
            folder = str(model_folder(teacher.model, f"{teacher.path}.model"))
            stem = teacher.name if spec.teachers else "teacher"
            self._servers[teacher.name] = [
                SGLangServer(
                    folder,
                    spec,
                    "teacher",
                    port=reserve_port(),
                    log=logs / f"{stem}-{number}.log",
                    serving=teacher,
                    devices=devices[teacher.name][number] if devices else None,
                    key=key,
                )
                for number in range(teacher.replicas)
            ]

    @property
    def addresses(self) -> str:
        """The value of Variable.TEACHER: the addresses of each teacher."""
        found = {name: [f"127.0.0.1:{s.port}" for s in servers] for name, servers in self._servers.items()}
        return teacher_addresses({name: ",".join(of_one) for name, of_one in found.items()})

    def start(self) -> None:
        """Start all servers, without waiting until they serve."""
        for servers in self._servers.values():
            for server in servers:
                server.start()

    def restart_ended(self, *, served: bool) -> list[str]:
        """Start each server again that has ended, as the kubelet would, and return a sentence for each.

        `served` says whether all of them have served already. Before that the end of one is that of the run: raises
        ConfigurationError if its program could not run, TeacherLost if something killed it.
        """
        said = []
        for servers in self._servers.values():
            for server in servers:
                code = server.exit_code()
                if code is None:
                    continue
                if not served:
                    raise _unservable(server, code)
                said.append(
                    f"the teacher's server {server.log.stem} ended ({_described(code)}) and is started again; "
                    f"its log is {server.log}"
                )
                server.start()
        return said

    def stop(self) -> None:
        """End all servers."""
        for servers in self._servers.values():
            for server in servers:
                server.stop()


def _unservable(server: SGLangServer, code: int) -> Failure:
    """Return the error of a server that ended, with this exit code, before it had served."""
    killed = code < 0 and not server.failed_by_itself()
    why = (
        "something killed it, perhaps for want of memory"
        if killed
        else "see whether SGLang can serve this model with these engineArgs"
    )
    return (TeacherLost if killed else ConfigurationError)(
        f"the teacher's server {server.log.stem} ended before it had served ({_described(code)}): {why}; "
        f"{server.tail()}"
    )


def _described(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
