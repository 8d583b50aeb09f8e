"""Values that both controllers decide on: observations, conditions, statuses, and what belongs to an owner.

May import runtime's effects, errors and ownership; no input, no output.
"""
