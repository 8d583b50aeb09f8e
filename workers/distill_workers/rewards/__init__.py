"""Rewards: one module for each way of grading a whole response with a number.

May import data and the leaf modules.
"""
