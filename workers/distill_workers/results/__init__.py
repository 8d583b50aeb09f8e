"""What a run leaves for others: the card of its model, its publication, and the comparison with other runs.

May import `reporting` and what stands below it.
"""
