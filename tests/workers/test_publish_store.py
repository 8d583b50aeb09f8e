"""A model in a folder of a store: whole or without a manifest, gone on with after a cut, and nobody else's touched."""

import errno
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from distill_workers.results.manifest import NAME, Manifest
from distill_workers.results.publish import Outcome, Request, answer
from distill_workers.results.store import Store

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000, "chat_templates/default.jinja": b"{{ x }}"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(params=["file", "memory"])
def to(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield f"file://{tmp_path}/claim/sums" if request.param == "file" else "memory://bucket/sums"


def manifest_of(model: Path, run: str = "mine", step: int = 20) -> Manifest:
    return Manifest.of_folder(model, job="sums", run=run, step=step)


def there(to: str) -> dict[str, bytes]:
    files, root = fsspec.url_to_fs(to)
    return {path.removeprefix(root).lstrip("/"): files.cat_file(path) for path in files.find(root)}


def asked(to: str, model: Path | None, run: str = "mine", begun: bool = False) -> tuple[Outcome, str]:
    manifest = manifest_of(model, run).text() if model else None
    found = answer(Request(to, True, run, begun, None, str(model) if model else None, manifest))
    return found.outcome, found.message


class Written:
    """Counts what is written, and is cut off at the n-th file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, to: str, error: BaseException | None = None, at: int = 1):
        self.names: list[str] = []
        kind: Any = LocalFileSystem if to.startswith("file") else MemoryFileSystem
        put_file = kind.put_file

        def put(files: Any, source: str, path: str, **more: Any) -> None:
            if error is not None and len(self.names) == at:
                with files.open(path, "wb") as sink:
                    sink.write(Path(source).read_bytes()[:3])
                raise error
            self.names.append(os.path.basename(source))
            put_file(files, source, path, **more)

        monkeypatch.setattr(kind, "put_file", put)


def test_every_file_is_there_with_a_manifest_of_its_size_and_hash(to: str, model: Path) -> None:
    assert Store(to, "mine", begun=False).publish(manifest_of(model), model) == "3 files, 0.0 MiB"
    found = there(to)
    assert {name: content for name, content in found.items() if name != NAME} == FILES
    manifest = Manifest.read(found[NAME])
    assert manifest == manifest_of(model)
    assert {f.path: f.bytes for f in manifest.files} == {name: len(content) for name, content in FILES.items()}


def test_a_probe_leaves_nothing(to: str) -> None:
    Store(to, "mine", begun=False).probe()
    assert there(to) == {}


def test_a_publication_that_was_cut_off_has_no_manifest_and_the_next_writes_only_what_is_missing(
    to: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        first = Written(patched, to, ConnectionError("gone"), at=2)
        assert asked(to, model) == (Outcome.FAILED, "gone")
    assert NAME not in there(to)
    second = Written(monkeypatch, to)
    assert asked(to, model, begun=True)[0] is Outcome.DONE
    assert len(first.names) == 2 and set(first.names) | set(second.names) == {os.path.basename(n) for n in FILES}
    assert len(second.names) == 1
    assert there(to).keys() == FILES.keys() | {NAME}


def test_a_manifest_that_was_cut_short_is_this_runs_own_where_it_has_begun(to: str, model: Path) -> None:
    assert asked(to, model)[0] is Outcome.DONE
    files, root = fsspec.url_to_fs(to)
    files.pipe_file(f"{root}/{NAME}", b'{"job": "su')
    assert asked(to, model)[0] is Outcome.REFUSED
    assert asked(to, model, begun=True)[0] is Outcome.DONE
    assert Manifest.read(there(to)[NAME]) == manifest_of(model)


def test_a_process_that_is_killed_in_the_middle_leaves_no_manifest_and_no_torn_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = f"file://{tmp_path}/claim/sums"
    child = os.fork()
    if child == 0:
        replace_file, done = os.replace, list[str]()

        def cut(source: str, path: str) -> None:
            if done:
                os._exit(9)
            done.append(path)
            replace_file(source, path)

        os.replace = cut  # type: ignore[assignment]
        answer(Request(to, True, "mine", False, None, str(model), manifest_of(model).text()))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = there(to)
    assert NAME not in left
    assert all(FILES[name] == content for name, content in left.items() if not name.endswith(".partial"))
    assert asked(to, model, begun=True)[0] is Outcome.DONE
    assert there(to).keys() == FILES.keys() | {NAME}


def test_what_is_there_already_is_not_written_again(to: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(to, model)[0] is Outcome.DONE
    written = Written(monkeypatch, to)
    assert asked(to, model, begun=True)[0] is Outcome.DONE
    assert written.names == []


def test_a_file_of_the_right_size_with_another_content_is_written_anew(to: str, model: Path) -> None:
    assert asked(to, model)[0] is Outcome.DONE
    files, root = fsspec.url_to_fs(to)
    files.pipe_file(f"{root}/model.safetensors", b"x" * 7000)
    assert asked(to, model, begun=True)[0] is Outcome.DONE
    assert there(to)["model.safetensors"] == FILES["model.safetensors"]


def test_a_store_that_keeps_other_bytes_than_it_was_given_is_found_out(
    to: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(files: Any, source: str, path: str, **more: Any) -> None:
        with files.open(path, "wb") as sink:
            sink.write(b"?" * os.path.getsize(source))

    monkeypatch.setattr(LocalFileSystem if to.startswith("file") else MemoryFileSystem, "put_file", spoil)
    outcome, message = asked(to, model)
    assert outcome is Outcome.FAILED
    assert message == "chat_templates/default.jinja was written, and what is there now is something else"
    assert NAME not in there(to)


def test_another_model_of_the_run_replaces_the_one_that_is_there_and_leaves_none_of_its_files(
    to: str, model: Path
) -> None:
    assert asked(to, model)[0] is Outcome.DONE
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    assert asked(to, model, begun=True)[0] is Outcome.DONE
    assert there(to).keys() == {"config.json", "model-00001-of-00001.safetensors", "chat_templates/default.jinja", NAME}


@pytest.mark.parametrize("wanted", ["probe", "publish"])
def test_the_model_of_another_run_is_not_touched(wanted: str, to: str, model: Path) -> None:
    assert asked(to, model, run="theirs")[0] is Outcome.DONE
    before = there(to)
    outcome, message = asked(to, model if wanted == "publish" else None, run="mine", begun=True)
    assert outcome is Outcome.REFUSED
    assert message == "the model of another run (job sums) is there: choose another folder, or remove it"
    assert there(to) == before


def test_a_folder_with_other_files_is_refused_before_anything_is_written(to: str, model: Path) -> None:
    files, root = fsspec.url_to_fs(to)
    files.makedirs(root)
    files.pipe_file(f"{root}/thesis.tex", b"years")
    outcome, message = asked(to, None)
    assert outcome is Outcome.REFUSED
    assert message == "the folder is not empty, and no model of this run is there: choose another, or remove it"
    assert there(to) == {"thesis.tex": b"years"}


def test_the_probe_of_a_process_that_was_killed_makes_the_folder_nobody_elses(to: str, model: Path) -> None:
    files, root = fsspec.url_to_fs(to)
    files.makedirs(root)
    files.pipe_file(f"{root}/.probe-0", b"probe")
    assert asked(to, None)[0] is Outcome.DONE


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), Outcome.FAILED),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), Outcome.FAILED),
        (OSError(errno.EROFS, "Read-only file system"), Outcome.REFUSED),
        (PermissionError("Access Denied"), Outcome.REFUSED),
        (FileNotFoundError("The specified bucket does not exist"), Outcome.REFUSED),
        (TimeoutError("slow"), Outcome.FAILED),
        (ConnectionResetError("gone"), Outcome.FAILED),
        (ValueError("Must provide either a connection_string or account_name"), Outcome.REFUSED),
        (json.JSONDecodeError("a page of a proxy", "<html>", 0), Outcome.FAILED),
        (type("NoCredentialsError", (Exception,), {})("Unable to locate credentials"), Outcome.REFUSED),
        (type("HttpError", (Exception,), {"code": 403})("forbidden"), Outcome.REFUSED),
        (type("HttpError", (Exception,), {"code": 503})("busy"), Outcome.FAILED),
    ],
    ids=lambda value: str(value),
)
def test_a_full_or_slow_store_is_tried_again_and_one_that_refuses_is_not(
    error: Exception, outcome: Outcome, to: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Written(monkeypatch, to, error, at=1)
    found, message = asked(to, model)
    assert found is outcome and message.endswith(str(error))
    assert NAME not in there(to)


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("az", "adlfs")])
def test_a_store_whose_package_is_missing_says_which_and_where_it_belongs(
    scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed: importing it raises
    outcome, message = asked(f"{scheme}://bucket/sums", None)
    assert outcome is Outcome.REFUSED
    assert message.startswith(f"the Python package {package} is needed for it and not installed: build an image")


def test_no_message_has_an_entry_of_the_secret(
    to: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = tmp_path / "secret"
    secrets.mkdir()
    (secrets / "AWS_SECRET_ACCESS_KEY").write_text("hunter2hunter2\n")
    (secrets / "key.json").write_text('{"key":\n "not a variable"}')
    monkeypatch.setattr(os, "environ", dict(os.environ))
    Written(monkeypatch, to, PermissionError('key hunter2hunter2 is not known, nor {"key":\n "not a variable"}'), at=0)
    request = Request(to, True, "mine", False, str(secrets), str(model), manifest_of(model).text())
    assert answer(request).message == "key *** is not known, nor ***"
    assert os.environ.pop("AWS_SECRET_ACCESS_KEY") == "hunter2hunter2"
    os.environ["AZURE_STORAGE_ACCOUNT_KEY"] = "hunter2hunter2"  # of this machine's own environment
    assert answer(replace(request, secrets=None, begun=True)).message.startswith("key *** is not known")
    assert "key.json" not in os.environ


def test_a_secret_that_does_not_exist_is_said_by_its_name(to: str, model: Path, tmp_path: Path) -> None:
    """The kubelet mounts an empty folder for one that is optional."""
    (tmp_path / "hub-token" / "..2026_11_30").mkdir(parents=True)
    found = answer(Request(to, True, "mine", False, str(tmp_path / "hub-token"), str(model), manifest_of(model).text()))
    assert found.outcome is Outcome.REFUSED
    assert found.message == "the Secret hub-token does not exist or has no key; create it, then a new job"
    assert there(to) == {}


def test_manifests_of_the_same_files_have_one_content_whatever_the_step(model: Path) -> None:
    manifest = manifest_of(model)
    assert replace(manifest, step=21).content == manifest.content
    (model / "config.json").write_bytes(b"[]")
    assert manifest_of(model).content != manifest.content


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 1}', '{"files": [{"path": 1}]}'])
def test_what_is_no_manifest_is_read_as_none(text: str) -> None:
    assert Manifest.read(text) is None
