"""The operator: keeps every DistillationJob and every Teacher of a cluster as its spec says.

The packages, each of which may import those below it:

    distillationjob/  the controller of DistillationJobs: observe, plan (pure), do the effects, write the status
    teacher/          the controller of Teachers, likewise, with their autoscaler
    kueue/            a job's Workload for Kueue, as a command line tool
    resources/        the child objects, as they are rendered from a spec, and which of that an attempt keeps
    model/            what was observed, conditions and statuses, as values
    runtime/          client, cache, watches, work queue, leader election: what any operator needs

Read distillationjob/controller.py first, then plan.py and lifecycle.py. `python -m distill_operator` (__main__.py)
joins the parts; settings.py, policy.py, kinds.py and rbac.py are data that they share.
"""
