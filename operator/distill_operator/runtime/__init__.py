"""What any operator needs: client, cache, watches, work queue, leader election, Events, health server.

May import kinds and settings. Which objects belong to the operator it is told by an Ownership; it knows nothing of how
a job is distilled.
"""
