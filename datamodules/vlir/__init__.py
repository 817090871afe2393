"""The corpus of interleaved rationales: its schema and its readers."""
