"""Run folders to one page: the claims, the curves, the table, samples, and what made each row.

folders    a folder -> Run
verdicts   runs     -> Claim: does it hold, and by what figures
page       both     -> one self-contained HTML file
"""

from __future__ import annotations

from lm.report.page import write
from lm.report.run_folders import RunFolder, read_run_folder, read_run_folders
from lm.report.verdicts import (
    Claim,
    claim_distillation,
    claim_finetuning,
    claim_pretraining,
    demo_claims,
)
