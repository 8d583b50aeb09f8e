"""The CPU mode: shims with which the published SGLang and megatron-core run without an accelerator.

Imported by entry points only, and only where spec.accelerator is none.
"""
