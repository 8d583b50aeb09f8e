"""Environments: what answers the student in a multi-turn rollout, and its messages as token ids.

May import data and the leaf modules.
"""
