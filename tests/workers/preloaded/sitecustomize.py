"""In a process of the workers' tests, and in those that it starts: Popen forks what has been imported already.

Python imports this module as it starts, where this folder stands in PYTHONPATH. The product knows nothing of it.
"""

import os

if os.environ.get("DISTILL_TEST_PRELOADED"):
    import forked_popen

    forked_popen.install()
