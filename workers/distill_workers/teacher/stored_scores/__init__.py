"""Scores that a teacher gave once, on the output volume, found again by a hash of teacher, prompt and response.

May import the protocol of teachers and the leaf modules.
"""
