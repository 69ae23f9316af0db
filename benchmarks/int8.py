"""What int8 costs in accuracy and saves in bytes and time: a run's model, and its blocks and classifier in 8 bits.

    python benchmarks/int8.py RUN [--speed-of apvit_small] [--num-patches 98] [--output int8.json]

By ``torch.ao.quantization.quantize_dynamic``: weights are rounded once, activations for each batch. The localisation
network stays as it is: 8 bits would move patches. RUN is a folder of the fine-tuning command. Time and size are
those of a model that is large enough for them to matter, on one thread, both in turns.
"""

import argparse
import io
import statistics
import sys
import warnings
from typing import Any

import timm
import torch
from environment import counted, new_file, write_report
from timing import keep_memory, time_in_turns
from torch import nn

from timm_apvit.cli.evaluate import load_evaluated
from timm_apvit.cli.options import BATCH_SIZE
from timm_apvit.finetuning.evaluation import evaluate


def in_int8(model: nn.Module) -> nn.Module:
    """A copy of an APViT whose blocks and classifier are in 8 bits."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch.ao is to move to a package of its own
        quantised: nn.Module = torch.ao.quantization.quantize_dynamic(model, {'blocks', 'head'}, dtype=torch.qint8)
    return quantised


def mebibytes(model: nn.Module) -> float:
    """Size of a model's weights as torch saves them."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 2**20


def measure(run: str, name: str, num_patches: int, rounds: int) -> list[dict[str, Any]]:
    """Accuracy of a run's model, and size and time of a registered one, in 32 bits and in 8."""
    entry = load_evaluated({'model': run, 'device': 'cpu'})
    large = timm.create_model(name, num_patches=num_patches).eval()
    trained = {'float32': entry.model, 'int8': in_int8(entry.model)}
    timed = {'float32': large, 'int8': in_int8(large)}
    image = torch.randn(8, 3, *large.patch_embed.img_size)
    with torch.inference_mode():
        seconds = time_in_turns({kind: lambda model=model: model(image) for kind, model in timed.items()}, rounds)
    rows = []
    for kind, model in trained.items():
        scores = evaluate(model, entry.splits, BATCH_SIZE)
        speed = {'mebibytes': mebibytes(timed[kind]), 'milliseconds': 1000 * statistics.median(seconds[kind])}
        rows.append({'kind': kind, **scores, **speed})
    return rows


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run')
    parser.add_argument('--speed-of', default='apvit_small', choices=timm.list_models('*apvit*'), metavar='MODEL')
    parser.add_argument('--num-patches', type=counted, default=98)
    parser.add_argument('--rounds', type=counted, default=15)
    parser.add_argument('--output', type=new_file)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.run, args.speed_of, args.num_patches, args.rounds)
    for row in rows:
        sys.stdout.write(
            f'{row["kind"]:<8} top-1 {row["top1"]:.3f} of {row["images"]} images   {args.speed_of}: '
            f'{row["mebibytes"]:.0f} MiB, {row["milliseconds"]:.0f} ms for 8 images\n'
        )
    if args.output:
        write_report(args.output, 1, speed_of=args.speed_of, num_patches=args.num_patches, rows=rows)


if __name__ == '__main__':
    keep_memory()
    main()
