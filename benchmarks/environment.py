"""What figures were taken on and with, for the JSON of every benchmark."""

import platform
from typing import Any

import timm
import torch

import timm_apvit


def machine(threads: int) -> dict[str, Any]:
    """What figures were taken on."""
    return {'processor': platform.processor() or platform.machine(), 'threads': threads}


def versions() -> dict[str, str]:
    """Of the libraries that they depend on."""
    return {'torch': torch.__version__, 'timm': timm.__version__, 'timm_apvit': timm_apvit.__version__}
