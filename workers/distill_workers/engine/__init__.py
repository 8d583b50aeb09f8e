"""One rollout engine: an SGLang server of the student behind one interface, in this process or as an actor of Ray.

May import serving and the leaf modules.
"""
