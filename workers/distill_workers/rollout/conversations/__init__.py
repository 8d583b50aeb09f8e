"""Multi-turn rollouts: the student's conversations with environments and with agents, as token ids.

May import the engine pool and its scheduler, and what is below rollout/.
"""
