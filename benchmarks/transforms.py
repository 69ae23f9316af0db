"""What each transform family costs: the time of a forward against that of `similarity`, and of the plain ViT.

    python benchmarks/transforms.py [--model apvit_small] [--batch 8] [--rounds 15] [--output transforms.json]

All take turns, and each is compared with the reference of its own round: a machine that slows down slows both. The
median of these ratios counts, and their quartiles tell how far to trust it.
"""

import argparse
import statistics
import sys

import timm
import torch
from environment import counted, new_file, write_report
from timing import keep_memory, quartiles, time_in_turns

import timm_apvit

REFERENCE = 'similarity'


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='apvit_small', choices=timm.list_models('*apvit*'), metavar='MODEL')
    parser.add_argument('--batch', type=counted, default=8)
    parser.add_argument('--rounds', type=counted, default=15)
    parser.add_argument('--threads', type=counted, default=1)
    parser.add_argument('--output', type=new_file)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models = {'ViT': timm.create_model(timm_apvit.vit_name(args.model)).eval()}
    for family in timm_apvit.TRANSFORMS:
        models[family] = timm.create_model(args.model, transform=family).eval()
    image = torch.randn(args.batch, 3, *models['ViT'].patch_embed.img_size)
    with torch.inference_mode():
        seconds = time_in_turns({name: lambda model=model: model(image) for name, model in models.items()}, args.rounds)

    rows = []
    for name, own in seconds.items():
        ratios = quartiles(own, seconds[REFERENCE])
        rows.append({'family': name, 'milliseconds': 1000 * statistics.median(own), 'ratio_quartiles': ratios})
        low, middle, high = ratios
        sys.stdout.write(
            f'{name:<18} {rows[-1]["milliseconds"]:>7.0f} ms   {middle:.3f} x {REFERENCE} ({low:.3f} to {high:.3f})\n'
        )
    if args.output:
        write_report(args.output, args.threads, model=args.model, batch=args.batch, families=rows)


if __name__ == '__main__':
    keep_memory()
    main()
