"""A model in a repository of the hub, by the real client: one commit, nothing uploaded twice, refusals told by name."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer
from huggingface_hub import constants

from distill_workers.results.manifest import NAME, Manifest
from distill_workers.results.publish import Answer, Outcome, Request, answer
from distill_workers.run_folder.ownership import Owner, Ownership

CARD = "---\nlibrary_name: transformers\n---\n# sums\n"


@pytest.fixture(autouse=True)
def real_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the storage that only huggingface.co has, and without waits between its own tries."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    found = HubServer()
    yield found
    found.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    return folder


def asked(hub: HubServer, model: Path | None = None, to: str = "hf://team/sums", private: bool = True) -> Answer:
    text = Manifest.of_folder(model, job="sums", run="mine", step=20).text() if model else None
    return answer(Request(to, private, "mine", False, None, str(model) if model else None, text), hub.url)


def test_one_commit_has_the_whole_model_with_its_card_and_its_manifest(hub: HubServer, model: Path) -> None:
    found = asked(hub, model)
    assert found == Answer(Outcome.DONE, f"commit {hub.commits[0][:12]}")
    assert len(hub.commits) == 1 and hub.private
    assert hub.files.keys() == {"README.md", "config.json", "model.safetensors", NAME}
    assert hub.files["model.safetensors"] == b"weights" * 1000
    assert hub.files["README.md"].decode() == CARD
    assert Manifest.read(hub.files[NAME]) == Manifest.of_folder(model, job="sums", run="mine", step=20)


def test_the_probe_makes_a_private_repository_and_leaves_no_branch_and_no_commit(hub: HubServer) -> None:
    assert asked(hub) == Answer(Outcome.DONE, "")
    assert hub.exists and hub.private
    assert hub.branches == hub.commits == []
    assert [r.partition("probe-")[0] for r in hub.requests if "probe-" in r] == [
        "POST /api/models/team/sums/branch/",
        "DELETE /api/models/team/sums/branch/",
    ]


def test_what_is_there_already_is_neither_uploaded_nor_committed_again(hub: HubServer, model: Path) -> None:
    first = asked(hub, model)
    hub.requests.clear()
    assert asked(hub, model) == first
    assert len(hub.commits) == 1
    assert hub.of("PUT") == hub.of("POST /api/models/team/sums/commit") == []


def test_what_was_uploaded_before_a_cut_is_not_uploaded_again(hub: HubServer, model: Path) -> None:
    hub.fault = lambda request: 503 if "/commit/" in request else None
    cut = asked(hub, model)
    assert cut.outcome is Outcome.FAILED and "503" in cut.message
    assert hub.commits == [] and len(hub.of("PUT")) == 1
    hub.fault = lambda request: None
    assert asked(hub, model).outcome is Outcome.DONE
    assert len(hub.of("PUT")) == 1 and len(hub.commits) == 1


def test_weights_of_an_earlier_model_go_and_other_files_stay(hub: HubServer, model: Path) -> None:
    hub.exists, hub.private = True, True
    hub.files = dict.fromkeys(["model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt"], b"old")
    assert asked(hub, model).outcome is Outcome.DONE
    assert hub.files.keys() == {"README.md", "config.json", "model.safetensors", NAME, "notes.txt"}


def test_a_file_that_the_hub_keeps_otherwise_is_found_out(hub: HubServer, model: Path) -> None:
    commit = hub._commit

    def spoil(lines: list[dict[str, object]]) -> None:
        commit(lines)
        hub.files["model.safetensors"] = b"x" * 7000

    hub._commit = spoil  # type: ignore[method-assign, assignment]
    found = asked(hub, model)
    assert found.outcome is Outcome.FAILED
    assert found.message == "model.safetensors was committed, and what is there now is something else"


@pytest.mark.parametrize("wanted", ["probe", "publish"])
def test_a_wrong_token_is_refused_and_stands_in_no_message(
    wanted: str, hub: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_token")
    found = asked(hub, model if wanted == "publish" else None)
    assert found.outcome is Outcome.REFUSED
    assert "401" in found.message and "hf_wrong_token" not in found.message
    assert not hub.exists


def test_a_repository_of_somebody_else_is_refused(hub: HubServer) -> None:
    found = asked(hub, to="hf://others/sums")
    assert found.outcome is Outcome.REFUSED and "403" in found.message


def test_a_public_repository_is_refused_where_a_private_one_is_wanted(hub: HubServer, model: Path) -> None:
    hub.exists, hub.private = True, False
    assert asked(hub) == Answer(
        Outcome.REFUSED, "the repository is public, and private is true: set private: false, or choose another"
    )
    assert asked(hub, private=False).outcome is Outcome.DONE


@pytest.mark.parametrize("code", [-1, 500, 503])
def test_a_hub_that_does_not_answer_is_tried_again(code: int, hub: HubServer) -> None:
    hub.fault = lambda request: code
    assert asked(hub).outcome is Outcome.FAILED


def test_a_full_hub_is_said_by_its_own_words(hub: HubServer, model: Path) -> None:
    hub.fault = lambda request: 507 if request.startswith("PUT") else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = asked(hub, model)
    assert found.outcome is Outcome.FAILED and hub.commits == []


@pytest.mark.parametrize("at", ["POST /api/models/team/sums/preupload", "PUT"], ids=["before an upload", "after it"])
def test_a_trainer_that_is_replaced_while_it_uploads_commits_nothing(at: str, hub: HubServer, model: Path) -> None:
    owner = Owner("", "", 1, "first")
    mine = Ownership(model.parent, owner)
    mine.claim()
    text = Manifest.of_folder(model, job="sums", run="mine", step=20).text()

    def replace(request: str) -> None:
        if request.startswith(at):
            Ownership(model.parent, Owner("", "", 2, "second")).claim()

    hub.fault = replace
    found = answer(Request("hf://team/sums", True, "mine", False, None, str(model), text, mine.text()), hub.url)
    assert found.outcome is Outcome.SUPERSEDED and "publishes nothing more" in found.message
    assert hub.commits == [] and len(hub.of("PUT")) == (at == "PUT")
