"""What any operator needs: client, cache, watches, work queue, leader election, Events, health server.

May import settings; knows nothing of how a job is distilled.
"""
