"""What a job takes, as Kueue counts it: a Workload for a controller that is not part of this operator yet.

May import resources.
"""
