"""Kueue: the Workload of a job or a Teacher, its admission, and what that means for the owner's pods.

`workload` builds and writes, `admission` decides (both pure), `observer` reads. May import resources, model, runtime.
"""
