"""Named checks before the first step: a student that cannot learn from this teacher is found in seconds, not hours.

One module for each kind of check; preflight.py has their order. May import what the loop may.
"""
