"""The pods of the roles as users write them: templates, what they may not say, and the shape of release 0.2.0.

May import the modules of the contract that name no kind.
"""
