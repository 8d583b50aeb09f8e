"""Prompts are read as they are meant, every fault names its place, and the cursor continues where it was."""

import datetime
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import spec_of, tiny_tokenizer

from distill_api.spec.job_spec import Prompts, Spec
from distill_workers.data import prompts
from distill_workers.data.cursor import Cursor
from distill_workers.data.dataset_responses import supervised_positions, supervised_sample
from distill_workers.data.prompts import load_data, load_prompts
from distill_workers.data.sample import Prompt
from distill_workers.failures import PromptError
from distill_workers.metrics import Metrics


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def load(path: Path, tokenizer: Any, *, limit: int | None = None, longest: int = 200, **fields: Any) -> list[Prompt]:
    return load_prompts(Prompts(path=str(path), **fields), tokenizer, longest, limit)[0]


def test_a_text_goes_through_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "1+1?", "label": 2, "source": "x"})
    [prompt] = load(file, tokenizer, answer_field="label", system_prompt="Be brief.")
    assert prompt.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(prompt.ids) == prompt.text
    assert (prompt.answer, prompt.metadata) == ("2", {"source": "x"})


def test_chat_messages_are_a_prompt_too(tmp_path: Path, tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    [prompt] = load(write(tmp_path / "p.jsonl", {"prompt": messages}), tokenizer)
    assert prompt.text.count("<|im_start|>") == 4


def test_without_a_template_the_text_is_taken_as_it_is(tmp_path: Path, tokenizer: Any) -> None:
    [prompt] = load(write(tmp_path / "p.jsonl", {"prompt": "Hello"}), tokenizer, apply_chat_template=False)
    assert prompt.text == "Hello" and tokenizer.decode(prompt.ids) == "Hello"


def test_a_folder_is_all_its_files_in_order_and_blank_lines_are_nothing(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "b.jsonl", {"prompt": "three"})
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n')
    texts = [p.text for p in load(tmp_path, tokenizer, apply_chat_template=False)]
    assert texts == ["one", "two", "three"]


def test_over_long_prompts_are_left_out_and_counted(tmp_path: Path, tokenizer: Any, caplog: Any) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "x" * 500}, {"prompt": "short"})
    prompts, long = load_prompts(Prompts(path=str(file)), tokenizer, 50, None)
    assert [p.index for p in prompts] == [1] and long == 1
    assert "1 of 2 prompts left out, longer than rollout.maxPromptTokens 50" in caplog.text


def test_only_the_first_prompts_are_read_where_a_limit_is_set(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken')
    assert len(load(file, tokenizer, limit=2)) == 2


class Calls:
    """A tokenizer that notes how many texts each of its calls has."""

    def __init__(self) -> None:
        self._real, self.sizes = tiny_tokenizer(), list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.sizes.append(len(texts))
        return self._real(texts, **options)


def test_prompts_are_tokenised_in_batches_with_a_line_of_the_log_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prompts, "PROGRESS_SECONDS", 0.0)
    file, tokenizer = write(tmp_path / "p.jsonl", *({"prompt": f"{n}?"} for n in range(1100))), Calls()
    with caplog.at_level("INFO"):
        assert [p.index for p in load(file, tokenizer)] == list(range(1100))
    assert tokenizer.sizes == [512, 512, 76]
    assert "p.jsonl: 1,024 prompts read, the newest at " in caplog.text


def test_prompts_share_what_is_equal_in_all_of_them(tmp_path: Path, tokenizer: Any) -> None:
    """Else a million prompts would hold a hundred million numbers, of 28 bytes each, and a million names of fields."""
    first, second = load(write(tmp_path / "p.jsonl", *[{"prompt": "the answer", "level": 1}] * 2), tokenizer)
    shared = {id(number) for number in first.ids}
    assert max(first.ids) > 256 and shared == {id(number) for number in second.ids}
    assert {id(name) for name in first.metadata} == {id(name) for name in second.metadata}


@pytest.mark.parametrize(
    ("content", "fields", "sentence"),
    [
        (b"", {}, "p.jsonl: has no prompts"),
        (
            b'{"prompt": "a"}\n{"question": "b"}',
            {},
            r"p.jsonl:2: has no field prompt \(prompts.promptField\); it has question",
        ),
        (b'{"prompt": "a"}', {"answer_field": "label"}, r"p.jsonl:1: has no field label \(prompts.answerField\)"),
        (b'{"prompt": 5}', {}, "p.jsonl:1: field prompt is a number; allowed are a string and a list of"),
        (b'{"prompt": [{"role": "user"}]}', {}, "p.jsonl:1: field prompt, message 1: content is null; allowed are"),
        (b'{"prompt": null}', {}, "p.jsonl:1: field prompt is null; allowed are"),
        (b'{"prompt": " "}', {}, "p.jsonl:1: field prompt is empty"),
        (b'{"prompt": "a", "l": [1]}', {"answer_field": "l"}, "field l is a list; allowed are a string and a number"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}', {}, "p.jsonl:2: byte 12 is not UTF-8"),
        (b'{"prompt": "a"\n', {}, "p.jsonl:1: is not JSON"),
        (b'{"prompt": "a"}', {"response_field": "s"}, r"p.jsonl:1: has no field s \(prompts.responseField\)"),
        (b'{"prompt": "a", "s": null}', {"response_field": "s"}, "field s is null; it must be a text"),
        (b'{"prompt": "a", "s": " "}', {"response_field": "s"}, "field s is empty; it must be a text"),
        (b'{"prompt": "a"}\n["a"]', {}, "p.jsonl:2: is a list; each line must be one JSON object"),
        (b'["a"]', {}, "p.jsonl:1: is a string; each element of the list must be a JSON object"),
        (b'{"prompt": "%s"}' % (b"x" * 900), {}, "all 1 prompts are longer than rollout.maxPromptTokens 200; raise it"),
    ],
)
def test_a_fault_names_file_line_field_and_what_is_allowed(
    tmp_path: Path, tokenizer: Any, content: bytes, fields: dict[str, Any], sentence: str
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    with pytest.raises(PromptError, match=sentence):
        load(file, tokenizer, **fields)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(PromptError, match=r"nothing\.jsonl: does not exist"):
        load(tmp_path / "nothing.jsonl", tokenizer)
    with pytest.raises(PromptError, match=r"has no \*\.jsonl and no \*\.parquet file"):
        load(tmp_path, tokenizer)


def test_a_model_without_a_chat_template_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match=r"no chat template; set prompts\.applyChatTemplate: false"):
        load(write(tmp_path / "p.jsonl", {"prompt": "a"}), tokenizer)


def test_a_template_that_refuses_a_conversation_names_its_line(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptError, match=r"p.jsonl:1: the student's chat template refuses .*: roles must alternate"):
        load(write(tmp_path / "p.jsonl", {"prompt": "a"}), tokenizer)


ROWS = [{"prompt": f"{n} + 1?", "answer": n + 1, "level": n % 3} for n in range(5)]


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def facts(prompts: list[Prompt]) -> list[tuple[str, str | None, dict[str, Any]]]:
    return [(p.text, p.answer, p.metadata) for p in prompts]


@pytest.mark.parametrize("form", ["parquet", "parquet without its suffix", "files by a pattern", "folder", "saved"])
def test_every_form_of_a_data_set_has_the_same_prompts(tmp_path: Path, tokenizer: Any, form: str) -> None:
    import datasets

    fields: dict[str, Any] = {"apply_chat_template": False, "answer_field": "answer"}
    expected = facts(load(write(tmp_path / "rows.jsonl", *ROWS), tokenizer, **fields))
    folder = tmp_path / "data"
    folder.mkdir()
    match form:
        case "parquet":
            path = parquet(folder / "rows.parquet", ROWS)
        case "parquet without its suffix":
            path = parquet(folder / "rows", ROWS)
        case "files by a pattern":
            for number, part in enumerate((ROWS[:2], ROWS[2:])):
                parquet(folder / f"train-0000{number}.parquet", part)
            parquet(folder / "test-00000.parquet", ROWS)
            path = folder / "train-*.parquet"
        case "folder":
            parquet(folder / "a.parquet", ROWS[:2])
            write(folder / "b.jsonl", *ROWS[2:])
            path = folder
        case _:
            path = folder
            datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    assert facts(load(path, tokenizer, **fields)) == expected


def test_chat_messages_in_parquet_are_a_prompt_too(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": [{"role": "user", "content": "a"}], "when": datetime.date(2026, 1, 2)}]
    [prompt] = load(parquet(tmp_path / "p.parquet", rows), tokenizer)
    assert "user\na" in prompt.text and prompt.metadata == {"when": datetime.date(2026, 1, 2)}


def test_a_row_of_parquet_that_is_wrong_is_named_with_its_field(tmp_path: Path, tokenizer: Any) -> None:
    file = parquet(tmp_path / "p.parquet", [{"prompt": "a"}, {"prompt": None}])
    with pytest.raises(PromptError, match=r"p\.parquet row 2: field prompt is null; allowed are"):
        load(file, tokenizer)
    with pytest.raises(PromptError, match=r"p\.parquet row 1: has no field q \(prompts.promptField\); it has prompt"):
        load(file, tokenizer, prompt_field="q")
    with pytest.raises(PromptError, match=r"p\.parquet: has no prompts"):
        load(parquet(file, []), tokenizer)


def test_parquet_that_is_cut_short_or_damaged_is_named(tmp_path: Path, tokenizer: Any) -> None:
    file = parquet(tmp_path / "p.parquet", ROWS)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PromptError, match=r"p\.parquet: cannot be read as Parquet after row 0: "):
        load(file, tokenizer)
    file.write_bytes(whole[:4] + bytes(300) + whole[304:])
    with pytest.raises(PromptError, match=r"p\.parquet: cannot be read as Parquet after row 0: "):
        load(file, tokenizer)


def test_a_saved_data_set_with_splits_asks_for_one_and_a_damaged_one_is_named(tmp_path: Path, tokenizer: Any) -> None:
    import datasets

    whole = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)})
    whole.save_to_disk(str(tmp_path))
    with pytest.raises(PromptError, match=r"holds the splits train, test; name one, such as .*/train"):
        load(tmp_path, tokenizer)
    assert len(load(tmp_path / "train", tokenizer)) == 5
    next((tmp_path / "train").glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(PromptError, match=r"train: cannot be read as a data set that was saved to disk"):
        load(tmp_path / "train", tokenizer)


def hub(name: str, split: str = "train") -> Prompts:
    return Prompts.model_validate(
        {"dataset": {"name": name, "split": split}, "answerField": "answer", "applyChatTemplate": False}
    )


def test_a_data_set_of_the_hub_is_read_from_its_cache_without_a_network(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache as a download leaves it; HF_HUB_OFFLINE is set in all tests."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = {"train": [str(parquet(tmp_path / "p.parquet", ROWS))]}
    cache = tmp_path / "cache" / "team___sums" / "default"
    Parquet(
        cache_dir=str(tmp_path / "made"), dataset_name="sums", data_files=files, hash="0" * 40
    ).download_and_prepare()
    [made] = (tmp_path / "made" / "sums").glob("default-*")
    cache.parent.mkdir(parents=True)
    made.rename(cache)
    found, _ = load_prompts(hub("team/sums"), tokenizer, 200, None)
    assert [(p.text, p.answer) for p in found] == [(r["prompt"], str(r["answer"])) for r in ROWS]
    part, _ = load_prompts(hub("team/sums", "train[1:3]"), tokenizer, 200, None)
    assert [p.text for p in part] == [r["prompt"] for r in ROWS[1:3]]
    with pytest.raises(PromptError, match=r"data set team/sums: could not be had .* split test, .*Unknown split"):
        load_prompts(hub("team/sums", "test"), tokenizer, 200, None)


def test_a_data_set_that_the_hub_does_not_give_is_named(tokenizer: Any) -> None:
    with pytest.raises(PromptError, match=r"data set team/nothing: could not be had from the Hugging Face hub"):
        load_prompts(hub("team/nothing"), tokenizer, 200, None)


def sources(tmp_path: Path, **fields: Any) -> Spec:
    write(tmp_path / "a.jsonl", *({"prompt": f"a{n}"} for n in range(4)), {"prompt": "x" * 400})
    write(tmp_path / "b.jsonl", *({"prompt": f"b{n}"} for n in range(3)))
    named = [{"name": n, "prompts": {"path": str(tmp_path / f"{n}.jsonl"), "applyChatTemplate": False}} for n in "ab"]
    return spec_of(Path("/s"), Path("/t"), data={"sources": named, **fields}, rollout={"maxPromptTokens": 50})


def test_prompts_of_several_sources_know_theirs_and_the_overlong_are_counted_by_it(
    tmp_path: Path, tokenizer: Any
) -> None:
    metrics = Metrics()
    found = load_data(sources(tmp_path), tokenizer, metrics)
    assert [p.source + p.text for p in found] == ["aa0", "aa1", "aa2", "aa3", "bb0", "bb1", "bb2"]
    assert len({p.index for p in found}) == 7
    text = metrics.text().decode()
    assert 'distill_prompts_overlong{source="a"} 1.0' in text and 'distill_prompts_overlong{source="b"} 0.0' in text


def test_prompts_that_two_sources_have_are_counted(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spec = sources(tmp_path)
    load_data(spec, tokenizer, Metrics())
    assert "other sources" not in caplog.text
    write(tmp_path / "b.jsonl", {"prompt": "b"}, {"prompt": "a1"}, {"prompt": " a2"})
    load_data(spec, tokenizer, Metrics())
    assert "source b: 2 of 3 prompts are those of other sources too, and are asked as often" in caplog.text


def gym(**fields: Any) -> Prompts:
    return Prompts.model_validate({"reasoningGym": {"task": "chain_sum", "size": 5, **fields}})


def test_reasoning_gym_makes_the_same_prompts_for_the_same_seed(tokenizer: Any) -> None:
    first, _ = load_prompts(gym(seed=3), tokenizer, 500, None)
    assert first == load_prompts(gym(seed=3), tokenizer, 500, None)[0]
    assert first != load_prompts(gym(seed=4), tokenizer, 500, None)[0]
    assert len(first) == 5 and all(p.answer for p in first)


@pytest.mark.parametrize(
    "fields", [{"task": "no_such_task"}, {"options": {"no_such": 1}}, {"options": {"min_terms": 0}}]
)
def test_a_wrong_task_or_option_is_named(tokenizer: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(PromptError, match=r"reasoningGym\.task"):
        load_prompts(gym(**fields), tokenizer, 500, None)


PROMPTS = [Prompt(index=i, ids=[i], text=str(i)) for i in range(7)]


def indices(cursor: Cursor, count: int) -> list[int]:
    return [p.index for p in cursor.next(count)]


def test_each_epoch_has_every_prompt_once_in_another_order() -> None:
    cursor = Cursor(PROMPTS, seed=1, shuffle=True)
    epochs = [indices(cursor, 7) for _ in range(3)]
    assert all(sorted(e) == list(range(7)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert indices(Cursor(PROMPTS, seed=1, shuffle=True), 7) == epochs[0]
    assert indices(Cursor(PROMPTS, seed=2, shuffle=True), 7) != epochs[0]


def test_without_shuffling_the_order_is_that_of_the_file() -> None:
    assert indices(Cursor(PROMPTS, seed=1, shuffle=False), 9) == [0, 1, 2, 3, 4, 5, 6, 0, 1]


def test_a_restored_cursor_goes_on_where_it_was() -> None:
    cursor = Cursor(PROMPTS, seed=1, shuffle=True)
    cursor.next(10)
    state = json.loads(json.dumps(cursor.state()))
    rest = indices(cursor, 12)
    other = Cursor(PROMPTS, seed=1, shuffle=True)
    other.restore(state)
    assert indices(other, 12) == rest


def test_a_state_of_other_data_is_refused() -> None:
    with pytest.raises(PromptError, match="made with 7 prompts and there are 3 now"):
        Cursor(PROMPTS[:3], seed=1, shuffle=True).restore(Cursor(PROMPTS, seed=1, shuffle=True).state())


def test_peeking_moves_nothing() -> None:
    cursor = Cursor(PROMPTS, seed=1, shuffle=True)
    before = cursor.state()
    assert [p.index for p in cursor.peek(2)] == [0, 1]
    assert cursor.state() == before


MIXED = [Prompt(index=i, ids=[i], text=str(i), source=s) for i, s in enumerate("aaaaabbbc")]
WEIGHTS = {"a": 5.0, "b": 3.0, "c": 2.0}


def mixed(seed: int = 1, **weights: float) -> Cursor:
    return Cursor(MIXED, seed=seed, shuffle=True, weights=weights or WEIGHTS)


def test_sources_are_mixed_by_their_weights_in_every_stretch_of_the_run() -> None:
    """Not only on average: a step of 20 prompts never lacks a source."""
    cursor = mixed()
    for _ in range(50):
        counts = Counter(p.source for p in cursor.next(20))
        assert abs(counts["a"] - 10) <= 2 and abs(counts["b"] - 6) <= 2 and abs(counts["c"] - 4) <= 2
    cursor = mixed(a=1, b=1, c=998)
    assert Counter(p.source for p in cursor.next(10_000))["a"] == pytest.approx(10, abs=2)


def test_a_mixture_is_that_of_its_seed_and_each_source_is_walked_in_epochs() -> None:
    first, again, other = mixed(), mixed(), mixed(seed=2)
    sampled = indices(first, 60)
    assert sampled == indices(again, 60) != indices(other, 60)
    of_b = [i for i in sampled if MIXED[i].source == "b"]
    assert all(sorted(of_b[n : n + 3]) == [5, 6, 7] for n in range(0, len(of_b) - 2, 3))


def test_a_restored_mixture_goes_on_where_every_source_was() -> None:
    cursor = mixed()
    cursor.next(17)
    state = json.loads(json.dumps(cursor.state()))
    rest = indices(cursor, 40)
    other = mixed()
    other.next(3)
    other.restore(state)
    assert indices(other, 40) == rest


def test_a_state_of_other_sources_is_refused() -> None:
    state = Cursor(MIXED[:8], seed=1, shuffle=True).state()
    with pytest.raises(PromptError, match="made with the sources a, b and there are a, b, c now"):
        mixed().restore(state)


def test_peeking_sees_every_source() -> None:
    assert [p.index for p in mixed().peek(4)] == [0, 5, 8, 1]


@pytest.mark.parametrize("siblings", [1, 4])
def test_the_data_sets_share_of_the_sequences_is_met_over_the_steps(siblings: int) -> None:
    from_data = sampled = 0
    for step in range(300):
        positions = supervised_positions(0.3, 7, step, 16, siblings)
        assert positions <= set(range(16))
        from_data, sampled = from_data + len(positions), sampled + siblings * (16 - len(positions))
    assert from_data / (from_data + sampled) == pytest.approx(0.3, abs=0.001)
    assert supervised_positions(0.0, 7, 3, 16, siblings) == frozenset()
    assert supervised_positions(1.0, 7, 3, 16, siblings) == frozenset(range(16))


def test_which_prompts_the_data_set_answers_depends_on_seed_and_step_alone() -> None:
    def chosen(seed: int) -> list[frozenset[int]]:
        return [supervised_positions(0.5, seed, step, 16, 1) for step in range(20)]

    assert chosen(7) == chosen(7) != chosen(8)
    assert len(set(chosen(7))) > 15


def test_a_supervised_sample_is_the_data_sets_response_with_its_end(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "1+1?", "solution": "It is 2."})
    [prompt] = load(file, tokenizer, response_field="solution")
    assert prompt.metadata == {}
    sample = supervised_sample(prompt, tokenizer, 100, weight_version=5)
    assert tokenizer.decode(sample.response_ids) == "It is 2.<|im_end|>"
    assert sample.supervised and not sample.truncated and sample.weight_version == 5
    assert sample.engine_logprobs == [0.0] * len(sample.response_ids) and sample.prompt_ids == prompt.ids
    cut = supervised_sample(prompt, tokenizer, 3, weight_version=5)
    assert cut.truncated and cut.response_ids == sample.response_ids[:3]
    with pytest.raises(ValueError, match=r"has no response of its own; set prompts\.responseField"):
        supervised_sample(PROMPTS[0], tokenizer, 3, weight_version=5)
