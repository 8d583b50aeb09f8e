"""The student's new weights into every engine, and proof that they arrived.

May import engine and serving.
"""
