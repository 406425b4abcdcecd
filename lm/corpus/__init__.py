"""Build a corpus: sources to deduplicated, filtered token shards, whole or not at all.

command     what `python -m lm corpus` does
documents   the recipe of a corpus, and one record's way into it
rules       cleaning and filtering rules, by name
dedupe      exact and near duplicates
build       the build by local processes
beam        the same build by Apache Beam; runners: its options; beam_files: files its workers share
folder      the folder of a finished corpus: identity, manifest, quarantine
overlap     how much of an evaluation set the training data contain
"""
