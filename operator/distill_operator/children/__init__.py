"""Builders of the objects of one job: pure functions from the model to one plain dict each, with a golden file."""
