"""What happens around an update besides the algorithm: evaluation, guards, checkpoints, metrics, the next batches.

A callback sees a step before its update, after it, or both, and may end it by raising RollBack, RepeatStep or StopRun.
"""
