"""Fine-tuning: `run` is a run from top to bottom.

Bad input raises a ValueError, TypeError, OSError or ImportError before any work; `timm_apvit.cli.main` makes it a line.
"""
