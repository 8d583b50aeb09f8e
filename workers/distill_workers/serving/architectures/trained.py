"""SGLang's own classes for the architectures that the trainer knows (megatron/architecture.py)."""

from sglang.srt.models import llama, qwen2, qwen3, qwen3_moe

EntryClass = [*llama.EntryClass, qwen2.EntryClass, qwen3.EntryClass, qwen3_moe.EntryClass]
"""The name is SGLang's (models/registry.py)."""
