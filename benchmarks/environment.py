"""What the benchmarks have in common: what their options take, and JSON that tells what figures were taken on."""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import timm
import torch

import timm_apvit
from timm_apvit.finetuning.checkpoints import write_atomically
from timm_apvit.finetuning.parsing import number

counted = number(int, 1)


def new_file(text: str) -> Path:
    """Parse the path of a file to write, for argparse: what took an hour to measure has somewhere to go."""
    path = Path(text)
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f'expected a file in a folder that can be written to, got {text!r}')
    return path


def write_report(path: Path, threads: int, **found: Any) -> None:
    """Write figures as JSON, with the command and what they were taken on."""
    report = {'command': ' '.join(sys.argv), **versions(), **machine(threads), **found}
    write_atomically(path, json.dumps(report, indent=1) + '\n')


def machine(threads: int) -> dict[str, Any]:
    """What figures were taken on."""
    return {'processor': platform.processor() or platform.machine(), 'threads': threads}


def versions() -> dict[str, str]:
    """Of the libraries that they depend on."""
    return {'torch': torch.__version__, 'timm': timm.__version__, 'timm_apvit': timm_apvit.__version__}
