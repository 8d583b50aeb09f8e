"""The client side of the teachers that score the student's tokens: pools of replicas, protocols, and local servers.

May import serving, data and the leaf modules.
"""
