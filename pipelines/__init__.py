"""The programs: at the top one door a verb, which holds the verb's signature and imports nothing heavy; behind them rooms.

Only this package imports Ray and MLflow.
"""

from pipelines.cluster import environment as environment  # Ray reads its variables when it is imported
from qskd import imports as imports  # so that the end of every process of ours is short

OF_QSKD = True  # what tells this package from another of its name (`qskd.verbs`)
