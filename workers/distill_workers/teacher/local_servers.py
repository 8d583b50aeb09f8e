"""The servers of a job's own teachers, on this machine."""

from pathlib import Path

from distill_api.protocol import teacher_addresses
from distill_api.spec import Spec
from distill_workers.failures import ConfigurationError
from distill_workers.model_folder import model_folder
from distill_workers.serving.server import SGLangServer, free_port


class TeacherServers:
    """One for each replica of each teacher that the job serves; endpoints are used where they are."""

    def __init__(self, spec: Spec, logs: Path) -> None:
        """Raises ConfigurationError for a model that is not there, and for a teacher of a cluster."""
        if shared := [t.ref.name for t in spec.all_teachers if t.ref is not None]:
            raise ConfigurationError(
                f"Teacher {', '.join(shared)} (ref) is an object of a cluster, and this is none: give a model or an "
                "endpoint instead"
            )
        self._servers: dict[str, list[SGLangServer]] = {}
        for teacher in spec.served_teachers:
            assert teacher.model is not None, "it is served"
            folder = str(model_folder(teacher.model, f"{teacher.path}.model"))
            stem = teacher.name if spec.teachers else "teacher"
            self._servers[teacher.name] = [
                SGLangServer(
                    folder,
                    spec,
                    "teacher",
                    port=free_port(),
                    log=logs / f"{stem}-{number}.log",
                    serving=teacher,
                )
                for number in range(teacher.replicas)
            ]

    @property
    def addresses(self) -> str:
        """For Variable.TEACHER."""
        found = {name: [f"127.0.0.1:{s.port}" for s in servers] for name, servers in self._servers.items()}
        return teacher_addresses({name: ",".join(of_one) for name, of_one in found.items()})

    def start(self) -> None:
        for servers in self._servers.values():
            for server in servers:
                server.start()

    def stop(self) -> None:
        for servers in self._servers.values():
            for server in servers:
                server.stop()
