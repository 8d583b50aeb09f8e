"""What the commands show on a terminal and in a pipe: the progress of a job, and decoded rollouts.

May import snapshots, and nothing of the cluster or of the commands.
"""
