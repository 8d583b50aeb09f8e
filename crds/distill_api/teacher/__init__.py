"""Teachers: the kind Teacher (kind.py), and the source of a job's own teacher, an endpoint, and which prompt is whose.

May import spec's template and the modules of the contract.
"""
