"""Files of a cluster's run folder: the pod that reads them, the stream, and what is made of one that is cut short."""

import io
import json
import signal
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from websocket import ABNF, WebSocketConnectionClosedException

from distill_api.names import LABEL_ATTEMPT, LABEL_JOB, LABEL_MANAGED_BY, LABEL_ROLE
from distill_api.protocol import READER_MODULE, READER_SUMS
from distill_cli.cluster import ApiError
from distill_cli.commands import samples
from distill_cli.failure import CommandFailed
from distill_cli.reader import run_files
from distill_cli.reader.claim import node_for
from distill_cli.reader.pod import reader_pod, selector
from distill_cli.reader.run_files import read_run_files
from distill_cli.reader.unpack import Incomplete, unpack
from distill_operator.model.ownership import OWNERSHIP
from distill_workers.local import reader

Json = dict[str, Any]
MODEL = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 5000, "chat_templates/a.jinja": b"x"}
TRAINER = {
    "containers": [{"name": "trainer", "image": "registry.example.com/workers:1", "imagePullPolicy": "Never"}],
    "imagePullSecrets": [{"name": "pull"}],
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "serviceAccountName": "writes-to-the-store",
}


def job_of(**output: Any) -> Json:
    meta = {"name": "sums", "namespace": "team", "uid": "u-1"}
    return {"metadata": meta, "spec": {"output": {"volume": {"claimName": "out"}, **output}}}


def claim_of(*modes: str) -> Json:
    return {"metadata": {"name": "out"}, "spec": {"accessModes": ["ReadWriteMany"]}, "status": {"accessModes": modes}}


def holder(name: str, node: str | None, phase: str = "Running", claim: str = "out") -> Json:
    volume = {"name": "v", "persistentVolumeClaim": {"claimName": claim}}
    spec = {"volumes": [{"name": "t", "emptyDir": {}}, volume], **({"nodeName": node} if node else {})}
    return {"metadata": {"name": name, "labels": {}}, "spec": spec, "status": {"phase": phase}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The run folder of a finished job."""
    run = tmp_path / "output" / "sums"
    for name, content in {**{f"model/{n}": c for n, c in MODEL.items()}, "checkpoints/step-000020/rank": b"c"}.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    (run / "run.json").write_text("{}")
    (run / "metrics.jsonl").write_text('{"kind": "step"}\n')
    return run


def pod_of(trainer: Json = TRAINER, **more: Any) -> Json:
    options = {"name": "sums-reader-1", "image": "registry.example.com/workers:1", "seconds": 60, **more}
    return reader_pod(job_of(), trainer, **options)


def test_the_pod_reads_one_claim_and_has_no_rights() -> None:
    spec = pod_of()["spec"]
    [container] = spec["containers"]
    assert spec["automountServiceAccountToken"] is False and "serviceAccountName" not in spec
    assert spec["restartPolicy"] == "Never" and spec["activeDeadlineSeconds"] == 60
    claims = [v["persistentVolumeClaim"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [{"claimName": "out", "readOnly": True}]
    assert {"name": "output", "mountPath": "/output", "readOnly": True} in container["volumeMounts"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    # A quota, or a limit range, asks for both.
    assert container["resources"].keys() == {"requests", "limits"}


def test_the_pod_goes_with_its_job_and_the_operator_does_not_see_it() -> None:
    meta = pod_of()["metadata"]
    [owner] = meta["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("DistillationJob", "sums", "u-1")
    assert "controller" not in owner and "blockOwnerDeletion" not in owner
    key, value = OWNERSHIP.managed_selector.split("=")
    assert meta["labels"][key] != value
    assert all(f"{k}={v}" in selector("sums") or k not in selector("sums") for k, v in meta["labels"].items())
    assert "distillation-operator.io/role" not in meta["labels"], "no Service and no PodMonitor selects it"


def test_the_pod_is_as_the_trainer_to_registry_nodes_and_files() -> None:
    user = {"runAsUser": 4242, "fsGroup": 77, "supplementalGroups": [5], "sysctls": []}
    spec = pod_of(TRAINER | {"securityContext": user})["spec"]
    assert spec["imagePullSecrets"] == TRAINER["imagePullSecrets"] and spec["tolerations"] == TRAINER["tolerations"]
    assert spec["containers"][0]["imagePullPolicy"] == "Never"
    found = spec["securityContext"]
    assert (found["runAsUser"], found["runAsGroup"], found["fsGroup"]) == (4242, 1000, 77)
    assert found["supplementalGroups"] == [5] and "sysctls" not in found
    of_container = [{"name": "trainer", "image": "x", "securityContext": {"runAsUser": 0}}]
    as_root = pod_of(TRAINER | {"containers": of_container})["spec"]
    assert as_root["securityContext"]["runAsUser"] == 0 and as_root["securityContext"]["runAsNonRoot"] is False
    assert "imagePullPolicy" not in as_root["containers"][0], "that is the trainer's image's"


def test_a_claim_of_one_node_is_read_on_the_node_that_has_it() -> None:
    holders = [
        holder("done", "node-1", "Succeeded"),
        holder("others", "node-2", claim="others"),
        holder("pending", None, "Pending"),
        holder("sums-trainer-1-0", "node-3"),
    ]
    assert node_for(claim_of("ReadWriteOnce"), holders) == "node-3"
    assert node_for(claim_of("ReadWriteOnce"), holders[:3]) is None
    assert node_for(claim_of("ReadWriteOnce", "ReadWriteMany"), holders) is None
    assert node_for(claim_of(), holders) is None, "the spec counts where the status is empty"
    with pytest.raises(CommandFailed, match="claim out is ReadWriteOncePod, and pod sums-trainer-1-0 mounts it"):
        node_for(claim_of("ReadWriteOncePod"), holders)
    spec = pod_of(node="node-3")["spec"]
    [term] = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term == {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-3"]}]}
    assert spec["tolerations"] == [{"operator": "Exists", "effect": "NoSchedule"}]


def written(what: str, folder: Path, *options: str) -> bytes:
    sink = io.BytesIO()
    assert reader.main([what, str(folder), *options], sink) == 0
    return sink.getvalue()


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_sent_arrives(folder: Path, tmp_path: Path) -> None:
    for what, expected in (
        ("records", {"run.json", "metrics.jsonl"}),
        ("model", {"run.json", "metrics.jsonl", *(f"model/{name}" for name in MODEL)}),
    ):
        unpack(io.BytesIO(written(what, folder)), tmp_path / what)
        assert files_in(tmp_path / what) == {name: (folder / name).read_bytes() for name in expected}


def test_a_file_that_grows_while_it_is_sent_is_sent_as_long_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = reader._Hashed.read

    def grows(self: Any, size: int = -1) -> bytes:
        if self._file.name.endswith("metrics.jsonl"):
            with (folder / "metrics.jsonl").open("a") as file:
                file.write('{"kind": "step"}\n')
        return read(self, size)

    before = (folder / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(reader._Hashed, "read", grows)
    unpack(io.BytesIO(written("records", folder)), tmp_path / "here")
    assert (tmp_path / "here" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.998])
def test_a_stream_that_is_cut_short_is_never_taken_for_whole(share: float, folder: Path, tmp_path: Path) -> None:
    whole = written("model", folder)
    # The last blocks of a tar are empty: what is left at 0.998 has every file, and not their hashes.
    at = whole.index(READER_SUMS.encode()) if share == 0.998 else int(len(whole) * share)
    with pytest.raises(Incomplete, match=r"cut short|try again"):
        unpack(io.BytesIO(whole[:at]), tmp_path / "here")


def test_a_changed_byte_is_found_by_its_hash(folder: Path, tmp_path: Path) -> None:
    whole = bytearray(written("model", folder))
    whole[whole.index(MODEL["model.safetensors"][:300]) + 1000] ^= 1
    with pytest.raises(Incomplete, match=r"^model/model.safetensors has not arrived as it was sent"):
        unpack(io.BytesIO(bytes(whole)), tmp_path / "here")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil"])
def test_a_name_outside_of_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(Incomplete, match="outside of the folder"):
        unpack(io.BytesIO(sink.getvalue()), tmp_path / "a" / "here")
    assert files_in(tmp_path) == {}


def test_a_list_of_hashes_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    sums = tarfile.TarInfo(READER_SUMS)
    sums.size = 1 << 40
    with pytest.raises(Incomplete, match="has 1048576 MiB, and at most 16 are read"):
        unpack(io.BytesIO(sums.tobuf()), tmp_path / "here")


def test_a_link_is_refused(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        info = tarfile.TarInfo("model")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(info)
    with pytest.raises(Incomplete):
        unpack(io.BytesIO(sink.getvalue()), tmp_path / "here")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["model", "--step", "7"], "has no model and no complete checkpoint yet: wait for the first"),
        (["records"], "has no run yet: wait until the trainer has begun"),
    ],
)
def test_what_is_not_there_is_one_sentence(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if options[0] == "model":
        (tmp_path / "run.json").write_text("{}")
    assert reader.main([options[0], str(tmp_path), *options[1:]], io.BytesIO()) == 78
    said = capsys.readouterr().err
    assert said.endswith(f"{sentence}\n") and said.count("\n") == 1


class Socket:
    """A WebSocket of exec: messages of a channel each, then a close or, without one, a connection that is cut."""

    def __init__(self, messages: Sequence[tuple[int, bytes]], closes: bool = True) -> None:
        self.messages, self.closes, self.closed = list(messages), closes, False

    def settimeout(self, seconds: float) -> None: ...

    def recv_data_frame(self, control: bool) -> tuple[int, Any]:
        if self.messages:
            channel, content = self.messages.pop(0)
            return ABNF.OPCODE_BINARY, SimpleNamespace(data=bytes([channel]) + content)
        if self.closes:
            return ABNF.OPCODE_CLOSE, SimpleNamespace(data=b"")
        raise WebSocketConnectionClosedException("gone")

    def close(self) -> None:
        self.closed = True


class FakeCluster:
    """What the API server answers of one job, whose volume is a folder here."""

    def __init__(self, volume: Path) -> None:
        self.namespace, self.volume = "team", volume
        self.pods: dict[str, Json] = {}
        self.made: list[Json] = []
        self.status: Json = {"phase": "Running"}
        self.trainers: list[Json] = [
            {
                "metadata": {"labels": {"distillation-operator.io/attempt": "2"}, "ownerReferences": [{"uid": "u-1"}]},
                "spec": {"template": {"spec": TRAINER}},
            }
        ]
        self.events: list[Json] = []
        self.claim: Json | None = claim_of("ReadWriteMany")
        self.output: Json = {"volume": {"claimName": "out"}}
        self.commands: list[list[str]] = []
        self.socket: Socket | None = None

    def job(self, name: str) -> Json:
        return {"metadata": job_of()["metadata"], "spec": {"output": self.output}}

    def core(self, plural: str, **query: str) -> list[Json]:
        if plural == "events":
            return self.events
        wanted = dict(pair.split("=") for pair in query.get("labelSelector", "").split(",") if pair)
        return [p for p in self.pods.values() if wanted.items() <= p["metadata"]["labels"].items()]

    def get(self, path: str, query: Any = None) -> Json:
        if path.endswith("/jobs"):
            return {"items": self.trainers}
        if "/persistentvolumeclaims/" in path:
            if self.claim is None:
                raise ApiError(404, "not found")
            return self.claim
        return self.pods[path.rpartition("/")[2]] | {"status": self.status}

    def request(self, method: str, path: str, query: Any = None, body: Json | None = None) -> Json:
        if method == "POST":
            assert body is not None
            self.made.append(body)
            self.pods[body["metadata"]["name"]] = body
            return body
        name = path.rpartition("/")[2]
        if name not in self.pods:
            raise ApiError(404, "not found")
        return self.pods.pop(name)

    def websocket(self, path: str, query: Sequence[tuple[str, str]]) -> Socket:
        assert path == f"/api/v1/namespaces/team/pods/{next(iter(self.pods))}/exec"
        command = [value for key, value in query if key == "command"]
        self.commands.append(command)
        if self.socket is None:
            sink = io.BytesIO()
            what, path, *options = command[3:]
            assert reader.main([what, path.replace("/output", str(self.volume)), *options], sink) == 0
            content = sink.getvalue()
            pieces = [(1, content[at : at + 10_000]) for at in range(0, len(content), 10_000)]
            self.socket = Socket([*pieces, (3, b'{"status": "Success"}')])
        return self.socket


@pytest.fixture
def cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(run_files, "POLL_SECONDS", 0.0)
    yield FakeCluster(folder.parent)


def test_files_of_a_job_are_read_by_a_pod_that_is_gone_afterwards(cluster: Any, folder: Path, tmp_path: Path) -> None:
    read_run_files(cluster, "sums", tmp_path / "here", "model", seconds=77)
    assert (tmp_path / "here/model/model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert cluster.pods == {} and cluster.socket.closed
    [pod] = cluster.made
    assert pod["spec"]["activeDeadlineSeconds"] == 77
    assert pod["spec"]["containers"][0]["image"] == "registry.example.com/workers:1"
    assert cluster.commands == [["python3", "-m", READER_MODULE, "model", "/output/sums"]]


def test_samples_of_a_trainer_before_its_first_step_need_no_pod(cluster: Any, folder: Path) -> None:
    labels = {LABEL_JOB: "sums", LABEL_ROLE: "trainer", LABEL_ATTEMPT: "1"}
    trainer = {"metadata": {"name": "sums-trainer-1-0", "labels": labels}, "status": {"phase": "Running"}}
    cluster.pods = {"sums-trainer-1-0": trainer}
    cluster.text = lambda path: ""
    with pytest.raises(CommandFailed, match="wait for the first step"):
        samples.rollouts_of_job(cluster, "sums", None, None, None)
    assert not cluster.made


def test_pods_that_a_killed_command_left_are_removed_and_others_stay(cluster: Any, tmp_path: Path) -> None:
    labels = pod_of()["metadata"]["labels"]
    left = holder("left", "node-1", "Failed") | {"metadata": {"name": "left", "labels": labels}}
    others = holder("running", "node-1") | {"metadata": {"name": "running", "labels": labels}}
    trainer = holder("sums-trainer-1-0", "node-1", "Succeeded")
    trainer["metadata"]["labels"] = {LABEL_MANAGED_BY: "distillation-operator"}
    cluster.pods = {p["metadata"]["name"]: p for p in (left, others, trainer)}
    cluster.websocket = lambda path, query: (_ for _ in ()).throw(ApiError(0, "stop here"))
    with pytest.raises(ApiError, match="stop here"):
        read_run_files(cluster, "sums", tmp_path / "here", "records")
    assert cluster.pods.keys() == {"running", "sums-trainer-1-0"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_command_removes_its_pod(number: signal.Signals, cluster: Any, tmp_path: Path) -> None:
    def interrupted(path: str, query: Any) -> None:
        assert len(cluster.pods) == 1
        signal.raise_signal(number)

    before = signal.getsignal(number)
    cluster.websocket = interrupted
    with pytest.raises(KeyboardInterrupt):
        read_run_files(cluster, "sums", tmp_path / "here", "records")
    assert len(cluster.made) == 1 and cluster.pods == {}
    assert signal.getsignal(number) is before


def test_a_second_interrupt_leaves_no_pod_either(cluster: Any, tmp_path: Path) -> None:
    def interrupted(path: str, query: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    request = cluster.request

    def interrupted_again(method: str, *rest: Any) -> Any:
        if method == "DELETE":
            signal.raise_signal(signal.SIGINT)
        return request(method, *rest)

    cluster.websocket, cluster.request = interrupted, interrupted_again
    with pytest.raises(KeyboardInterrupt):
        read_run_files(cluster, "sums", tmp_path / "here", "records")
    assert len(cluster.made) == 1 and cluster.pods == {}


@pytest.mark.parametrize(
    ("socket", "sentence"),
    [
        (Socket([(1, b"x" * 700)], closes=False), r"the stream from the pod was cut off \(gone\): try again"),
        (Socket([(1, b"")]), "the connection ended before the command did"),
        (
            Socket([(2, b"warning\n/output/sums has no run yet: wait\n"), (3, b'{"status": "Failure"}')]),
            "^/output/sums has no run yet: wait$",
        ),
        (
            Socket([(2, b"python3: No module named distill_workers.local.reader\n"), (3, b'{"status": "Failure"}')]),
            r"the image has no reader .*--image",
        ),
        (Socket([(3, b'{"status": "Failure", "message": "command terminated"}')]), "^command terminated$"),
    ],
    ids=["cut", "without a status", "said why", "old image", "said nothing"],
)
def test_a_stream_that_fails_says_why(socket: Socket, sentence: str, cluster: Any, tmp_path: Path) -> None:
    cluster.socket = socket
    with pytest.raises(CommandFailed, match=sentence):
        read_run_files(cluster, "sums", tmp_path / "here", "records")
    assert cluster.pods == {} and socket.closed


WAITING = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling\nimage x"}}
UNSCHEDULED = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}


@pytest.mark.parametrize(
    ("status", "events", "sentence"),
    [
        (
            {"phase": "Pending", "containerStatuses": [{"state": WAITING}]},
            [],
            "ImagePullBackOff Back-off pulling image x$",
        ),
        ({"phase": "Failed", "reason": "Evicted", "message": "no memory"}, [], "does not start: Evicted no memory$"),
        ({"phase": "Pending", "conditions": [UNSCHEDULED]}, [], "has not started within 0 s: Unschedulable 0/3 nodes$"),
        ({"phase": "Pending"}, [{"reason": "FailedMount", "message": "timed out"}], "FailedMount timed out$"),
        ({"phase": "Pending"}, [], "nothing says why$"),
    ],
)
def test_a_pod_that_does_not_start_says_why(
    status: Json, events: list[Json], sentence: str, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_files, "START_SECONDS", 0.0)
    cluster.status, cluster.events = status, events
    with pytest.raises(CommandFailed, match=sentence):
        read_run_files(cluster, "sums", tmp_path / "here", "records")
    assert cluster.pods == {}


def test_a_claim_that_is_attached_elsewhere_is_said_at_once(cluster: Any, tmp_path: Path) -> None:
    cluster.status = {"phase": "Pending"}
    cluster.events = [{"reason": "FailedAttachVolume", "message": "Multi-Attach error for volume pv-1"}]
    with pytest.raises(CommandFailed, match=r"the claim is ReadWriteOnce and attached to another node: wait until"):
        read_run_files(cluster, "sums", tmp_path / "here", "records")
    assert cluster.pods == {}


def test_a_job_that_cannot_be_read_is_refused_before_a_pod_is_made(cluster: Any, tmp_path: Path) -> None:
    def refused() -> str:
        with pytest.raises(CommandFailed) as error:
            read_run_files(cluster, "sums", tmp_path / "here", "records")
        return str(error.value)

    cluster.claim = None
    assert refused() == "claim out, which holds the run folder, does not exist any more"
    cluster.trainers = []
    assert refused().startswith("job sums has no trainer to take the image from") and "--image" in refused()
    cluster.output = {}
    assert refused() == "job sums has no spec.output.volume, so no claim holds its run folder"
    assert cluster.made == []


def test_the_trainer_of_an_earlier_job_of_the_name_is_not_taken(cluster: Any, tmp_path: Path) -> None:
    earlier = json.loads(json.dumps(cluster.trainers[0]))
    earlier["metadata"] = {
        "labels": {"distillation-operator.io/attempt": "9"},
        "ownerReferences": [{"uid": "u-0"}],
    }
    earlier["spec"]["template"]["spec"]["containers"][0]["image"] = "old"
    cluster.trainers.insert(0, earlier)
    read_run_files(cluster, "sums", tmp_path / "here", "records")
    assert cluster.made[0]["spec"]["containers"][0]["image"] == "registry.example.com/workers:1"
