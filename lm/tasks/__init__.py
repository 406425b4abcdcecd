"""Tasks: where records come from, how a record becomes texts, how answers are judged.

task      what a task is, and what it makes of a record
table     those that are built in
mixtures  which of them a config names, at which rates; a user's own
answers   a file of a teacher's answers as training split
fitting   the ids of an input that must fit in
"""

from lm.tasks.mixtures import check_mixture, get_task, is_corpus_dir, task_from_config
from lm.tasks.table import TASKS
from lm.tasks.task import SPEAKERS, Task, Text
from lm.tasks.teacher_answers import TeacherAnswers, is_answers_file, with_teacher_answers
from lm.tasks.truncation import truncate_input
