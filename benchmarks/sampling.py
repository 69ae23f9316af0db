"""The sampler alone: time and memory from a geometry to patches, against other ways and against a bound.

    python benchmarks/sampling.py [--batch 8] [--tokens 196] [--source 224] [--compile] [--output sampling.json]

- *package*: `AdaptivePatching.sample`: points, footprints, mip pyramid, one `grid_sample` a level.
- *bilinear*: the same without a pyramid, which aliases: one `grid_sample`, the least that PyTorch can do.
- *expanded*: the image expanded once a patch, and `grid_sample` on each, as APViT's reference implementation does.
- *bound*: the bytes that must move, of the image and of the patches, at the speed at which this machine copies memory.

All take turns. Memory is the peak of a process of its own, less what it held before; the median of three.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cost import resident, rest_peak
from environment import counted, new_file, write_report
from timing import keep_memory, peak_memory, quartiles, time_in_turns
from torch import Tensor

from timm_apvit import AdaptivePatching, PatchGeometry
from timm_apvit.patching.coords import sample_grid

PATCH = 16
COPIED = 1 << 26  # floats, 256 MiB: beyond any cache


class Sampling:
    """An image and patches of it at random places and of random sizes."""

    def __init__(self, batch: int, tokens: int, source: int, device: str) -> None:
        torch.manual_seed(0)
        self.patching = AdaptivePatching(PATCH, tokens).to(device)
        self.image = torch.randn(batch, 3, source, source, device=device)
        fields = self.patching.transform.fields
        raw = {name: torch.randn(batch, tokens, width, device=device) for name, width in fields.items()}
        self.geometry: PatchGeometry = self.patching.transform(
            raw, self.patching.layout.anchors(self.image.device), (source, source)
        )

    def package(self) -> Tensor:
        """Patches ``(B, N, C, P, P)``, as the package samples them."""
        return self.patching.sample(self.image, self.geometry, self.patching.layout)

    def bilinear(self) -> Tensor:
        """Patches ``(B, C, N * P, P)`` of the image alone, whatever their footprint."""
        return F.grid_sample(self.image, self._points().flatten(1, 2), padding_mode='border', align_corners=False)

    def expanded(self) -> Tensor:
        """Patches ``(B * N, C, P, P)``, each of its own copy of the image."""
        batch, tokens = self.geometry.centres.shape[:2]
        images = self.image.unsqueeze(1).expand(-1, tokens, -1, -1, -1).reshape(batch * tokens, *self.image.shape[1:])
        return F.grid_sample(images, self._points().flatten(0, 1), padding_mode='border', align_corners=False)

    def _points(self) -> Tensor:
        return self.geometry.points(sample_grid((PATCH, PATCH), self.image.device))

    def bytes_to_move(self) -> int:
        """Of the image, which must be read, and of the patches, which must be written."""
        return 4 * (self.image.numel() + self.geometry.centres[..., 0].numel() * 3 * PATCH**2)


WAYS: dict[str, Callable[[Sampling], Tensor]] = {
    'package': Sampling.package,
    'bilinear': Sampling.bilinear,
    'expanded': Sampling.expanded,
}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--batch', type=counted, default=8)
    add('--tokens', type=counted, default=196)
    add('--source', type=counted, default=224, help='side of the images, in pixels')
    add('--device', default='cpu')
    add('--threads', type=counted, default=1)
    add('--rounds', type=counted, default=7)
    add('--compile', action='store_true', help='also compile what the package does')
    add('--output', type=new_file)
    add('--measure', choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sampling = Sampling(args.batch, args.tokens, args.source, args.device)
    if args.measure:
        sys.stdout.write(str(peak(sampling, args.measure)))
        return

    calls = {name: lambda way=way: way(sampling) for name, way in WAYS.items()}
    if args.compile:
        calls['package, compiled'] = torch.compile(sampling.package)
    source, target = (torch.ones(COPIED, device=args.device) for _ in range(2))  # pages of zeros are not all there
    calls['copy'] = lambda: target.copy_(source)
    with torch.inference_mode():
        seconds = time_in_turns(calls, args.rounds, args.device)
    per_byte = statistics.median(seconds.pop('copy')) / (2 * 4 * COPIED)  # each is read and written
    bound = per_byte * sampling.bytes_to_move()

    rows = []
    for name, own in seconds.items():
        row = {'way': name, 'milliseconds': 1000 * statistics.median(own), 'of_bound': statistics.median(own) / bound}
        row['package_is_faster_by'] = quartiles(own, seconds['package'])
        row['peak_mib'] = memory(name, args) if name in WAYS else None
        rows.append(row)
        held = f'{row["peak_mib"]:>8.0f} MiB' if row['peak_mib'] is not None else ''
        sys.stdout.write(f'{name:<20}{row["milliseconds"]:>9.2f} ms   {row["of_bound"]:>6.1f} x the bound {held}\n')
    sys.stdout.write(f'{"bound":<20}{1000 * bound:>9.2f} ms   at {1e-9 / per_byte:.1f} GB/s\n')
    if args.output:
        setting = {name: getattr(args, name) for name in ('batch', 'tokens', 'source', 'device', 'rounds')}
        found = {'bound_milliseconds': 1000 * bound, 'gigabytes_per_second': 1e-9 / per_byte, 'ways': rows}
        write_report(args.output, args.threads, **setting, **found)


def memory(way: str, args: argparse.Namespace) -> float:
    """Peak memory of a way, in MiB: of a process of its own each, the median of three."""
    setting = [f'--{name}={getattr(args, name)}' for name in ('batch', 'tokens', 'source', 'device', 'threads')]
    command = [sys.executable, __file__, '--measure', way, *setting]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(3)]
    return statistics.median(map(float, runs))


def peak(sampling: Sampling, way: str) -> float:
    """Peak of what a way takes, in MiB, less what was held before."""
    with torch.inference_mode():
        if sampling.image.is_cuda:
            return peak_memory(lambda: WAYS[way](sampling), 'cuda')
        WAYS[way](Sampling(1, 2, 64, 'cpu'))  # loads what it needs
        before = rest_peak()
        WAYS[way](sampling)
    return resident('VmHWM') - before


if __name__ == '__main__':
    keep_memory()
    main()
