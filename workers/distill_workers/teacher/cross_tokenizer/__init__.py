"""Teachers with a tokenizer of their own: the student's response as the teacher's tokens, and its scores brought back.

Nothing here does input or output. May import the protocol of teachers and the leaf modules.
"""
