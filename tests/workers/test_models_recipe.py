"""The models that `make models` makes: what their cards say is so, and a distillation has something to teach."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "dev" / "models"))

import arithmetic
import cached
import calculator
import smollm2

STEPS = 20
PROMPTS, SAMPLES = 64, 4


@pytest.fixture(scope="module")
def sums() -> Path:
    return cached.ensure(arithmetic.NAME, Path(arithmetic.__file__), arithmetic.build)


@pytest.fixture(scope="module")
def products() -> Path:
    return cached.ensure(calculator.NAME, Path(calculator.__file__), calculator.build)


@pytest.fixture(scope="module")
def smol() -> Path:
    return cached.ensure(smollm2.NAME, Path(smollm2.__file__), smollm2.build)


def model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_a_model_that_is_made_is_not_made_again(sums: Path) -> None:
    def build(_: Path) -> cached.Card:
        raise AssertionError("made again")

    assert cached.ensure(arithmetic.NAME, Path(arithmetic.__file__), build) == sums


def test_a_recipe_that_fails_leaves_the_last_models_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path))
    recipe = tmp_path / "recipe.py"

    def build(folder: Path) -> cached.Card:
        (folder / "weights").write_text(recipe.read_text())
        if recipe.read_text() == "bad":
            raise RuntimeError("no")
        return {"accuracy": 1.0}

    recipe.write_text("good")
    made = cached.ensure("m", recipe, build)
    recipe.write_text("bad")
    with pytest.raises(RuntimeError):
        cached.ensure("m", recipe, build)
    assert (made / "weights").read_text() == "good"
    recipe.write_text("better")
    assert (cached.ensure("m", recipe, build) / "weights").read_text() == "better"
    assert cached.read_card(made)["accuracy"] == 1.0


def test_every_user_may_read_the_models(sums: Path) -> None:
    for path in [sums, *sums.rglob("*")]:
        assert path.stat().st_mode & 0o004, path


def test_prompts_are_right_and_the_held_out_ones_are_held_out(sums: Path) -> None:
    train, test = lines(sums / "train.jsonl"), lines(sums / "test.jsonl")
    assert (len(train), len(test)) == (arithmetic.TRAIN_PROMPTS, arithmetic.TEST_PROMPTS)
    assert len({entry["prompt"] for entry in train + test}) == len(train) + len(test)
    for entry in train + test:
        a, b = entry["prompt"].removesuffix("=").split("+")
        assert int(a[::-1]) + int(b[::-1]) == int(entry["answer"][::-1])
    _, _, pairs = arithmetic.problems()
    own = {arithmetic.problem(a, b)["prompt"] for a, b in pairs}
    assert not own & {entry["prompt"] for entry in train + test}


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_tokenizer_reads_characters_and_writes_them_back(sums: Path, role: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sums / role)
    [entry, *_] = lines(sums / "test.jsonl")
    expected = arithmetic.encode([entry])[0].tolist()
    assert tokenizer(entry["prompt"]).input_ids == expected[: arithmetic.PROMPT_TOKENS]
    answer = expected[arithmetic.PROMPT_TOKENS :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == entry["answer"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (arithmetic.EOS, arithmetic.PAD)
    assert len(tokenizer) == len(arithmetic.TOKENS)


def test_the_teacher_adds_and_the_student_has_much_to_learn(sums: Path) -> None:
    test = arithmetic.encode(lines(sums / "test.jsonl"))
    measured = arithmetic.measure(model(sums / "teacher"), model(sums / "student"), test)
    card = cached.read_card(sums)
    assert measured == pytest.approx({key: card[key] for key in measured}, abs=0.01)
    assert measured["teacher_greedy_accuracy"] >= 0.97
    assert 0.15 <= measured["student_sampled_accuracy"] <= 0.35
    assert measured["student_greedy_accuracy"] <= 0.6


def test_twenty_steps_of_on_policy_distillation_teach_the_student(sums: Path) -> None:
    """Half of the example's schedule, in one process: a recipe that made an unteachable student would show here."""
    import torch

    teacher, student = model(sums / "teacher"), model(sums / "student")
    test = arithmetic.encode(lines(sums / "test.jsonl"))
    train = arithmetic.encode(lines(sums / "train.jsonl"))[:, : arithmetic.PROMPT_TOKENS]
    before = arithmetic.measure(teacher, student, test)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, weight_decay=0.0, betas=(0.9, 0.95))
    for step in range(STEPS):
        prompts = train[PROMPTS * step : PROMPTS * (step + 1)].repeat_interleave(SAMPLES, 0)
        ids = torch.cat([prompts, arithmetic.respond(student, prompts, sampled=True, seed=step)], 1)
        loss = arithmetic.reverse_kl(student, teacher, ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    after = arithmetic.measure(teacher, student, test)
    assert after["student_greedy_accuracy"] >= before["student_greedy_accuracy"] + 0.3
    assert after["reverse_kl_nats"] <= before["reverse_kl_nats"] / 2


def test_the_questions_with_a_tool_are_right_and_the_held_out_ones_are_held_out(products: Path) -> None:
    train, test = lines(products / "train.jsonl"), lines(products / "test.jsonl")
    assert (len(train), len(test)) == (calculator.TRAIN_PROMPTS, calculator.TEST_PROMPTS)
    assert len({entry["prompt"] for entry in train + test}) == len(train) + len(test)
    for entry in train + test:
        a, b = entry["prompt"].split("*")
        assert str(int(a) * int(b)) == entry["answer"] and len(entry["answer"]) == 5
    _, _, pairs = calculator.problems()
    assert not {calculator.problem(a, b)["prompt"] for a, b in pairs} & {entry["prompt"] for entry in train + test}


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_tokens_of_a_conversation_with_the_tool_are_those_of_its_chat_template(products: Path, role: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(products / role)
    tools = json.loads((Path(__file__).resolve().parents[2] / "examples" / "calculator" / "tools.json").read_text())
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 47, "b": 389}}}
    messages = [
        {"role": "user", "content": "47*389"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "18283"},
        {"role": "assistant", "content": "18283"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    expected = calculator.with_the_tool(47, 389)
    assert text == "".join(expected.tokens) and len(expected.tokens) == calculator.TOKENS_OF_CONVERSATION
    ids, labels = calculator.encode([expected])
    assert tokenizer(text, add_special_tokens=False).input_ids == ids[0].tolist()
    assert tokenizer.decode(ids[0]) == text
    written = [i for i in labels[0].tolist() if i != calculator.NOT_TRAINED]
    said = tokenizer.decode(written).split("<|im_end|>")
    assert said == ['<tool_call>{"name": "multiply", "arguments": {"a": 47, "b": 389}}</tool_call>', "18283", ""]
    opening = tokenizer.apply_chat_template(messages[:1], tools=tools, tokenize=False, add_generation_prompt=True)
    assert opening == "".join(calculator.opening("47*389"))
    assert (tokenizer.eos_token, len(tokenizer)) == ("<|im_end|>", len(calculator.TOKENS))


def test_the_teacher_multiplies_with_the_tool_and_the_student_seldom_calls_it(products: Path) -> None:
    found = calculator.measure(model(products / "teacher"), model(products / "student"), lines(products / "test.jsonl"))
    card = cached.read_card(products)
    assert found == pytest.approx({key: card[key] for key in found}, abs=0.02)
    assert found["teacher_greedy_accuracy"] >= 0.97 and found["teacher_sampled_accuracy"] >= 0.9
    assert found["student_greedy_calls"] <= 0.02 and found["student_greedy_accuracy"] <= 0.05
    assert 0.1 <= found["student_sampled_calls"] <= 0.3
    assert 0.01 <= found["student_sampled_accuracy"] <= 0.2


def test_on_policy_distillation_teaches_the_student_to_call_the_tool(products: Path) -> None:
    """The example's schedule, in one process: a recipe that made an unteachable student would show here."""
    import torch

    teacher, student = model(products / "teacher"), model(products / "student")
    train, test = lines(products / "train.jsonl"), lines(products / "test.jsonl")[:256]
    before, _ = calculator.measured(student, test, sampled=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.95))
    for step in range(24):
        questions = [line["prompt"] for line in train[16 * step : 16 * (step + 1)] for _ in range(4)]
        loss = calculator.reverse_kl(student, teacher, calculator.play(student, questions, sampled=True, seed=step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    after, called = calculator.measured(student, test, sampled=True)
    assert after >= before + 0.3 and called >= 0.9


def test_smollm2_speaks_and_its_student_has_lost_four_layers(smol: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    teacher, student = model(smol / "teacher"), model(smol / "student")
    dropped = smollm2.DROPPED_LAYERS
    assert student.config.num_hidden_layers == teacher.config.num_hidden_layers - len(dropped) == 26
    kept = [i for i in range(teacher.config.num_hidden_layers) if i not in dropped]
    for mine, theirs in enumerate(kept):
        a, b = student.model.layers[mine].mlp.up_proj.weight, teacher.model.layers[theirs].mlp.up_proj.weight
        assert torch.equal(a, b)
    tokenizer = AutoTokenizer.from_pretrained(smol / "student")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    answer = teacher.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert cached.read_card(smol)["reverse_kl_nats"] > 0.5
