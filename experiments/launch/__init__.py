"""Start `python -m lm train` where the chips are: python -m experiments.launch --help.

job     what is to be run, checked before anything is paid for
steps   one command: how it is shown, and how it is run
local   several processes of this machine
tpu_vm  a queued resource of Cloud TPU, asked for anew whenever it is preempted
gke     a JobSet of Kubernetes
slurm   a batch job with GPUs

A target is a module with plan(job), the commands that --dry-run prints, and launch(job), which runs
them and returns the exit code of the run. What a code means: "Training" in README.md.
"""
