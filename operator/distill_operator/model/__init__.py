"""Values that both controllers decide on: what was observed, conditions, status, and effects that may be asked for.

May import runtime's kinds and times; no input, no output.
"""
