"""The controller of Teachers, and what jobs are told of the Teachers that they name.

May import resources, model and runtime.
"""
