"""The controller of DistillationJobs: plan.py decides (pure), controller.py observes and acts.

May import teacher, resources, model and runtime.
"""
