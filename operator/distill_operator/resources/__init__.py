"""Builders of the child objects: pure functions from the API's models to one plain dict each, with a golden file.

rendering.py calls them for a job, teacher_servers.py for a Teacher; pinning.py says what of it an attempt keeps. May
import model and settings; no input, no output.
"""
