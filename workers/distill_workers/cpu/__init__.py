"""The CPU mode: what the published SGLang and megatron-core need to run without an accelerator.

Imported by entry points only, and only where spec.accelerator is none.
"""
