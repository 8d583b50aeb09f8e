"""One SGLang server: its command line from the job, and its life as a child process.

With spec.deterministic a server works on one request at a time and caches no prefix, so that its numbers depend on the
request alone; engines also sample tokens by each request's seed. With accelerators that is SGLang's deterministic
inference; without, distill_workers.cpu.seeded_sampling.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from distill_api import accelerator_environment
from distill_api.protocol import Variable
from distill_api.spec.job_spec import Rollout, Serving, Spec, TeacherSource
from distill_api.teacher.kind import TeacherSpec
from distill_api.teacher.student import engines_score
from distill_workers import loopback, probe
from distill_workers.child_processes import end_with_parent
from distill_workers.serving.admin_key import admin_key
from distill_workers.serving.server_devices import ServerDevices

Role = Literal["teacher", "engine"]
Served = Spec | TeacherSpec

CPU_CONCURRENCY = 16
"""Requests that a CPU server works on at once; more would only slow each down."""
SHARED_POOL_TOKENS = 65_536
"""Upper bound of the key-value cache of a server that shares its memory with other roles, on a CPU or on one device,
unless one sequence needs more."""
SCORING_CHUNK_TOKENS = 4096
"""Chunk of the prefill of a server that scores: its fp32 logits are [chunk, vocabulary] (sglang#2607)."""
ARCHITECTURES = "SGLANG_EXTERNAL_MODEL_PACKAGE", "distill_workers.serving.architectures"
"""Without it each scheduler imports the code of every model that SGLang knows: 6 seconds of a processor."""
SHARED_MEMORY_LOADER = "distill_workers.weight_sync.shared_memory.load"
NCCL_ERRORS, CLEAN_UP_ONLY = "TORCH_NCCL_ASYNC_ERROR_HANDLING", "2"
"""A failed communicator is aborted, and its process lives (ErrorHandlingMode in torch's ProcessGroupNCCL.hpp)."""
TAIL_CHARACTERS = 2000
SHARED_MEMORY = "/dev/shm/"
STALE_FILE_PREFIXES = ("sglang_loads_", "sgl_shm_", "multi_tokenizer_args_")
"""Names of files in shared memory that a killed SGLang leaves there (its own utils/stale_shm_cleanup.py)."""


class ServerFailed(RuntimeError):
    """Raised when a server has ended, or was not ready in time; the message has the end of its log."""


def sequence_tokens(spec: Served) -> int:
    """Return the tokens of the longest sequence that the server may be given."""
    if isinstance(spec, TeacherSpec):
        return spec.max_sequence_tokens
    responses = [e.max_response_tokens or 0 for e in spec.evaluation]
    return spec.rollout.max_prompt_tokens + max(spec.rollout.max_response_tokens, *responses, 0)


def cache_tokens(spec: Served, concurrency: int) -> int:
    """Return the size of the key-value cache of a server that shares memory: room for all requests up to a bound, and
    for one sequence."""
    one = sequence_tokens(spec) + 64
    return max(one, min(concurrency * one, SHARED_POOL_TOKENS))


def concurrency(spec: Served, wanted: int) -> int:
    """Return the number of requests that a server works on at once, of those that the job wants."""
    if spec.deterministic:
        return 1
    return min(wanted, CPU_CONCURRENCY) if spec.on_cpu else wanted


def sglang_command(
    model: str,
    spec: Served,
    role: Role,
    host: str,
    port: int,
    serving: Serving | None = None,
    devices: ServerDevices | None = None,
) -> tuple[list[str], dict[str, str]]:
    """Return the command line of a server, and what it needs in its environment.

    `serving` is the part of the spec of the teacher that is served; the job's first teacher if it is left out.
    `devices` are those of a server that shares this machine with others.
    """
    part: Serving | Rollout
    if isinstance(spec, TeacherSpec):
        part = spec
    else:
        part = (serving or spec.all_teachers[0]) if role == "teacher" else spec.rollout
    flags: list[str] = ["--model-path", model, "--host", host, "--port", str(port), "--dtype", spec.dtype]
    flags += ["--tp-size", str(part.tensor_parallel_size), "--random-seed", str(spec.seed)]
    # Without sleep-on-idle an idle scheduler spins on 80 % of a core.
    flags += ["--sleep-on-idle", "--enable-metrics", "--grammar-backend", "none"]
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    environment |= {ARCHITECTURES[0]: os.environ.get(*ARCHITECTURES)}
    environment |= loopback.no_proxy(os.environ)  # SGLang warms up by requests to itself
    if Path(model).is_absolute():
        environment["HF_HUB_OFFLINE"] = "1"
    if role == "teacher":
        flags += ["--chunked-prefill-size", str(SCORING_CHUNK_TOKENS)]
        if isinstance(part, TeacherSource) and part.student is not None:
            flags += ["--weight-version", "0"]
    else:
        if isinstance(spec, Spec) and engines_score(spec):
            flags += ["--chunked-prefill-size", str(SCORING_CHUNK_TOKENS)]
        flags += ["--weight-version", "0", "--custom-weight-loader", SHARED_MEMORY_LOADER]
        if not spec.on_cpu:
            # A peer that dies in a push of weights must not take this engine along, as torch's default would.
            environment[NCCL_ERRORS] = os.environ.get(NCCL_ERRORS, CLEAN_UP_ONLY)
    if spec.trust_remote_code:
        flags += ["--trust-remote-code"]
    running = concurrency(spec, part.max_concurrent_requests)
    if spec.on_cpu:
        module = "distill_workers.cpu.sglang_launch"
        flags += ["--device", "cpu", "--max-total-tokens", str(cache_tokens(spec, running))]
        # The readiness probe is a real scoring request, which warms up as much as SGLang's own request would.
        flags += ["--skip-server-warmup"]
        environment |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
    else:
        module = "distill_workers.serving.sglang_launch"
    if (part.accelerator or spec.accelerator).startswith("nvidia.com/"):
        # As the trainer (megatron/logits.py): a logit of 16 to 32 rounded to bfloat16 is off by up to 0.06 nats. Here
        # the product with the head sums up into fp32 (SGLang: logits_processor.py, torch.mm with out_dtype) at no cost.
        flags += ["--enable-fp32-lm-head"]
    if spec.on_cpu or spec.deterministic:
        flags += ["--max-running-requests", str(running)]
    if spec.deterministic:
        flags += ["--disable-radix-cache"]
        if not spec.on_cpu:
            flags += ["--enable-deterministic-inference"]
        elif role == "engine":
            environment["DISTILL_SEEDED_SAMPLING"] = "1"
    if devices is not None:
        flags += devices.flags()
        environment |= devices.environment()
    return [sys.executable, "-W", "ignore", "-m", module, *flags, *part.engine_args], environment


class SGLangServer:
    """A server as a child process in a session of its own, so that all its processes can be ended together.

    The server ends with the thread that starts it (PR_SET_PDEATHSIG), which must live as long.
    """

    def __init__(
        self,
        model: str,
        spec: Served,
        role: Role,
        *,
        port: int,
        host: str = "127.0.0.1",
        log: Path | None = None,
        serving: Serving | None = None,
        devices: ServerDevices | None = None,
        key: str | None = None,
    ) -> None:
        """`key` is that of its administration; by default that of this process's environment, or a new one."""
        self.model, self.port, self.log = (
            model,
            port,
            log or Path(tempfile.gettempdir()) / f"sglang-{role}-{port}.log",
        )
        self._role, self._command = role, sglang_command(model, spec, role, host, port, serving, devices)
        self.key = key or admin_key()
        # Beside a trainer the environment is the trainer's: SGLang's graphs map no segment that grows.
        self._not_inherited = {} if devices is None else accelerator_environment.EXPANDABLE_SEGMENTS
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        """Bytes that its log had when it was started."""
        self._shared: set[str] = set()
        """Files in shared memory that the server has mapped, to be removed after it."""

    @property
    def pid(self) -> int | None:
        """Process id, and session, of the server; None while it does not run."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """End what is left of an earlier start, and start the server; `wait_ready` waits until it serves."""
        self.stop()
        argv, environment = self._command
        # With the variables of a Ray worker, SGLang's processes would behave as part of Ray.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("RAY_") and self._not_inherited.get(name) != value
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                argv,
                env={**inherited, **environment, Variable.KEY: self.key},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def exit_code(self) -> int | None:
        """Return how the server's first process ended, negative for a death by signal; None while it runs, or is not
        started."""
        return self._process.poll() if self._process is not None else None

    def failed_by_itself(self) -> bool:
        """Return whether its log since the last start tells of an error: SGLang ends itself by a signal then."""
        return "Traceback (most recent call last)" in self._log_since(self._log_start)

    def alive(self) -> bool:
        """Return whether the server's first process runs."""
        return self._process is not None and self._process.poll() is None

    def wait_ready(self, timeout_seconds: float = 600) -> float:
        """Wait until the server scores, and return the seconds. Raises ServerFailed."""
        begin = time.monotonic()
        why = "not probed yet"
        while time.monotonic() - begin < timeout_seconds:
            if not self.alive():
                code = self._process.returncode if self._process else None
                raise ServerFailed(f"the {self._role} server of {self.model} ended with code {code}; {self.tail()}")
            try:
                probe.score("127.0.0.1", self.port)
                self._shared |= shared_memory_files(self._process.pid) if self._process else set()
                return time.monotonic() - begin
            except probe.NotReady as error:
                why = str(error)
            time.sleep(0.25)
        raise ServerFailed(
            f"the {self._role} server of {self.model} was not ready within {timeout_seconds:.0f} s: {why}; "
            f"{self.tail()}"
        )

    def stop(self) -> None:
        """End the whole process group, and remove what it leaves in shared memory.

        Also after the first process has ended, since its children may be alive.
        """
        if self._process is None:
            return
        self._shared |= shared_memory_files(self._process.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
        for path in self._shared:
            Path(path).unlink(missing_ok=True)
        self._shared.clear()

    def tail(self) -> str:
        """Return the end of its log, as a part of a message."""
        return f"the end of {self.log}:\n{self._log_since(0)[-TAIL_CHARACTERS:]}"

    def _log_since(self, byte: int) -> str:
        try:
            return self.log.read_bytes()[byte:].decode(errors="replace")
        except OSError:
            return ""


def shared_memory_files(session: int) -> set[str]:
    """Return SGLang's own files in shared memory that the processes of a session have mapped."""
    found: set[str] = set()
    for process in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.getsid(int(process)) == session:
                maps = Path("/proc", process, "maps").read_text()
                mapped = {line.split(maxsplit=5)[-1] for line in maps.splitlines()}
                found |= {
                    path for path in mapped if path.startswith(tuple(SHARED_MEMORY + p for p in STALE_FILE_PREFIXES))
                }
    return found
