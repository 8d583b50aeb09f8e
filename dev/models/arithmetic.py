"""Makes models/arithmetic/: a tiny teacher that adds three-digit numbers, and a tinier student that does not yet.

    python dev/models/arithmetic.py

Every number is written from its last digit to its first: the prompt of 123 + 456 is "321+654=", its answer "975", then
<eos>. So a carry is known when it is needed, and digits that belong together always stand equally far apart: both
models learn their task in a minute. The teacher has learnt to add. The student has learnt from a careless pupil, who
carries the one only every fourth time: it knows how to write and what to add, so its samples are sometimes right, and
it has all the rest to learn from the teacher. Both are Qwen3 in float32, trained from nothing, with a seed.
train.jsonl and test.jsonl hold disjoint prompts that neither model has seen.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cached import Card, Live, ensure, read_card, say

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3ForCausalLM

NAME = "arithmetic"
TOKENS = ("<pad>", "<eos>", "<unk>", *"0123456789+-=")
PAD, EOS = 0, 1
Problem = dict[str, str]
PROMPT_TOKENS = 8
RESPONSE_TOKENS = 5
TRAIN_PROMPTS = 8192
TEST_PROMPTS = 512
MODEL_PROMPTS = 150_000
"""What the two models themselves are trained on."""
CARRIED = 0.25
"""How often the student has seen the one carried."""
BATCH = 256
LEARNING_RATE = 2e-3
WARMUP_STEPS = 30
CHECK_EVERY_STEPS = 20
CHECK_PROMPTS = 1024
MAX_STEPS = 2000
SEED = 0


@dataclass(frozen=True)
class Recipe:
    """Size of a model, and how long it is trained: until it is good enough, then while the learning rate falls to 0.

    Neither can be trained too long: the one stays right, the other stays as careless as what it learns from.
    """

    layers: int
    hidden_size: int
    enough: float
    """Share of right samples, on prompts kept for that."""
    cooldown_steps: int


TEACHER = Recipe(3, 128, enough=0.9, cooldown_steps=100)
STUDENT = Recipe(2, 64, enough=0.18, cooldown_steps=60)


def careless_sum(a: int, b: int, chance: random.Random) -> str:
    """The sum from the last digit to the first, where each one is carried with probability CARRIED, else forgotten."""
    digits, carry = "", 0
    while a or b:
        here = a % 10 + b % 10 + carry
        digits += str(here % 10)
        carry = int(here >= 10 and chance.random() < CARRIED)
        a, b = a // 10, b // 10
    return digits + "1" * carry


def problem(a: int, b: int) -> Problem:
    return {"prompt": f"{str(a)[::-1]}+{str(b)[::-1]}=", "answer": str(a + b)[::-1]}


def problems() -> tuple[list[Problem], list[Problem], list[tuple[int, int]]]:
    """Prompts of test.jsonl, of train.jsonl, and the pairs that the models themselves are trained on."""
    pairs = [(a, b) for a in range(100, 1000) for b in range(100, 1000)]
    random.Random(SEED).shuffle(pairs)
    kept = [problem(a, b) for a, b in pairs[: TEST_PROMPTS + TRAIN_PROMPTS]]
    return kept[:TEST_PROMPTS], kept[TEST_PROMPTS:], pairs[len(kept) : len(kept) + MODEL_PROMPTS]


def encode(lines: list[Problem]) -> "torch.Tensor":
    """Prompt, answer, <eos>, then padding: [problems, PROMPT_TOKENS + RESPONSE_TOKENS]."""
    import torch

    ids = {token: i for i, token in enumerate(TOKENS)}
    rows = []
    for entry in lines:
        row = [ids[c] for c in entry["prompt"] + entry["answer"]] + [EOS]
        rows.append(row + [PAD] * (PROMPT_TOKENS + RESPONSE_TOKENS - len(row)))
    return torch.tensor(rows)


def respond(model: "Qwen3ForCausalLM", prompts: "torch.Tensor", sampled: bool, seed: int = SEED) -> "torch.Tensor":
    """Responses, padded after <eos>: [prompts, RESPONSE_TOKENS]. Samples are drawn at temperature 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = prompts
    ended = torch.zeros(len(prompts), 1, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(RESPONSE_TOKENS):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            if sampled:
                token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            else:
                token = logits.argmax(-1, keepdim=True)
            token = token.masked_fill(ended, PAD)
            ended |= token == EOS
            ids = torch.cat([ids, token], 1)
    return ids[:, PROMPT_TOKENS:]


def accuracy(model: "Qwen3ForCausalLM", problems: "torch.Tensor", sampled: bool) -> float:
    """Share of whole responses that are right, <eos> included."""
    right = respond(model, problems[:, :PROMPT_TOKENS], sampled) == problems[:, PROMPT_TOKENS:]
    return float(right.all(1).float().mean())


def new_model(recipe: Recipe) -> "Qwen3ForCausalLM":
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(TOKENS),
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def trained(recipe: Recipe, pool: "torch.Tensor", kept: "torch.Tensor", live: Live) -> tuple["Qwen3ForCausalLM", int]:
    """A model trained on the answers in `pool`, and the steps that it took; `kept` tells when it is good enough."""
    import torch
    from torch.nn import functional

    torch.manual_seed(SEED)
    model = new_model(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    last, right = MAX_STEPS, 0.0
    for step in range(1, MAX_STEPS + 1):
        scale = min(1.0, step / WARMUP_STEPS, (last - step + 1) / recipe.cooldown_steps)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * scale
        ids = pool[torch.randint(0, len(pool), (BATCH,))]
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, PROMPT_TOKENS - 1 :]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT_TOKENS:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        wanted = "" if last < MAX_STEPS else f", {right:.0%} of samples right ({recipe.enough:.0%} is enough)"
        live.detail = f"step {step} of {'at most ' if wanted else ''}{last}, loss {loss.item():.3f}{wanted}"
        if step == last < MAX_STEPS:
            return model.eval(), step
        if last == MAX_STEPS and step % CHECK_EVERY_STEPS == 0:
            right = accuracy(model, kept, True)
            if right >= recipe.enough:
                last = step + recipe.cooldown_steps
    raise RuntimeError(f"accuracy {recipe.enough} was not reached in {MAX_STEPS} steps: {recipe}")


def save(model: "Qwen3ForCausalLM", folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def reverse_kl(student: "Qwen3ForCausalLM", teacher: "Qwen3ForCausalLM", ids: "torch.Tensor") -> "torch.Tensor":
    """KL(student || teacher) over the vocabulary, mean of the response tokens of ids [samples, tokens]; nats."""
    response = ids[:, PROMPT_TOKENS:] != PAD
    log_p = student(input_ids=ids[:, :-1], use_cache=False).logits[:, PROMPT_TOKENS - 1 :].log_softmax(-1)
    log_q = teacher(input_ids=ids[:, :-1], use_cache=False).logits[:, PROMPT_TOKENS - 1 :].log_softmax(-1).detach()
    return (log_p.exp() * (log_p - log_q)).sum(-1)[response].mean()


def measure(teacher: "Qwen3ForCausalLM", student: "Qwen3ForCausalLM", test: "torch.Tensor") -> Card:
    import torch

    prompts = test[:, :PROMPT_TOKENS]
    with torch.no_grad():
        gap = reverse_kl(student, teacher, torch.cat([prompts, respond(student, prompts, sampled=True)], 1))
    return {
        "teacher_greedy_accuracy": round(accuracy(teacher, test, sampled=False), 4),
        "teacher_sampled_accuracy": round(accuracy(teacher, test, sampled=True), 4),
        "student_greedy_accuracy": round(accuracy(student, test, sampled=False), 4),
        "student_sampled_accuracy": round(accuracy(student, test, sampled=True), 4),
        "reverse_kl_nats": round(float(gap), 4),
    }


def build(folder: Path) -> Card:
    say(f"models/{NAME}: train a teacher that adds, and a student that does not yet: usually 1 to 2 minutes, once")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the same sums in the same order on every machine, and tiny matrices gain nothing
    test, train, pairs = problems()
    for name, lines in (("train", train), ("test", test)):
        text = "".join(json.dumps(entry) + "\n" for entry in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    chance = random.Random(SEED)
    right = [problem(a, b) for a, b in pairs]
    careless = [{**problem(a, b), "answer": careless_sum(a, b, chance)} for a, b in pairs]
    kept = encode([problem(a, b) for a, b in pairs[:CHECK_PROMPTS]])
    with Live(f"models/{NAME}: train the teacher") as live:
        teacher, teacher_steps = trained(TEACHER, encode(right[CHECK_PROMPTS:]), kept, live)
    with Live(f"models/{NAME}: train the student") as live:
        student, student_steps = trained(STUDENT, encode(careless[CHECK_PROMPTS:]), kept, live)
    save(teacher, folder / "teacher")
    save(student, folder / "student")
    return {
        **measure(teacher, student, encode(test)),
        "teacher_parameters": sum(p.numel() for p in teacher.parameters()),
        "student_parameters": sum(p.numel() for p in student.parameters()),
        "teacher_steps": teacher_steps,
        "student_steps": student_steps,
    }


def summary(card: Card) -> str:
    """What the two models can do, as one sentence."""
    teacher, student = (card[f"{role}_greedy_accuracy"] for role in ("teacher", "student"))
    kl = card["reverse_kl_nats"]
    return f"models/{NAME}: the teacher has {teacher:.0%} of the test right, the student {student:.0%}; KL {kl} nats"


if __name__ == "__main__":
    say(summary(read_card(ensure(NAME, Path(__file__), build))))
