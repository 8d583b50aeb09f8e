"""Tokenizers of several families, made of a few tokens each."""

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "Hello world, what is 12 plus 30? The answer is 42.",
    "the cats sat on the mats; unbelievable believers believe",
    "na\u00efve caf\u00e9 \u4f60\u597d\u4e16\u754c \U0001f600",
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}{{ raise_exception('no system prompt') }}"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
"""As Llama 2 writes it: a space before the answer, which is not in the generation prompt."""


def byte_level(
    size: int = 320, *, text: str | None = None, special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")
) -> Any:
    """Byte-level BPE, as of Qwen and Llama 3, trained on the corpus or on a text of its own."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text] * 20 if text is not None else CORPUS * 20, trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=special[-1], additional_special_tokens=list(special[:-1])
    )
    found.chat_template = CHATML if "<|im_start|>" in special else None
    return found


def sentence_piece(size: int = 320, *, first: bool = False) -> Any:
    """BPE with byte fallback and a space before each text, as of Llama 2; `first`: as transformers writes it since."""
    bytes_of_all = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=size - 256, show_progress=False)
    trained.train_from_iterator(CORPUS[:2] * 20, trainer)
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *bytes_of_all, *pieces])}
    inner = json.loads(trained.to_str())["model"]["merges"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in inner]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if first:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    found.chat_template = INST
    return found


def normalizing(how: Any) -> Any:
    """A byte-level tokenizer that changes a text before it splits it."""
    made = byte_level()
    made.backend_tokenizer.normalizer = how
    return made
