"""The old name of `qskd.from_recipe`, for programs that were written before the house had rooms."""

from qskd.from_recipe import ground_truth as ground_truth
from qskd.from_recipe import make_student as make_student
from qskd.from_recipe import make_teacher as make_teacher
