"""Distillation: a student learns from a teacher.

config    TeacherConfig, the section teacher
terms     the terms of the loss, the section teacher.loss
loss      the terms, added up
features  what goes on inside both models
policy    its own answers, when and how it learns from them
students  where a student starts from
"""

from lm.distill.config import TeacherConfig
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
from lm.distill.terms import TERMS, Term, TermKind, loss_terms, shared_temperature, uncached
