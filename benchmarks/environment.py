"""What the benchmarks have in common: what their options take, and JSON that tells what figures were taken on."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch

import timm_apvit
from timm_apvit.cli.evaluate import processor
from timm_apvit.files import check_writable, write_atomically
from timm_apvit.finetuning.values import number

counted = number(int, 1)


def new_file(text: str) -> Path:
    """Parse the path of a file to write, for argparse: what took an hour to measure has somewhere to go."""
    try:
        check_writable(text)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def write_report(path: Path, threads: int, **found: Any) -> None:
    """Write figures as JSON, with the command and what they were taken on."""
    report = {'command': ' '.join(sys.argv), **versions(), **machine(threads), **found}
    write_atomically(path, json.dumps(report, indent=1) + '\n')


def machine(threads: int) -> dict[str, Any]:
    """What figures were taken on."""
    return {'processor': processor(), 'threads': threads}


def versions() -> dict[str, str]:
    """Of the libraries that they depend on."""
    return {'torch': torch.__version__, 'timm': timm.__version__, 'timm_apvit': timm_apvit.__version__}
