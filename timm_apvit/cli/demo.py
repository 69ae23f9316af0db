"""The command that opens a page on which one sees where a model looks."""

import argparse
from collections.abc import Callable
from typing import Any

from timm_apvit.cli.options import add_shared
from timm_apvit.demo.page import Viewer, page
from timm_apvit.failures import FailedError
from timm_apvit.finetuning.models import MODEL_HELP
from timm_apvit.finetuning.processes import check_device, default_device
from timm_apvit.finetuning.values import number

DEFAULT = 'apvit_small'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to a parser."""
    parser.add_argument('model', nargs='?', metavar='MODEL', help=f'{MODEL_HELP} (default: {DEFAULT})')
    add = parser.add_argument
    add('--random', action='store_true', help='random weights for registered models, which need no network')
    add('--host', metavar='ADDRESS', help='address to serve at (default: 127.0.0.1, this machine alone)')
    add('--port', type=number(int, 1, 65535), help='port to serve at (default: the first free one from 7860 on)')
    add_shared(parser, 'device')


def prepare(given: dict[str, Any]) -> Callable[[], None]:
    """Load the model, and build the page, which the work serves until it is interrupted."""
    viewer = Viewer(given.get('random', False), check_device(given.get('device') or default_device(), None))
    blocks = page(viewer, given.get('model', DEFAULT))

    def work() -> None:
        host, port = given.get('host', '127.0.0.1'), given.get('port')
        try:
            blocks.launch(server_name=host, server_port=port, share=False)
        except OSError as error:  # which speaks of Gradio's own settings
            raise FailedError(
                f'cannot serve at {host}, port {port or "7860 to 7959"}: no such address, or in use'
            ) from error

    return work
