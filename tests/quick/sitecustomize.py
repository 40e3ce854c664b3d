"""What each process that tests start runs first, Ray's own among them (tests/conftest.py puts this folder on their path).

They live for seconds and most of what they do is import, which leaves no garbage. Looking for it, at every 700 new objects and
once more at the end, is a third of their time.
"""

import atexit
import gc

gc.set_threshold(100_000, 20, 20)
atexit.register(gc.freeze)
