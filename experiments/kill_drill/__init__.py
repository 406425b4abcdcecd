"""Does a run that was killed, stopped or damaged, and resumed, equal an uninterrupted run?

python -m experiments.kill_drill --trials=300 --seed=0    # make drill

Each trial starts `python -m lm train` on a toy corpus, injects a fault at a random moment and
repeats the command until the run ends. The drill fails unless the bits of the last checkpoint, the
log and the folder equal those of the uninterrupted run. Answer: kill_drill.md; all trials:
kill_drill.jsonl.

  toy children faults    a tiny run; one process of it; faults inside that process
  outcome                the content of a finished run's folder, read without lm's code
  drill                  cases, their unbroken runs, and the steps of a trial
  kills hosts disks      the kinds of trials, by what they need
  page                   the table
"""
