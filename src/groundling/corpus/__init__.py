"""The text: documents -> tokens -> a memory-mapped token file.

Invariant: a folder of text becomes the same tokens on every machine, in memory that does not grow with it.

`load.load_corpus` is the way in; `config.CorpusConfig` is its section of a run's settings. Nothing is
imported here, so that the settings can be read without NumPy and tokenizers.
"""
