"""What TRL's DistillationTrainer does with the silent failures of docs/reliability.md that can be put into it.

`bench/.venv/bin/python bench/silent_killers.py` (see dev/bench.sh). Each case is a fault in a pair of tiny random
models, and three optimiser steps. It is named if an exception or a warning that the healthy pair does not give comes
before the first step; else the loss of the steps is printed.
"""

import contextlib
import json
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""})

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.trainer import distillation_trainer

ENDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STEPS = 3
SAVED = 2


def make_tokenizer(special: list[str] = ENDS, eos: str = "<|im_end|>", template: str = TEMPLATE) -> Any:
    """Byte-level BPE of 384 tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(
        ["Hello world, what is 12 plus 30? The answer is 42. assistant user system"] * 20, trainer
    )
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, pad_token="<|endoftext|>")
    made.chat_template = template
    return made


def save(
    folder: Path,
    seed: int,
    *,
    hidden: int = 64,
    rows: int = 512,
    positions: int = 2048,
    tokenizer: Any = None,
    change: Callable[[Any], None] | None = None,
) -> str:
    """A random Qwen3, of two layers."""
    tokenizer = tokenizer or make_tokenizer()
    config = Qwen3Config(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=positions,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.15,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@dataclass
class Case:
    """One failure: what differs from a healthy pair."""

    name: str
    student: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    teacher_seed: int = 1
    evaluated: bool = False
    """The training prompts are the evaluation's, too."""
    divergence: Callable[..., Any] | None = None
    """Instead of the trainer's own."""
    lost: tuple[str, ...] = ()
    """Files of the checkpoint of the second step that are gone when the run goes on from it."""
    reordered: bool = False
    """The run goes on from the checkpoint of its second step over rows in another order."""

    @property
    def resumes(self) -> bool:
        return bool(self.lost) or self.reordered


def unusable(model: Any) -> None:
    model.lm_head.weight.fill_(math.nan)


def constant(model: Any) -> None:
    model.lm_head.weight.zero_()


OWN = distillation_trainer._chunked_divergence_loss


def flipped(
    student: Any, teacher: Any, student_head: Any, teacher_head: Any, mask: Any, beta: float, **rest: Any
) -> Any:
    return OWN(student, teacher, student_head, teacher_head, mask, 1.0 - beta, **rest)


def detached(student: Any, teacher: Any, student_head: Any, *others: Any, **rest: Any) -> Any:
    loss, *more = OWN(student, teacher, student_head, *others, **rest)
    return (loss.detach() + 0.0 * student.sum(), *more)


def shifted(student: Any, teacher: Any, *others: Any, **rest: Any) -> Any:
    return OWN(student, teacher.roll(1, dims=-2), *others, **rest)


THINKS = TEMPLATE.replace("{% endif %}", "{% if enable_thinking is defined %}{% endif %}{% endif %}", 1).replace(
    "assistant\n", "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)
CASES = [
    Case("healthy"),
    Case("other end", teacher={"tokenizer": make_tokenizer(eos="<|endoftext|>")}),
    Case("other template", teacher={"tokenizer": make_tokenizer(template="{{ 'Be kind. ' }}" + TEMPLATE)}),
    Case("thinking modes", teacher={"tokenizer": make_tokenizer(template=THINKS)}),
    Case(
        "special token in pieces", teacher={"tokenizer": make_tokenizer(special=["<|endoftext|>"], eos="<|endoftext|>")}
    ),
    Case("other tokens", teacher={"tokenizer": make_tokenizer(special=[ENDS[2], ENDS[0], ENDS[1]])}),
    Case("embedding of another size", teacher={"rows": 640}),
    Case("teacher is the student", teacher_seed=0),
    Case("swapped", student={"hidden": 128}),
    Case("constant teacher", teacher={"change": constant}),
    Case("not finite", teacher={"change": unusable}),
    Case("positions", student={"positions": 16}, teacher={"positions": 16}),
    Case("token without a row", student={"rows": 300}, teacher={"rows": 300}),
    Case("evaluation in training", evaluated=True),
    Case("direction flipped", divergence=flipped),
    Case("divergence detached", divergence=detached),
    Case("shifted by one token", divergence=shifted),
    Case("prompts begin anew", reordered=True),
    Case("optimiser begins anew", lost=("optimizer.pt", "scheduler.pt")),
]


class Told(logging.Handler):
    """Keeps warnings, until the first optimiser step is done."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.sentences: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.sentences.append(record.getMessage())


class FirstStep(TrainerCallback):
    def __init__(self, told: Told) -> None:
        self._told, self.said = told, list[str]()
        self.begins = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.begins:
            self.said = list(self._told.sentences)


def run(case: Case, folder: Path) -> dict[str, Any]:
    student = save(folder / "student", 0, **case.student)
    teacher = save(folder / "teacher", case.teacher_seed, **case.teacher)
    distillation_trainer._chunked_divergence_loss = case.divergence or OWN
    told = Told()
    first = FirstStep(told)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"What is {n} plus 30?"}]} for n in range(8)])
    root = logging.getLogger()
    root.addHandler(told)
    transformers.utils.logging.enable_propagation()
    answer: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            config = DistillationConfig(
                output_dir=str(folder / "out"),
                max_steps=STEPS,
                per_device_train_batch_size=2,
                max_completion_length=8,
                logging_steps=1,
                learning_rate=1e-3,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="steps" if case.resumes else "no",
                save_steps=SAVED,
                eval_strategy="steps" if case.evaluated else "no",
                eval_steps=1,
                bf16=False,
                gradient_checkpointing=False,
            )

            def trainer_over(rows: Dataset) -> Any:
                return DistillationTrainer(
                    model=student,
                    teacher_model=teacher,
                    args=config,
                    train_dataset=rows,
                    eval_dataset=rows if case.evaluated else None,
                    callbacks=[first],
                )

            trainer = trainer_over(rows)
            with contextlib.redirect_stdout(sys.stderr):
                trainer.train()
                if case.resumes:
                    checkpoint = folder / "out" / f"checkpoint-{SAVED}"
                    for name in case.lost:
                        (checkpoint / name).unlink()
                    told.sentences.clear()
                    first.begins = SAVED
                    trainer = trainer_over(rows.select(range(len(rows))[::-1]) if case.reordered else rows)
                    trainer.train(resume_from_checkpoint=str(checkpoint))
            answer["losses"] = [round(line["loss"], 4) for line in trainer.state.log_history if "loss" in line]
        except Exception as error:
            answer["raised"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        finally:
            root.removeHandler(told)
    answer["said"] = sorted({*first.said, *(str(w.message) for w in caught)})
    return answer


def main() -> None:
    print(f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
    usual: set[str] = set()
    wanted = sys.argv[1:]
    for case in CASES:
        if wanted and case.name not in wanted and case.name != "healthy":
            continue
        with tempfile.TemporaryDirectory() as scratch:
            answer = run(case, Path(scratch))
        said = [sentence.replace(scratch, "") for sentence in answer.pop("said")]
        if case.name == "healthy":
            usual = set(said)
        print(json.dumps({"case": case.name, **answer, "said": sorted(set(said) - usual)}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
