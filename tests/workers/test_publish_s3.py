"""A model on an object store: the real client, in a process of its own, against a server that speaks S3 over HTTP.

The server is moto's. Before it stands what makes it full, slow or silent.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto import settings as moto_settings
from moto.core import authorization as moto_authorization
from moto.moto_server import werkzeug_app as moto_app
from test_publisher import Setting
from werkzeug import serving

from distill_workers.failures import PreflightFailed
from distill_workers.results.manifest import NAME, Manifest
from distill_workers.results.publish import Outcome, Request
from distill_workers.results.publisher import CHILD

BUCKET, TO = "models", "s3://models/team/sums"
SMALL, PARTS = 200_000, 105 * 2**20
"""Bytes of a file that is one request, and of one that the client sends in parts."""
FULL = b"<Error><Code>XMinioStorageFull</Code><Message>Storage backend has reached its limit</Message></Error>"


class Server:
    """One bucket. `answers` may answer a request in place of the store: status and body, or None."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.answers: Callable[[str, str], tuple[str, bytes] | None] = lambda method, path: None
        self._app = moto_app.DomainDispatcherApplication(moto_app.create_backend_app)
        handler = moto_app.MotoRequestHandler
        self._server = serving.make_server("127.0.0.1", 0, self._asked, threaded=True, request_handler=handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
        self.client = boto3.client("s3", endpoint_url=self.url, **keys)
        self.client.create_bucket(Bucket=BUCKET)

    def _asked(self, environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        instead = self.answers(method, path)
        if instead is None:
            return self._app(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(instead[0], [("Content-Type", "application/xml"), ("Content-Length", str(len(instead[1])))])
        return [instead[1]]

    def authenticate(self, on: bool) -> None:
        """Know keys from here on, of which there are none; or take any."""
        moto_settings.INITIAL_NO_AUTH_ACTION_COUNT = 0.0 if on else float("inf")
        moto_authorization.ActionAuthenticatorMixin.request_count = 0

    def written(self) -> list[str]:
        """The files that were written, by one request or in parts."""
        names = [path.removeprefix(f"/{BUCKET}/team/sums/") for method, path in self.requests if method == "PUT"]
        return sorted({name for name in names if not name.startswith((".probe", "/"))})

    def files(self) -> dict[str, int]:
        """Sizes of what is there."""
        listed = self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return {each["Key"].removeprefix("team/sums/"): each["Size"] for each in listed}

    def manifest(self) -> Manifest | None:
        return Manifest.read(self.client.get_object(Bucket=BUCKET, Key=f"team/sums/{NAME}")["Body"].read())

    def close(self) -> None:
        for each in self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []):
            self.client.abort_multipart_upload(Bucket=BUCKET, Key=each["Key"], UploadId=each["UploadId"])
        for key in self.files():
            self.client.delete_object(Bucket=BUCKET, Key=f"team/sums/{key}")
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    found = Server()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", found.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI-K7MDENG")
    yield found
    found.authenticate(False)
    found.answers = lambda method, path: None
    found.close()


def model_of(folder: Path, size: int = SMALL) -> Path:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(b"w" * size)
    (folder / "model" / "tokenizer.json").write_text("[]")
    return folder / "model"


def child(model: Path | None, to: str = TO, run: str = "mine", begun: bool = False) -> "subprocess.Popen[str]":
    """The process of one try, which was asked."""
    manifest = Manifest.of_folder(model, job="sums", run=run, step=20).text() if model else None
    request = Request(to, True, run, begun, None, str(model) if model else None, manifest)
    process = subprocess.Popen(CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(request)))
    process.stdin.close()
    return process


def asked(model: Path | None, **options: Any) -> tuple[Outcome, str]:
    process = child(model, **options)
    assert process.stdout is not None
    found = json.loads(process.stdout.read())
    process.wait(60)
    return Outcome(found["outcome"]), found["message"]


def test_a_model_is_there_whole_and_is_not_written_twice(server: Server, tmp_path: Path) -> None:
    model = model_of(tmp_path)
    assert asked(None) == (Outcome.DONE, "")
    assert server.files() == {}, "a probe leaves nothing"
    assert asked(model) == (Outcome.DONE, "3 files, 0.2 MiB")
    files = server.files()
    assert files.pop(NAME) and files == {"config.json": 2, "model.safetensors": SMALL, "tokenizer.json": 2}
    assert server.manifest() == Manifest.of_folder(model, job="sums", run="mine", step=20)
    server.requests.clear()
    assert asked(model, begun=True)[0] is Outcome.DONE
    assert server.written() in ([], [NAME])


@pytest.mark.parametrize("size", [SMALL, PARTS], ids=["one request", "in parts"])
def test_a_process_that_is_killed_in_the_middle_of_an_upload_leaves_no_manifest_and_is_gone_on_from(
    size: int, server: Server, tmp_path: Path
) -> None:
    model = model_of(tmp_path, size)
    reached, killed = threading.Event(), threading.Event()

    def hold(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("/model.safetensors"):
            reached.set()
            killed.wait(60)

    server.answers = hold
    process = child(model)
    assert reached.wait(120)
    process.kill()
    assert process.wait(60) == -9
    left = server.files()
    killed.set()
    assert left == {"config.json": 2}
    parts = server.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    assert len(parts) == (size == PARTS), "what a lifecycle rule of the bucket removes"
    server.answers = lambda method, path: None
    server.requests.clear()
    assert asked(model, begun=True)[0] is Outcome.DONE
    assert "config.json" not in server.written(), "what is there is not sent again"
    assert server.files().keys() == {"config.json", "model.safetensors", "tokenizer.json", NAME}
    assert server.files()["model.safetensors"] == size
    assert server.manifest() == Manifest.of_folder(model, job="sums", run="mine", step=20)


def test_a_full_store_is_tried_again_and_has_no_manifest_until_there_is_room(server: Server, tmp_path: Path) -> None:
    model = model_of(tmp_path)
    server.answers = lambda method, path: (
        ("507 Insufficient Storage", FULL) if method == "PUT" and path.endswith("model.safetensors") else None
    )
    outcome, message = asked(model)
    assert outcome is Outcome.FAILED and "Storage backend has reached its limit" in message
    assert NAME not in server.files()
    server.answers = lambda method, path: None
    assert asked(model, begun=True)[0] is Outcome.DONE


def test_a_wrong_key_is_refused_at_once_and_stands_in_no_message(server: Server, tmp_path: Path) -> None:
    server.authenticate(True)
    for model in (None, model_of(tmp_path)):
        outcome, message = asked(model)
        assert outcome is Outcome.REFUSED
        assert (
            "the store does not know the key" in message
            and "wJalrXUtnFEMI" not in message
            and "AKIAIOSFODNN7EXAMPLE" not in message
        )


def test_without_a_key_it_is_refused_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    outcome, message = asked(None)
    assert outcome is Outcome.REFUSED and "credentials" in message


def test_a_bucket_that_is_not_there_is_refused_at_once(server: Server) -> None:
    outcome, message = asked(None, to="s3://nowhere/sums")
    assert outcome is Outcome.REFUSED and "bucket" in message


def test_the_model_of_another_run_is_not_touched(server: Server, tmp_path: Path) -> None:
    assert asked(model_of(tmp_path), run="theirs")[0] is Outcome.DONE
    before = server.files()
    outcome, message = asked(model_of(tmp_path, 10))
    assert outcome is Outcome.REFUSED and message.startswith("the model of another run (job sums) is there")
    assert server.files() == before


def test_a_slow_store_ends_no_run_and_is_gone_on_with_by_the_next_attempt(server: Server, tmp_path: Path) -> None:
    setting = Setting(tmp_path / "output", {"to": TO}, stallTimeoutSeconds=24)
    model_of(tmp_path / "output" / "sums")
    released = threading.Event()

    def slow(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("/model.safetensors"):
            released.wait(60)

    server.answers = slow
    [missed] = setting.published()
    released.set()
    assert not missed.done and missed.message.startswith("it had not ended after")
    server.answers = lambda method, path: None
    [made] = Setting(tmp_path / "output", {"to": TO}).published()
    assert made.done and NAME in server.files()


async def test_a_store_that_refuses_ends_the_run_before_its_first_step(server: Server, tmp_path: Path) -> None:
    server.authenticate(True)
    setting = Setting(tmp_path / "output", {"to": TO})
    with pytest.raises(
        PreflightFailed, match=r"spec\.output\.publish to s3://models/team/sums: .*the store does not know the key"
    ):
        await setting.publisher().probe()


def test_the_process_imports_no_torch_for_it() -> None:
    """It is started for each try, beside a trainer that has most of the memory."""
    code = "import sys, s3fs, distill_workers.results.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
