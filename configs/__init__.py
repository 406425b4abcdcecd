"""Experiment configs: base.py documents every key, models.py holds the presets, the rest differ."""
