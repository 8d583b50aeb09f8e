"""The contract: models of DistillationJob and Teacher, their status, and the protocol between the roles.

Imported by the operator and by the workers; imports neither.
"""
