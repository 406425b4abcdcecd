"""Build a corpus: sources to deduplicated, filtered token shards.

command     `python -m lm corpus`
documents   CorpusConfig, and how a record becomes a document
rules       cleaning and filtering rules, by name
dedupe      exact and near duplicates
build       build by local processes
beam        build by Apache Beam
runners     Beam's runners: options and errors
folder      the directory of a finished corpus: identity, manifest, quarantine
overlap     n-gram overlap of evaluation sets with training data
"""
