"""The one training engine: supervised training, distillation and recovery differ only in their objective."""

from compress.training.engine import fit
from compress.training.evaluation import answered_correctly, evaluate
from compress.training.objective import Objective
from compress.training.place import Workplace
from compress.training.teachers import OneTeacher, Teacher

__all__ = ["Objective", "OneTeacher", "Teacher", "Workplace", "answered_correctly", "evaluate", "fit"]
