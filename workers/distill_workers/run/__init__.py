"""The training loop: GKD's algorithm, its callbacks, preflight, and the trainer's ranks as one team.

May import everything but the entry points.
"""
