"""Saving models, and pushing them to the Hub with a model card."""
