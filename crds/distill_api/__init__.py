"""The contract: models of a DistillationJob, its status, and what the roles say to each other.

Imported by the operator and by the workers; imports neither.
"""
