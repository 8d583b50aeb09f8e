"""The bytes that each token of a tokenizer stands for, and the tokens of a text that goes on from another.

A tokenizer's own decoder works on whole texts: it strips the space that SentencePiece puts before a text, and writes
U+FFFD for a part of a character. Tokens are aligned by their bytes, which the vocabulary alone tells.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte as SentencePiece's byte fallback names it."""
SPACE = "\u2581"
"""What SentencePiece writes for a space."""
OF_SPACES = frozenset({"WordPiece", "BPEDecoder", "CTC"})
"""Decoders that add spaces between tokens, so that a token has no bytes of its own."""
BEFORE = ("\n", ".", "a", "0")
"""Texts before the one that is encoded: what a tokenizer adds at the beginning of a text, it adds before them."""


class NotReproduced(ValueError):
    """Raised for a text or a tokenizer whose tokens, put together, are not the text."""


class TokenBytes:
    """The tokens of one tokenizer, as bytes."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises NotReproduced for a tokenizer whose tokens have no bytes of their own."""
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise NotReproduced("it is none of the tokenizers library (no tokenizer.json)")
        described = json.loads(backend.to_str())
        decoders = list(_parts(described["decoder"]))
        kinds = {part["type"] for part in decoders}
        if added := sorted(kinds & OF_SPACES):
            raise NotReproduced(f"its decoder {added[0]} adds spaces that are no token's")
        fallback = "ByteFallback" in kinds or bool(described["model"].get("byte_fallback"))
        spaced = any(
            part["type"] == "Metaspace" or (part["type"] == "Replace" and part["pattern"].get("String") == SPACE)
            for part in decoders
        )
        added_tokens = backend.get_added_tokens_decoder()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        size = 1 + max(vocabulary.values(), default=-1)
        self._bytes: list[bytes | None] = [None] * size
        alphabet = _byte_level_alphabet() if "ByteLevel" in kinds else None
        for piece, token in vocabulary.items():
            if token in added_tokens or alphabet is None:
                byte = BYTE_PIECE.fullmatch(piece) if fallback else None
                plain = piece.replace(SPACE, " ") if spaced else piece
                self._bytes[token] = plain.encode() if byte is None else bytes([int(byte[1], 16)])
            else:
                self._bytes[token] = b"".join(alphabet.get(c, c.encode()) for c in piece)
        self._special = {i for i, token in added_tokens.items() if token.special} | set(tokenizer.all_special_ids)
        self._ids = dict(vocabulary)
        # A copy: what a text looks like is no special token, and the tokenizer itself is left as it is.
        self._encoder = type(backend).from_str(backend.to_str())
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._encoder.encode_special_tokens = True

    def __len__(self) -> int:
        return len(self._bytes)

    def of(self, token: int) -> bytes | None:
        """Return the bytes of a token, those that it is written as if it is special; None for an id that is none."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else None

    def joined(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of tokens one after the other."""
        return b"".join(self.of(i) or b"" for i in ids)

    def is_special(self, token: int) -> bool:
        """Return whether a token is special: no text is ever encoded to it."""
        return token in self._special

    def special_id(self, written: bytes) -> int | None:
        """Return the special token that is written so; None without one."""
        token = self._ids.get(written.decode(errors="replace"))
        return token if token is not None and token in self._special else None

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text that other tokens stand before; no special token is among them.

        Raises NotReproduced where their bytes are not the text's, as after a normalisation.
        """
        data = text.encode()
        ids = self._encoded(text)
        if self.joined(ids) == data:
            return ids
        for before in BEFORE:
            head, ids = self._encoded(before), self._encoded(before + text)
            if ids[: len(head)] == head and self.joined(ids[len(head) :]) == data:
                return ids[len(head) :]
        found = self.joined(self._encoded(text)).decode(errors="replace")
        raise NotReproduced(f"the tokens of {text[:60]!r} are those of {found[:60]!r}")

    def _encoded(self, text: str) -> list[int]:
        return list(self._encoder.encode(text, add_special_tokens=False).ids)


def _parts(decoder: Any) -> Iterator[dict[str, Any]]:
    """Yield a decoder, or those that a sequence of them consists of."""
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _parts(part)
    else:
        yield decoder


def _byte_level_alphabet() -> dict[str, bytes]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2): itself where it is printed,
    else the next of the characters from 256 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    pairs = [*((byte, byte) for byte in printed), *((256 + place, byte) for place, byte in enumerate(others))]
    return {chr(character): bytes([byte]) for character, byte in pairs}
