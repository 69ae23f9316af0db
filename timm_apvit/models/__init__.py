"""Adaptive patches for timm's ViTs: what each class needs, their names, and how their checkpoints load."""
