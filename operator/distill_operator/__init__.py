"""The operator: keeps every DistillationJob of a cluster as its spec says.

Read in this order: observed.py (what is), plan.py (what to do about it, pure), reconcile.py (does it), watch.py and
queue.py (when).
"""
