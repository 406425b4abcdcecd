"""Launch `python -m lm train` on remote or local machines: python -m experiments.launch --help.

job     the run and its machines, checked before anything is paid for
steps   one command: print it and run it
local   several processes of this machine
tpu_vm  a queued resource of Cloud TPU, requested again after a preemption
gke     a JobSet of Kubernetes
slurm   a batch job with GPUs

A target is a module with plan(job), the commands that --dry-run prints, and launch(job), which runs
them and returns the exit code of the run. README.md, "Training", explains the codes.
"""
