"""One SGLang server: its command line, its life as a child process, and the key of its administration.

May import the leaf modules alone.
"""
