"""What a user waits for first: the import after timm's, and making a model against making the ViT.

    python benchmarks/startup.py [--model apvit_small] [--processes 5] [--output startup.json]

Each figure is the median over fresh processes, in each of which both models are made in turn.
"""

import argparse
import json
import statistics
import subprocess
import sys

import timm
from environment import counted, new_file, write_report

MEASURE = """
import json, statistics, sys, time
import timm
start = time.perf_counter()
import timm_apvit
imported = time.perf_counter() - start
seconds = {name: [] for name in (timm_apvit.vit_name(sys.argv[1]), sys.argv[1])}
for round_ in range(6):
    for name, own in seconds.items():
        start = time.perf_counter()
        timm.create_model(name)
        own.append(time.perf_counter() - start)
vit, ours = (statistics.median(own[1:]) for own in seconds.values())
print(json.dumps({'import_milliseconds': 1000 * imported, 'vit': vit, 'ours': ours}))
"""


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='apvit_small', choices=timm.list_models('*apvit*'), metavar='MODEL')
    parser.add_argument('--processes', type=counted, default=5)
    parser.add_argument('--output', type=new_file)
    args = parser.parse_args()
    command = [sys.executable, '-c', MEASURE, args.model]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(args.processes)
    ]
    found = {
        'import_milliseconds': statistics.median(run['import_milliseconds'] for run in runs),
        'creation_to_vit': statistics.median(run['ours'] / run['vit'] for run in runs),
    }
    sys.stdout.write(
        f'import timm_apvit adds {found["import_milliseconds"]:.0f} ms; '
        f'{args.model} is made in {found["creation_to_vit"]:.2f} x the time of its ViT.\n'
    )
    if args.output:
        write_report(args.output, 1, model=args.model, **found, runs=runs)


if __name__ == '__main__':
    main()
