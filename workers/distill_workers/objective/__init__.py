"""The objective: advantages, divergences, off-policy corrections, the loss of a token, and schedules.

Pure torch; may import distill_api alone, and no engine (import-linter).
"""
