"""Tasks: where records come from, how a record becomes texts, and which metrics score the answers.

task             Task, and the texts that it makes of a record
table            TASKS, the built-in tasks
mixtures         the tasks that a config names, with their rates; tasks defined in a config
teacher_answers  a file of a teacher's answers as the training split of a task
truncation       the ids of an input, cut to the maximum length
"""

from lm.tasks.mixtures import check_mixture, get_task, is_corpus_dir, task_from_config
from lm.tasks.table import TASKS
from lm.tasks.task import SPEAKERS, Task, Text
from lm.tasks.teacher_answers import TeacherAnswers, is_answers_file, with_teacher_answers
from lm.tasks.truncation import truncate_input
