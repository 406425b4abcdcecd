"""Is a run that was killed, signalled or damaged, and run again, the run that never was?

python -m experiments.kill_drill --trials=300 --seed=0    # make drill

Real processes of `python -m lm train` on a toy corpus, in each stage; a fault at a random moment;
the same command again until the run has ended. Then the bits of its last checkpoint, its log and
its folder are those of the unbroken run, or the drill fails. Answer: kill_drill.md; every trial:
kill_drill.jsonl.

  toy children faults    a tiny run; a process of it; what goes wrong inside that process
  outcome                what a run's folder holds at its end, read without the code on trial
  drill                  cases, their unbroken runs, and what all trials do
  kills hosts disks      the kinds of trials, by what they need
  page                   the table
"""
