"""The controller of Teachers, and what a job sees of the Teachers that it names.

May import resources, model and runtime.
"""
