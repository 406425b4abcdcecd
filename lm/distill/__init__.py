"""Distillation: a student learns from a teacher.

config        TeacherConfig, the section teacher
terms         the terms of the loss, the section teacher.loss
loss          the weighted sum of the terms
features      terms that compare states inside both models
on_policy     the student's own answers as targets
student_init  the student's first parameters
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
