"""Judges a run: held-out evaluations of the student, and the guards' limits on its own numbers.

May import rollout, teacher, rewards and what lies below them.
"""
