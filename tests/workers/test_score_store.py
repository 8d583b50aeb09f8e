"""The store of scores: a response of the data set is scored once, and nothing but that very score is read back."""

import asyncio
import dataclasses
import errno
import hashlib
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import spec_of

from distill_workers.failures import ConfigurationError
from distill_workers.teacher.protocol import Scores
from distill_workers.teacher.stored_scores import segment as score_segment
from distill_workers.teacher.stored_scores import store as module
from distill_workers.teacher.stored_scores.identity import ScoreIdentity, identity_of, weights_digest
from distill_workers.teacher.stored_scores.job_stores import stores_of_job
from distill_workers.teacher.stored_scores.label import LABEL, stored_labels, write_label
from distill_workers.teacher.stored_scores.store import ScoreStore

IDENTITY = ScoreIdentity("teacher", "weights", "float32", (), 2, 64)
PROMPT, RESPONSE = [5, 6, 7], [8, 9, 63]
ROWS = [([n], [n + 1, n + 2]) for n in range(20)]


class Observed:
    """Stands for Metrics."""

    def __init__(self) -> None:
        self.results: Counter[str] = Counter()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        assert (name, labels.keys(), labels["teacher"]) == ("distill_stored_scores", {"result", "teacher"}, "teacher")
        self.results[labels["result"]] += int(amount)

    def observe(self, name: str, value: float, **labels: str) -> None:
        raise AssertionError(name)

    change = observe


def scores_of(prompt: list[int], response: list[int], top_k: int | None = 2) -> Scores:
    """Scores that no other pair has, with bits that a rounding would lose."""
    random = np.random.default_rng([*prompt, 1000, *response])
    logprobs = (-random.random(len(response))).tolist()
    if top_k is None:
        return Scores(logprobs, None, None)
    shape = (len(response), top_k)
    top = -random.random(shape).astype(np.float32)
    return Scores(logprobs, random.integers(-1, 64, shape, dtype=np.int32), top)


def bits(scores: Scores | None) -> tuple[bytes, ...]:
    assert scores is not None
    arrays = [np.array(scores.logprobs, dtype=np.float64)]
    if scores.top_ids is not None:
        assert scores.top_logprobs is not None
        assert (scores.top_ids.dtype, scores.top_logprobs.dtype) == (np.int32, np.float32)
        arrays += [scores.top_ids, scores.top_logprobs]
    return tuple(repr(a.shape).encode() + a.tobytes() for a in arrays)


async def opened(root: Path, identity: ScoreIdentity = IDENTITY, **options: Any) -> tuple[ScoreStore, Observed]:
    observed = Observed()
    store = ScoreStore(root, "teacher", identity, observed, **options)
    await store.open()
    return store, observed


async def fill(root: Path, identity: ScoreIdentity = IDENTITY, rows: Any = ROWS) -> None:
    store, _ = await opened(root, identity)
    for prompt, response in rows:
        await store.add(prompt, response, scores_of(prompt, response, identity.top_k))
    await store.flush()


def segments(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.scores"))


async def found(root: Path) -> tuple[list[bool], Counter[str]]:
    """Whether each of ROWS is found, always with the bits that were added; and what was counted."""
    store, observed = await opened(root)
    hits = []
    for prompt, response in ROWS:
        scores = await store.find(prompt, response)
        assert scores is None or bits(scores) == bits(scores_of(prompt, response))
        hits.append(scores is not None)
    return hits, observed.results


@pytest.mark.parametrize("top_k", [None, 1, 2])
async def test_what_is_read_has_the_bits_that_were_added(tmp_path: Path, top_k: int | None) -> None:
    identity = dataclasses.replace(IDENTITY, top_k=top_k)
    store, observed = await opened(tmp_path, identity)
    assert await store.find(PROMPT, RESPONSE) is None
    live = scores_of(PROMPT, RESPONSE, top_k)
    await store.add(PROMPT, RESPONSE, live)
    assert bits(await store.find(PROMPT, RESPONSE)) == bits(live), "before it is on disk"
    await store.flush()
    assert bits(await store.find(PROMPT, RESPONSE)) == bits(live)
    again, _ = await opened(tmp_path, identity)
    assert bits(await again.find(PROMPT, RESPONSE)) == bits(live), "in another process"
    assert observed.results == {"miss": 1, "hit": 2}


async def test_another_split_between_prompt_and_response_is_another_score(tmp_path: Path) -> None:
    await fill(tmp_path, rows=[([1, 2], [3, 4])])
    store, _ = await opened(tmp_path)
    assert await store.find([1, 2], [3, 4]) is not None
    for prompt, response in (
        ([1], [2, 3, 4]),
        ([1, 2, 3], [4]),
        ([], [1, 2, 3, 4]),
        ([1, 2], [3, 5]),
        ([2, 1], [3, 4]),
    ):
        assert await store.find(prompt, response) is None


CHANGES: dict[str, Any] = {
    "teacher": "other", "weights": "other", "precision": "bfloat16", "engine_args": ("--quantization", "fp8"),
    "top_k": 3, "student_tokens": 65,
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
async def test_a_store_of_something_else_is_never_matched(tmp_path: Path, field: str) -> None:
    """Neither beside the own one, nor where somebody copied its segments over."""
    other = dataclasses.replace(IDENTITY, **{field: CHANGES[field]})
    await fill(tmp_path, other)
    mine, _ = await opened(tmp_path)
    assert [await mine.find(*row) for row in ROWS] == [None] * len(ROWS)
    [segment] = segments(tmp_path)
    (mine.folder / segment.name).write_bytes(segment.read_bytes())
    mine, observed = await opened(tmp_path)
    assert [await mine.find(*row) for row in ROWS] == [None] * len(ROWS)
    assert observed.results == {"miss": len(ROWS)}


async def test_a_segment_cut_off_anywhere_gives_no_wrong_score_and_no_error(tmp_path: Path) -> None:
    await fill(tmp_path)
    [segment] = segments(tmp_path)
    whole, before = segment.read_bytes(), 0
    for size in range(0, len(whole), 7):
        segment.write_bytes(whole[:size])
        hits, results = await found(tmp_path)
        assert sum(hits) >= before and results["refused"] >= 1, size
        assert results["hit"] + results["miss"] == len(ROWS)
        before = sum(hits)
    assert before == len(ROWS) - 1


async def test_a_bit_that_flips_anywhere_loses_no_more_than_it_must(tmp_path: Path) -> None:
    """In the values one entry, in the table the segment; never a wrong score, and always counted."""
    await fill(tmp_path)
    [segment] = segments(tmp_path)
    whole = segment.read_bytes()
    values = score_segment.HEADER.size + len(ROWS) * score_segment.ENTRY.size
    for at in range(0, len(whole), 5):
        segment.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        hits, results = await found(tmp_path)
        assert sum(hits) == (len(ROWS) - 1 if at >= values else 0), at
        assert results["refused"] == 1, at


async def test_a_refused_entry_is_scored_and_stored_again_and_found_from_then_on(tmp_path: Path) -> None:
    await fill(tmp_path)
    [segment] = segments(tmp_path)
    damaged = bytearray(segment.read_bytes())
    damaged[-1] ^= 1
    segment.write_bytes(damaged)
    store, observed = await opened(tmp_path)
    assert await store.find(*ROWS[-1]) is None
    await store.add(*ROWS[-1], scores_of(*ROWS[-1]))
    await store.flush()
    assert observed.results == {"refused": 1, "miss": 1}
    hits, results = await found(tmp_path)
    assert all(hits) and results == {"hit": len(ROWS), "refused": 1}


async def test_a_writer_that_is_killed_at_any_byte_leaves_what_was_there(tmp_path: Path) -> None:
    await fill(tmp_path, rows=ROWS[:10])
    await fill(tmp_path, rows=ROWS[10:])
    last = segments(tmp_path)[-1]
    whole = last.read_bytes()
    last.unlink()
    for size in range(0, len(whole), 11):
        aside = last.with_suffix(score_segment.ASIDE)
        aside.write_bytes(whole[:size])
        hits, results = await found(tmp_path)
        assert hits == [True] * 10 + [False] * 10 and "refused" not in results
        assert aside.exists(), "its writer may still be at work"
    os.utime(aside, (0, 0))
    await opened(tmp_path)
    assert not aside.exists(), "nobody writes for so long"
    assert {path.suffix for path in aside.parent.iterdir()} == {".json", ".scores"}


async def test_the_age_of_a_file_of_another_writer_is_told_by_the_volumes_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine's may be hours ahead."""
    await fill(tmp_path)
    aside = segments(tmp_path)[0].with_suffix(score_segment.ASIDE)
    aside.write_bytes(b"half")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86_400)
    await opened(tmp_path)
    assert aside.exists()


async def test_two_writers_at_once_lose_nothing_of_each_other(tmp_path: Path) -> None:
    (one, _), (two, _) = await opened(tmp_path), await opened(tmp_path)

    async def write(store: ScoreStore, rows: Any) -> None:
        for prompt, response in rows:
            await store.add(prompt, response, scores_of(prompt, response))
            await store.flush()

    await asyncio.gather(write(one, ROWS[:14]), write(two, ROWS[6:]))
    await asyncio.gather(one.flush(), two.flush())
    assert len(segments(tmp_path)) == 28
    hits, results = await found(tmp_path)
    assert all(hits) and results == {"hit": len(ROWS)}


async def test_of_two_scores_of_one_response_the_earlier_is_read(tmp_path: Path) -> None:
    """So that a run which goes on reads what it read before."""
    for number in (1, 2):
        store, _ = await opened(tmp_path / str(number))
        await store.add(PROMPT, RESPONSE, scores_of([number], RESPONSE))
        await store.flush()
    [second] = segments(tmp_path / "2")
    [first] = segments(tmp_path / "1")
    (first.parent / second.name).write_bytes(second.read_bytes())
    store, _ = await opened(tmp_path / "1")
    assert bits(await store.find(PROMPT, RESPONSE)) == bits(scores_of([1], RESPONSE))
    await store.add(PROMPT, RESPONSE, scores_of([2], RESPONSE))
    assert bits(await store.find(PROMPT, RESPONSE)) == bits(scores_of([1], RESPONSE))


def broken(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


async def until(reached: Any) -> None:
    async with asyncio.timeout(60):
        while not reached():
            await asyncio.sleep(0.005)


async def test_on_a_full_volume_scores_wait_and_are_written_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await fill(tmp_path, rows=ROWS[:5])
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.01)
    store, observed = await opened(tmp_path)
    tries = []

    def full(descriptor: int) -> None:
        tries.append(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for prompt, response in ROWS[5:]:
            await store.add(prompt, response, scores_of(prompt, response))
        await until(lambda: len(tries) > 3)
    assert [r.levelname for r in caplog.records if "No space left" in r.message] == ["WARNING"], "said once"
    await until(lambda: len(store) == len(ROWS))
    await store.close()
    assert [path.suffix for path in store.folder.iterdir() if path.suffix != ".json"] == [".scores"] * 2
    hits, _ = await found(tmp_path)
    assert all(hits) and observed.results == {}


async def test_memory_holds_no_more_than_some_segments_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 100)
    store, observed = await opened(tmp_path)
    monkeypatch.setattr(os, "fsync", broken(errno.EIO))
    for _ in range(3):
        for prompt, response in ROWS:
            await store.add(prompt, response, scores_of(prompt, response))
        assert store.unwritten_bytes <= 400
    before = observed.results["unwritten"]
    assert before == 3 * (len(ROWS) - 8), "of 48 bytes each"
    await store.close()
    assert observed.results == {"unwritten": before + 8} and segments(tmp_path) == []


async def test_a_folder_that_cannot_be_made_is_a_store_of_nothing_until_it_can(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store, observed = await opened(tmp_path / "file")
    await store.add(PROMPT, RESPONSE, scores_of(PROMPT, RESPONSE))
    await store.flush()
    assert len(store) == 0 and observed.results == {}
    (tmp_path / "file").unlink()
    await store.close()
    assert len(store) == 1 and observed.results == {} and len(segments(tmp_path / "file")) == 1


async def test_a_segment_that_cannot_be_read_takes_no_other_with_it(tmp_path: Path) -> None:
    await fill(tmp_path, rows=ROWS[:10])
    await fill(tmp_path, rows=ROWS[10:])
    first = segments(tmp_path)[0]
    first.unlink()
    first.symlink_to(tmp_path / "nothing")
    hits, results = await found(tmp_path)
    assert hits == [False] * 10 + [True] * 10 and results == {"refused": 1, "miss": 10, "hit": 10}
    await fill(tmp_path, rows=ROWS[:10])
    hits, _ = await found(tmp_path)
    assert all(hits), "and what it had is stored again"


async def test_a_segment_that_vanishes_is_scored_again(tmp_path: Path) -> None:
    await fill(tmp_path)
    store, observed = await opened(tmp_path)
    segments(tmp_path)[0].unlink()
    assert await store.find(*ROWS[0]) is None and observed.results == {"refused": 1, "miss": 1}


async def test_memory_holds_no_more_than_a_segment_of_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 100)
    store, _ = await opened(tmp_path)
    for prompt, response in ROWS:
        await store.add(prompt, response, scores_of(prompt, response))
        assert store.unwritten_bytes < 100
    assert len(segments(tmp_path)) == 6, "three entries of 48 bytes in each, and two that wait"


async def test_what_is_old_is_written_also_where_nothing_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill loses the scores of the last minutes alone, also after hours of hits."""
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.01)
    store, _ = await opened(tmp_path)
    await store.add(*ROWS[0], scores_of(*ROWS[0]))
    assert segments(tmp_path) == []
    await until(lambda: len(store) == 1)
    assert len(segments(tmp_path)) == 1


async def test_a_store_that_is_only_read_writes_nothing(tmp_path: Path) -> None:
    store, _ = await opened(tmp_path, read_only=True)
    await store.close()
    assert list(tmp_path.iterdir()) == []


async def test_what_a_volume_does_not_give_at_the_moment_is_an_error_of_a_store_that_is_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entries are as they were: another attempt reads them."""
    await fill(tmp_path)
    store, observed = await opened(tmp_path, read_only=True)
    for place in ("read_entry", "read_table", "segments_of"):
        with monkeypatch.context() as patched:
            patched.setattr(module, place, broken(errno.ESTALE))
            with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
                await (store.find(*ROWS[0]) if place == "read_entry" else opened(tmp_path, read_only=True))
    assert await store.find(*ROWS[0]) is not None and observed.results == {"hit": 1}


async def test_an_error_of_reading_names_the_segment(tmp_path: Path) -> None:
    await fill(tmp_path)
    store, _ = await opened(tmp_path, read_only=True)
    [segment] = segments(tmp_path)
    segment.unlink()
    segment.symlink_to("/proc/self/mem")  # which opens, and cannot be read at 0
    with pytest.raises(OSError, match=segment.name):
        await store.find(*ROWS[0])


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"teacher": "t"}', "\0" * 9, "of another"])
async def test_a_label_that_is_not_the_right_one_is_written_again(tmp_path: Path, damage: str) -> None:
    await fill(tmp_path)
    [label] = tmp_path.glob(f"*/{LABEL}")
    right = label.read_text()
    label.write_text(damage if damage != "of another" else right.replace('": "teacher"', '": "other"'))
    assert stored_labels(tmp_path) == []
    await opened(tmp_path)
    assert label.read_text() == right


def teacher_in(folder: Path, name: str = "t", change: int | None = None) -> Path:
    """A teacher's folder with a file of weights of 1 MB, of which 64 KB in the middle are others with `change`."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    values = bytearray(np.random.default_rng(1).bytes(1 << 20))
    if change is not None:
        values[500_000:565_536] = np.random.default_rng(change).bytes(1 << 16)
    (path / "model.safetensors").write_bytes(values)
    (path / "config.json").write_text("{}")
    return path


def test_weights_that_differ_in_their_middle_alone_are_others(tmp_path: Path) -> None:
    """As where an adapter of some layers was merged: names, sizes and both ends are the same."""
    plain = weights_digest(teacher_in(tmp_path / "a"))
    assert plain and plain == weights_digest(teacher_in(tmp_path / "b"))
    assert plain != weights_digest(teacher_in(tmp_path / "c", change=2))
    (tmp_path / "b" / "t" / "config.json").write_text('{"rope_theta": 1}')
    assert plain != weights_digest(tmp_path / "b" / "t")
    assert weights_digest(tmp_path / "nothing") == ""


def identity(of: Any) -> ScoreIdentity:
    return identity_of(of, of.all_teachers[0], 64)


def spec(output: Path, teacher: Any, how: str = "cached", **changes: Any) -> Any:
    objective = {"support": "top-k", "topK": 2, "datasetShare": 1, "teacherLogprobs": how}
    data = {"prompts": {"path": "/p.jsonl", "responseField": "response"}}
    options = {"objective": objective, "data": data, "output": {"path": str(output)}, **changes}
    return spec_of(Path("/s"), Path("/t"), teacher=teacher, **options)


async def test_the_identity_is_of_what_the_teacher_computes_with(tmp_path: Path) -> None:
    folder = teacher_in(tmp_path)
    found = identity(spec(tmp_path, {"model": str(folder), "engineArgs": ["--x"]}))
    assert found == ScoreIdentity("t", weights_digest(folder), "float32", ("--x",), 2, 64)
    hub = identity(spec(tmp_path, {"model": "Qwen/Qwen3-8B"}))
    assert (hub.teacher, hub.weights) == ("Qwen/Qwen3-8B", ""), "not that of somebody else under the same name"
    assert identity(spec(tmp_path, {"model": "/gone/model"})).teacher == "/gone/model"
    endpoint = {"url": "https://vllm.example/v1", "protocol": "openai", "model": "big"}
    assert identity(spec(tmp_path, {"endpoint": endpoint})).teacher == "https://vllm.example/v1 big"
    assert identity(spec(tmp_path, {"ref": {"name": "shared"}})).teacher == "Teacher shared"


def test_only_a_job_that_says_so_has_stores(tmp_path: Path) -> None:
    assert stores_of_job(spec(tmp_path, {"model": "/t"}, "live"), 64, Observed()) == {}
    [(name, store)] = stores_of_job(spec(tmp_path, {"model": "/t"}), 64, Observed()).items()
    assert (name, store.folder.parent, store.read_only) == ("teacher", tmp_path / "teacher_scores", False)


def store_without_a_teacher(tmp_path: Path, model: str) -> ScoreStore:
    [store] = stores_of_job(spec(tmp_path, {"model": model}, "precomputed"), 64, Observed()).values()
    return store


async def stored_by(tmp_path: Path, model: Any) -> ScoreIdentity:
    """Store scores as a job with that teacher does."""
    of = spec(tmp_path, {"model": str(model)})
    [store] = stores_of_job(of, 64, Observed()).values()
    await store.open()
    for prompt, response in ROWS:
        await store.add(prompt, response, scores_of(prompt, response))
    await store.close()
    return store.identity


async def test_a_job_without_its_teachers_files_reads_the_one_store_of_that_path(tmp_path: Path) -> None:
    """Where nothing of the teacher is left but its scores."""
    folder = teacher_in(tmp_path / "models")
    own = await stored_by(tmp_path, folder)
    write_label(tmp_path / "teacher_scores", dataclasses.replace(own, top_k=3), str(folder))
    (folder / "model.safetensors").rename(tmp_path / "weights")
    store = store_without_a_teacher(tmp_path, str(folder))
    await store.open()
    assert store.read_only and store.identity == own and await store.find(*ROWS[0]) is not None
    write_label(tmp_path / "teacher_scores", dataclasses.replace(own, weights="of another t"), str(folder))
    with pytest.raises(
        ConfigurationError, match=r"2 stores of teacher .*/t with .*spec.teacher.model/config.json.*remove the other"
    ):
        store_without_a_teacher(tmp_path, str(folder))
    (tmp_path / "weights").rename(folder / "model.safetensors")
    assert store_without_a_teacher(tmp_path, str(folder)).identity == own


async def test_a_teacher_whose_path_ends_as_anothers_does_not_get_its_scores(tmp_path: Path) -> None:
    """Each exported model is called `model`."""
    folder = teacher_in(tmp_path / "one", "model")
    own = await stored_by(tmp_path, folder)
    with pytest.raises(
        ConfigurationError,
        match=rf"^spec\.teacher\.model: .*/teacher_scores has no scores of /two/model, .* of {folder}, which may be "
        r"another teacher: .* write that path here or mount the files; else run .* cached$",
    ):
        store_without_a_teacher(tmp_path, "/two/model")
    moved = tmp_path / "two" / "model"
    moved.parent.mkdir()
    folder.rename(moved)
    assert await stored_by(tmp_path, moved) == own, "its weights say that it is the same"
    [label] = stored_labels(tmp_path / "teacher_scores")
    assert label.models == (str(folder), str(moved))
    (moved / "model.safetensors").unlink()
    for model in (folder, moved):
        assert store_without_a_teacher(tmp_path, str(model)).identity == own


async def test_a_model_of_the_hub_is_known_by_its_whole_id(tmp_path: Path) -> None:
    own = await stored_by(tmp_path, "one/foo")
    assert store_without_a_teacher(tmp_path, "one/foo").identity == own
    with pytest.raises(ConfigurationError, match=r"no scores of two/foo, .* of one/foo, which may be another teacher"):
        store_without_a_teacher(tmp_path, "two/foo")
    assert store_without_a_teacher(tmp_path, "one/bar").identity.teacher == "one/bar"


async def test_labels_that_the_volume_does_not_give_at_the_moment_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stored_by(tmp_path, "one/foo")
    monkeypatch.setattr(Path, "read_text", broken(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        store_without_a_teacher(tmp_path, "one/foo")


def test_the_digest_is_stable() -> None:
    """A change of it makes every store foreign."""
    assert (
        len(IDENTITY.digest) == 64
        and IDENTITY.digest == hashlib.sha256(b'["teacher", "weights", "float32", [], 2, 64]').hexdigest()
    )
