"""What a job takes, in the words of Kueue.

May import resources.
"""
