"""Distillation: a student learns from a teacher.

terms     what it learns, in words
loss      the terms, added up
features  what goes on inside both models
policy    its own answers, when and how it learns from them
students  where a student starts from
"""

from lm.distill.loss import make_distillation_loss
from lm.distill.student_init import (
    Start,
    check_student,
    evenly,
    frozen,
    init_student,
    leaves_head,
    parse_start,
)
from lm.distill.terms import Term, parse, shared_temperature, uncached
