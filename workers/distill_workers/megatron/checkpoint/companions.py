"""The files of a model that are neither weights nor config.json: an exported model takes them over unchanged."""

import shutil
from pathlib import Path

FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.jinja",
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "*.model", "*.tiktoken", "*.spm",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
FOLDERS = ("chat_template*", "additional_chat_templates", "tokenizer*")
"""transformers keeps further chat templates in a folder; all that lies in these belongs to the model."""
CODE = "*.py"
"""Modules that config.json or tokenizer_config.json name (auto_map)."""


def companions(source: Path, *, trust_remote_code: bool) -> list[Path]:
    """Return the files' paths in the folder `source`, relative to it; its code only where the job trusts it."""
    found = {path for pattern in (*FILES, CODE) for path in source.glob(pattern) if not path.is_dir()}
    folders = {path for pattern in FOLDERS for path in source.glob(pattern) if path.is_dir()}
    found |= {path for folder in folders for path in folder.rglob("*") if not path.is_dir()}
    return sorted(path.relative_to(source) for path in found if trust_remote_code or path.suffix != ".py")


def copy(source: Path, destination: Path, *, trust_remote_code: bool) -> None:
    """Copy them into an existing folder. Raises OSError."""
    for path in companions(source, trust_remote_code=trust_remote_code):
        (destination / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, destination / path)
