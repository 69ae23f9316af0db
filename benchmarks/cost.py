"""What adaptive patching adds: multiply-adds, by part, and peak memory against the ViT's.

    python benchmarks/cost.py [--output cost.json] [--batch 16] [--models apvit_tiny apvit_small]

Multiply-adds are counted from the operators that run: products and convolutions as torch's own counter has them, 4 for
each value that bilinear sampling reads, the taps of the anti-aliased resize, and 1 for each result of any other
arithmetic. What is added is the difference to timm's ViT, with everything counted on both sides.

Peak memory is that of the resident set of a fresh process each, less what it held before the model was made; the median
of some processes, those of both sides in turn.
"""

import argparse
import copy
import ctypes
import gc
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from environment import counted, new_file, write_report
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import timm_apvit
from timm_apvit import Anchors
from timm_apvit.patching.sampling import mip_pyramid

_aten = torch.ops.aten
_FREE = {'empty', 'zeros', 'ones', 'full', 'arange', 'copy_', '_to_copy', 'clone', 'cat', 'stack', 'detach', 'index'}


class Counted(TorchDispatchMode):
    """Counts multiply-adds of the operators that run, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet.__name__
        if packet in flop_registry:
            self.counts[name] += flop_registry[packet](*args, **(kwargs or {}), out_val=out) // 2
        elif packet is _aten.grid_sampler_2d:
            self.counts[name] += 4 * out.numel()
        elif packet is _aten._upsample_bilinear2d_aa:
            taps = [2 * max(1.0, a / b) for a, b in zip(args[0].shape[2:], out.shape[2:], strict=True)]
            columns = out.numel() * args[0].shape[2] / out.shape[2]  # widths are resized first
            self.counts[name] += round(columns * taps[1] + out.numel() * taps[0])
        elif isinstance(out, torch.Tensor) and out.is_floating_point() and not func.is_view and name not in _FREE:
            self.counts['arithmetic'] += out.numel()
        return out


def multiply_adds(model: torch.nn.Module, image: torch.Tensor) -> Counter[str]:
    """Multiply-adds of one forward, by operator."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False  # so that attention's products are seen
    with torch.no_grad(), Counted() as counted:
        model(image)
    return counted.counts


def added_multiply_adds(name: str) -> dict[str, Any]:
    """Multiply-adds of an APViT at the full grid against its ViT."""
    vit, model = timm.create_model(timm_apvit.vit_name(name)), timm.create_model(name)
    image = torch.randn(1, 3, 224, 224)
    ours, theirs = multiply_adds(model, image), multiply_adds(vit, image)
    anchors = Anchors(torch.zeros(196, 2), torch.ones(196, 2))
    localizer = model.patch_embed.patching.localizer
    seen = mip_pyramid(image, localizer.level((224, 224)) + 1)
    with torch.no_grad(), Counted() as counted:
        localizer(localizer.look(seen), anchors)
    added = ours.total() - theirs.total()
    return {
        'model': name,
        'vit': theirs.total(),
        'added': added,
        'percent': 100 * added / theirs.total(),
        'localiser': counted.counts.total(),
        'sampling': ours['grid_sampler_2d'] - counted.counts['grid_sampler_2d'],
    }


def resident(field: str) -> float:
    """Resident memory of this process now (VmRSS) or at its peak (VmHWM), in MiB."""
    line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def rest_peak() -> float:
    """Let the peak start from here, and return what is resident, in MiB. Linux and glibc only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what is free would be taken first, unseen
    Path('/proc/self/clear_refs').write_text('5')
    return resident('VmRSS')


def measure_memory(name: str, mode: str, batch: int) -> None:
    """In a process of its own: print the peak of a forward or a training step, in MiB."""
    torch.set_num_threads(1)
    torch.nn.functional.gelu(torch.randn(8, 8) @ torch.randn(8, 8))  # libraries that load at first use
    before = rest_peak()
    model = timm.create_model(name, num_patches=196) if 'apvit' in name else timm.create_model(name)
    image = torch.randn(batch, 3, 224, 224)
    if mode == 'train':
        model.train()(image).sum().backward()
    else:
        with torch.inference_mode():
            model.eval()(image)
    sys.stdout.write(f'{resident("VmHWM") - before}')


def peak_memory(name: str, batch: int, repeats: int) -> dict[str, Any]:
    """Peak memory of an APViT and of its ViT, forward and training step."""
    row: dict[str, Any] = {'model': name, 'batch': batch}
    for mode in ('forward', 'train'):
        peaks: dict[str, list[float]] = {name: [], timm_apvit.vit_name(name): []}
        for _ in range(repeats):
            for each, values in peaks.items():
                command = [sys.executable, __file__, '--measure', each, mode, '--batch', str(batch)]
                values.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        ours, theirs = (statistics.median(values) for values in peaks.values())
        row[mode] = {'apvit_mib': ours, 'vit_mib': theirs, 'ratio': ours / theirs, 'all_mib': peaks}
    return row


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--models',
        nargs='+',
        default=['apvit_tiny', 'apvit_small'],
        choices=timm.list_models('*apvit*'),
        metavar='MODEL',
    )
    parser.add_argument('--batch', type=counted, default=16)
    parser.add_argument('--repeats', type=counted, default=3)
    parser.add_argument('--output', type=new_file)
    parser.add_argument('--measure', nargs=2, metavar=('MODEL', 'MODE'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure_memory(*args.measure, args.batch)
        return
    lines = ['model          ViT  added   of it localiser, sampling (million multiply-adds, 224 px, 196 patches)']
    cost = [added_multiply_adds(name) for name in args.models]
    lines += [
        f'{c["model"]:<11} {c["vit"] / 1e6:>6.0f} {c["added"] / 1e6:>6.1f} = {c["percent"]:.2f} %'
        f'   {c["localiser"] / 1e6:.1f}, {c["sampling"] / 1e6:.1f}'
        for c in cost
    ]
    memory = [peak_memory(name, args.batch, args.repeats) for name in args.models]
    lines += ['', f'model       peak memory: forward, training step (MiB: APViT / ViT), batch {args.batch}']
    for m in memory:
        cells = [f'{m[k]["apvit_mib"]:.0f} / {m[k]["vit_mib"]:.0f} = {m[k]["ratio"]:.3f}' for k in ('forward', 'train')]
        lines.append(f'{m["model"]:<11} {cells[0]}   {cells[1]}')
    sys.stdout.write('\n'.join(lines) + '\n')
    if args.output:
        write_report(args.output, 1, multiply_adds=cost, memory=memory)


if __name__ == '__main__':
    main()
