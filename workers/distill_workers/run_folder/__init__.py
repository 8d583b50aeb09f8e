"""The run folder: everything of a run that outlives its pods, written aside and renamed.

May import the leaf modules alone.
"""
