"""The fine-tuning command: data, training loop, checkpoints and reports."""
