"""Kueue: the Workload of a job or a Teacher, its admission, and what that means for the owner's pods.

`workload` builds and writes, `demand` compares, `admission` decides (all pure), `observer` reads. May import
resources, model, runtime.
"""
