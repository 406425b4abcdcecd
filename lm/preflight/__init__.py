"""Before a run is paid for: whether it fits a TPU slice, how fast it can be, what it costs.

slices    the slices by their Cloud names (no jax)
program   the very step that train would run, lowered from shapes alone
compiler  a child process that compiles it for chips that are not here
hlo       bytes that a compiled program moves, in memory and between chips
flops     FLOPs that a program executes
roofline  times, and what a whole run takes, from those
search    layouts, and the nearest changes that fit
page      the report
command   python -m lm preflight
"""
