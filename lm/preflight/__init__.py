"""Tells whether a run fits a TPU slice, how fast it can be and what it costs, before paying for it.

slices    slices by their Cloud names (no jax)
program   the training step, lowered from shapes alone
compiler  compilation for absent chips, in a child process
hlo       bytes that a compiled program sends between chips
flops     FLOPs that a program executes
roofline  lower bounds of time and cost
advice    the nearest changes of layout that fit
report    the report, as JSON and as text
command   python -m lm preflight
"""
