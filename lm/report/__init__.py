"""Render run folders as one HTML page.

run_folders  read a folder as a RunFolder
claims       Claim: a sentence that figures decide
page         run folders and claims as one self-contained HTML file
"""

from __future__ import annotations

from lm.report.claims import Claim
from lm.report.page import write
from lm.report.run_folders import SCORES, RunFolder, read_run_folder, read_run_folders
