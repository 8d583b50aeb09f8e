"""Builders of the child objects: pure functions from the model to one plain dict each, with a golden file.

May import model and settings; no input, no output.
"""
