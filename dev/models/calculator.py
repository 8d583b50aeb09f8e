"""Makes models/calculator/: a tiny teacher that multiplies with a tool, and a tinier student that answers at once.

    python dev/models/calculator.py

The question is a product, "47*389", which neither model can work out. The teacher calls the tool `multiply`, and copies
what it answers. The student has learnt from a pupil who mostly writes the answer down, and calls the tool in a fifth
of its conversations, where each digit that it copies is now and then another: so its samples show it how to call, and
it has the rest to learn from the teacher. A word of the chat template or of a tool call is one token, and what is
copied always stands equally far from its copy: both models learn that in a minute. Both are Qwen3 in float32, trained
from nothing, with a seed. train.jsonl and test.jsonl hold disjoint prompts that neither model has seen.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cached import Card, Live, ensure, read_card, say

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

NAME = "calculator"
Problem = dict[str, str]
SPECIAL = ("<pad>", "<|im_end|>", "<unk>", "<|im_start|>")
PAD, END, UNKNOWN, START = SPECIAL
HEADS = ("tools\n", "system\n", "user\n", "assistant\n", "tool\n")
TOOL = "multiply"
CALL = ("<tool_call>", f'{{"name": "{TOOL}", "arguments": {{"a": ', ', "b": ', "}}", "</tool_call>")
TOKENS = (*SPECIAL, *HEADS, TOOL, *CALL, *"0123456789*")
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool.function.name }}{% endfor %}<|im_end|>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template: of a tool the name alone, which is all that these models know of one."""
A, B = range(40, 100), range(300, 1000)
"""Products of these have five digits."""
PROMPT_TOKENS, TOKENS_OF_CONVERSATION = 15, 42
TRAIN_PROMPTS = 4096
TEST_PROMPTS = 512
CHECK_PROMPTS = 512
MODEL_PROMPTS = 20_000
"""What the two models themselves are trained on."""
CALLS_OF_TEACHER, CALLS_OF_STUDENT = 0.98, 0.2
"""Share of the conversations in which a model has seen the tool called. The teacher's is not 1: to a teacher that has
never seen an answer without the tool, the student's would be nonsense."""
MISCOPIED = 0.08
"""How often the student has seen a digit copied wrongly."""
BATCH = 128
LEARNING_RATE = 3e-3
WARMUP_STEPS = 20
CHECK_EVERY_STEPS = 20
MAX_STEPS = 1500
SEED = 0
NOT_TRAINED = -100


@dataclass(frozen=True)
class Recipe:
    """Size of a model, and how long it is trained: until it is good enough, then while the learning rate falls to 0."""

    layers: int
    hidden_size: int
    calls: float
    """Share of the conversations with the tool."""
    miscopied: float
    """Share of the copied digits that are others."""
    enough: float
    """Probability of a right conversation once the tool is called, on prompts kept for that."""
    cooldown_steps: int


TEACHER = Recipe(2, 96, CALLS_OF_TEACHER, 0.0, enough=0.9, cooldown_steps=60)
STUDENT = Recipe(2, 64, CALLS_OF_STUDENT, MISCOPIED, enough=0.25, cooldown_steps=40)


@dataclass(frozen=True)
class Conversation:
    """One conversation, as tokens."""

    tokens: list[str]
    said: list[bool]
    """Which of the tokens are the assistant's."""


def problem(a: int, b: int) -> Problem:
    return {"prompt": f"{a}*{b}", "answer": str(a * b)}


def problems() -> tuple[list[Problem], list[Problem], list[tuple[int, int]]]:
    """Prompts of test.jsonl, of train.jsonl, and the pairs that the models themselves are trained on."""
    pairs = [(a, b) for a in A for b in B]
    random.Random(SEED).shuffle(pairs)
    kept = [problem(a, b) for a, b in pairs[: TEST_PROMPTS + TRAIN_PROMPTS]]
    return kept[:TEST_PROMPTS], kept[TEST_PROMPTS:], pairs[len(kept) : len(kept) + MODEL_PROMPTS]


def opening(question: str) -> list[str]:
    """The first tokens of a conversation, as the chat template writes them with the tool."""
    return [START, HEADS[0], TOOL, END, START, HEADS[2], *question, END, START, HEADS[3]]


def with_the_tool(a: int, b: int, copied: Callable[[str], str] = str) -> Conversation:
    """A conversation that calls the tool and answers with its result; `copied` is how a number is copied."""
    called = [copied(str(a)), copied(str(b))]
    result = str(int(called[0]) * int(called[1]))
    turn = [*CALL[:2], *called[0], CALL[2], *called[1], *CALL[3:], END]
    read = [START, HEADS[4], *result, END, START, HEADS[3]]
    answer = [*copied(result), END]
    before = opening(f"{a}*{b}")
    said = [*[False] * len(before), *[True] * len(turn), *[False] * len(read), *[True] * len(answer)]
    return Conversation([*before, *turn, *read, *answer], said)


def at_once(a: int, b: int) -> Conversation:
    """A conversation that answers without the tool."""
    before, answer = opening(f"{a}*{b}"), [*str(a * b), END]
    return Conversation([*before, *answer], [*[False] * len(before), *[True] * len(answer)])


def conversations(pairs: list[tuple[int, int]], recipe: Recipe) -> list[Conversation]:
    """What a model is trained on."""
    chance = random.Random(SEED)

    def copied(number: str) -> str:
        # A first digit stays one that keeps the result as long as it is.
        first, *others = number
        digits = [chance.choice("456789") if chance.random() < recipe.miscopied else first]
        digits += [chance.choice("0123456789") if chance.random() < recipe.miscopied else d for d in others]
        return "".join(digits)

    return [with_the_tool(a, b, copied) if chance.random() < recipe.calls else at_once(a, b) for a, b in pairs]


def encode(found: list[Conversation]) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Ids, padded or cut off, and the ids to be predicted, others NOT_TRAINED: [conversations, tokens] each."""
    import torch

    ids = {token: i for i, token in enumerate(TOKENS)}
    rows, labels = [], []
    for conversation in found:
        row = [ids[token] for token in conversation.tokens[:TOKENS_OF_CONVERSATION]]
        missing = TOKENS_OF_CONVERSATION - len(row)
        rows.append(row + [ids[PAD]] * missing)
        said = zip(row, conversation.said, strict=False)
        labels.append([i if is_said else NOT_TRAINED for i, is_said in said] + [NOT_TRAINED] * missing)
    return torch.tensor(rows), torch.tensor(labels)


def new_model(recipe: Recipe) -> "Qwen3ForCausalLM":
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(TOKENS),
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=TOKENS.index(END),
        pad_token_id=TOKENS.index(PAD),
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def logits_of(model: "Qwen3ForCausalLM", ids: "torch.Tensor") -> "torch.Tensor":
    """Of everything after the prompt: [conversations, tokens, vocabulary]."""
    logits: torch.Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits[:, PROMPT_TOKENS - 1 :]
    return logits


def right_once_called(model: "Qwen3ForCausalLM", right: tuple["torch.Tensor", "torch.Tensor"]) -> float:
    """Probability that a conversation which calls the tool goes on as `right` does, mean of these."""
    import torch

    ids, labels = right
    wanted = labels[:, PROMPT_TOKENS:]
    with torch.no_grad():
        logprobs = logits_of(model, ids).log_softmax(-1)
    of_wanted = logprobs.gather(-1, wanted.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    of_wanted = of_wanted.masked_fill(wanted == NOT_TRAINED, 0.0)[:, 1:]  # without the call's own first token
    return float(of_wanted.sum(1).exp().mean())


def trained(
    recipe: Recipe, pairs: list[tuple[int, int]], right: tuple["torch.Tensor", "torch.Tensor"], live: Live
) -> tuple["Qwen3ForCausalLM", int]:
    """A model trained on conversations about `pairs`, and the steps that it took; `right` tell when it is good."""
    import torch
    from torch.nn import functional

    torch.manual_seed(SEED)
    model = new_model(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    pool, targets = encode(conversations(pairs, recipe))
    last, found = MAX_STEPS, 0.0
    for step in range(1, MAX_STEPS + 1):
        scale = min(1.0, step / WARMUP_STEPS, (last - step + 1) / recipe.cooldown_steps)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * scale
        rows = torch.randint(0, len(pool), (BATCH,))
        wanted = targets[rows, PROMPT_TOKENS:].flatten()
        loss = functional.cross_entropy(logits_of(model, pool[rows]).flatten(0, 1), wanted, ignore_index=NOT_TRAINED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        wanted_text = "" if last < MAX_STEPS else f", {found:.0%} right once it calls ({recipe.enough:.0%} is enough)"
        live.detail = f"step {step} of {'at most ' if wanted_text else ''}{last}, loss {loss.item():.3f}{wanted_text}"
        if step == last < MAX_STEPS:
            return model.eval(), step
        if last == MAX_STEPS and step % CHECK_EVERY_STEPS == 0:
            found = right_once_called(model, right)
            if found >= recipe.enough:
                last = step + recipe.cooldown_steps
    raise RuntimeError(f"{recipe.enough} right was not reached in {MAX_STEPS} steps: {recipe}")


def tokenizer_of(positions: int) -> "PreTrainedTokenizerFast":
    import re

    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token=UNKNOWN))
    longest_first = sorted(TOKENS[len(SPECIAL) :], key=len, reverse=True)
    words.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), behavior="isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[START],
        chat_template=TEMPLATE,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


def save(model: "Qwen3ForCausalLM", folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer_of(model.config.max_position_embeddings).save_pretrained(folder)


def play(model: "Qwen3ForCausalLM", questions: list[str], *, sampled: bool, seed: int = SEED) -> list[Conversation]:
    """Conversations of a model with the calculator, at temperature 1 or greedily; a call that is none ends one."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids_of = {token: i for i, token in enumerate(TOKENS)}
    found = [Conversation(opening(q), [False] * PROMPT_TOKENS) for q in questions]
    going_on = list(found)
    while going_on:
        length = min(len(c.tokens) for c in going_on)  # conversations of one length share a batch
        batch = [c for c in going_on if len(c.tokens) == length]
        ids = torch.tensor([[ids_of[t] for t in c.tokens] for c in batch])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        next_ids = drawn if sampled else logits.argmax(-1)
        for conversation, token in zip(batch, next_ids.tolist(), strict=True):
            conversation.tokens.append(TOKENS[token])
            conversation.said.append(True)
            if TOKENS[token] == END and (result := result_of(conversation)):
                read = [START, HEADS[4], *result, END, START, HEADS[3]]
                conversation.tokens.extend(read)
                conversation.said.extend([False] * len(read))
        going_on = [c for c in going_on if len(c.tokens) < TOKENS_OF_CONVERSATION and c.tokens[-1] != END]
    return found


def result_of(conversation: Conversation) -> str:
    """The tool's answer to the turn that ends a conversation; empty where that is no call that can be read."""
    begin = len(conversation.tokens) - conversation.tokens[::-1].index(HEADS[3])
    text = "".join(conversation.tokens[begin:-1])
    try:
        call: Any = json.loads(text.removeprefix(CALL[0]).removesuffix(CALL[4]))
        return str(call["arguments"]["a"] * call["arguments"]["b"])
    except (ValueError, TypeError, KeyError):
        return ""


def answer_of(conversation: Conversation) -> str:
    """What the assistant says last; empty for a turn that did not end."""
    *_, last = "".join(conversation.tokens).split(HEADS[3])
    return last.removesuffix(END) if last.endswith(END) else ""


def measured(model: "Qwen3ForCausalLM", lines: list[Problem], *, sampled: bool) -> tuple[float, float]:
    """Share of the conversations whose answer is right, and of those that call the tool."""
    found = play(model, [line["prompt"] for line in lines], sampled=sampled)
    right = [answer_of(c) == line["answer"] for c, line in zip(found, lines, strict=True)]
    called = [CALL[0] in c.tokens for c in found]
    return sum(right) / len(lines), sum(called) / len(lines)


def reverse_kl(student: "Qwen3ForCausalLM", teacher: "Qwen3ForCausalLM", found: list[Conversation]) -> "torch.Tensor":
    """KL(student || teacher) over the vocabulary, mean of the student's tokens; nats."""
    ids, labels = encode(found)
    said = labels[:, PROMPT_TOKENS:] != NOT_TRAINED
    log_p = logits_of(student, ids).log_softmax(-1)
    log_q = logits_of(teacher, ids).log_softmax(-1).detach()
    return (log_p.exp() * (log_p - log_q)).sum(-1)[said].mean()


def measure(teacher: "Qwen3ForCausalLM", student: "Qwen3ForCausalLM", lines: list[Problem]) -> Card:
    import torch

    card: Card = {}
    for role, model in (("teacher", teacher), ("student", student)):
        for how, sampled in (("greedy", False), ("sampled", True)):
            right, called = measured(model, lines, sampled=sampled)
            card[f"{role}_{how}_accuracy"], card[f"{role}_{how}_calls"] = round(right, 4), round(called, 4)
    with torch.no_grad():
        played = play(student, [line["prompt"] for line in lines], sampled=True)
        card["reverse_kl_nats"] = round(float(reverse_kl(student, teacher, played)), 4)
    return card


def build(folder: Path) -> Card:
    say(f"models/{NAME}: train a teacher that uses a tool, and a student that does not yet: usually a minute, once")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the same sums in the same order on every machine, and tiny matrices gain nothing
    test, train, pairs = problems()
    for name, lines in (("train", train), ("test", test)):
        text = "".join(json.dumps(entry) + "\n" for entry in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    right = encode([with_the_tool(a, b) for a, b in pairs[:CHECK_PROMPTS]])
    with Live(f"models/{NAME}: train the teacher") as live:
        teacher, teacher_steps = trained(TEACHER, pairs[CHECK_PROMPTS:], right, live)
    with Live(f"models/{NAME}: train the student") as live:
        student, student_steps = trained(STUDENT, pairs[CHECK_PROMPTS:], right, live)
    save(teacher, folder / "teacher")
    save(student, folder / "student")
    return {
        **measure(teacher, student, test),
        "teacher_parameters": sum(p.numel() for p in teacher.parameters()),
        "student_parameters": sum(p.numel() for p in student.parameters()),
        "teacher_steps": teacher_steps,
        "student_steps": student_steps,
    }


def summary(card: Card) -> str:
    """What the two models can do, as one sentence."""
    teacher, student = (f"{card[f'{role}_sampled_accuracy']:.0%}" for role in ("teacher", "student"))
    calls = f"{card['student_sampled_calls']:.0%}"
    return (
        f"models/{NAME}: the teacher has {teacher} of its test conversations right, the student {student}, who calls "
        f"the tool in {calls}; KL {card['reverse_kl_nats']} nats"
    )


if __name__ == "__main__":
    say(summary(read_card(ensure(NAME, Path(__file__), build))))
