"""The spec of a DistillationJob, a module for each part of it; job_spec.py joins them and is what others import.

May import the modules of the contract that name no kind.
"""
