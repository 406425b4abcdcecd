"""Distillation: a student learns from a teacher.

terms     what it learns, in words
loss      the terms, added up
students  where a student starts from
"""

from lm.distill.loss import make_distillation_loss
from lm.distill.students import check_student, evenly, init_student
from lm.distill.terms import Term, parse

__all__ = [
    "Term",
    "check_student",
    "evenly",
    "init_student",
    "make_distillation_loss",
    "parse",
]
