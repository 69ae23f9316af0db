"""How fast an APViT is: forward and training step, in turn with timm's own ViT.

    python benchmarks/speed.py [--models apvit_small] [--tokens 196 98 49 16] [--sources 224 1024] [--batches 1 8 64]
        [--modes forward train] [--localizers cnn glance saliency] [--dtypes float32 bfloat16] [--compile]
        [--channels-last] [--parts]

Each is compared, in the same rounds, with the ViT on all of 224 px and with the ViT that has as many tokens, on an
image of lower resolution. The median of the ratios counts, and their quartiles tell how far to trust it. The
localisation network's last layers are random, not zero, so that patches do lie anywhere. `--parts` says where the time
goes.

On CPU it starts anew with an allocator that keeps freed memory (`timing.keep_memory`), unless `--system-allocator`:
page faults would move either side by several percent, by chance.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from cost import multiply_adds
from environment import counted, new_file, write_report
from parts import time_parts
from timing import keep_memory, peak_memory, quartiles, time_in_turns
from torch import Tensor, nn

import timm_apvit
from timm_apvit.models.glance import glances
from timm_apvit.patching.anchors import rows_of

SIDE = 224


def main() -> None:
    """Measure, print a table row by row, write JSON."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    rows = []
    sys.stdout.write(f'{"":<62}{"ms":>8} {"/ ViT, all of 224 px":>26} {"/ ViT, as many tokens":>26}\n')
    for case in cases(options):
        rows.append(measure(case, options.rounds, options.device, options.parts))
        sys.stdout.write(shown(rows[-1]) + '\n')
        sys.stdout.flush()
    if options.output:
        setting = {name: getattr(options, name) for name in ('device', 'rounds', 'system_allocator')}
        write_report(options.output, options.threads, **setting, rows=rows)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        '--models',
        nargs='+',
        default=['apvit_tiny', 'apvit_small', 'apvit_base'],
        choices=timm.list_models('*apvit*'),
        metavar='MODEL',
    )
    add('--tokens', nargs='+', type=counted, default=[196], help='numbers of patches')
    add('--sources', nargs='+', type=counted, default=[SIDE], help="sides of the APViT's images, in pixels")
    add('--modes', nargs='+', default=['forward'], choices=['forward', 'train'])
    add('--batches', nargs='+', type=counted, default=[8])
    add('--dtypes', nargs='+', default=['float32'], choices=['float32', 'bfloat16', 'float16'])
    add('--localizers', nargs='+', default=['cnn'], choices=timm_apvit.LOCALIZERS, help='what says where patches lie')
    add('--compile', action='store_true', help='compile both sides')
    add('--channels-last', action='store_true', help="both sides' weights and images")
    add('--parts', action='store_true', help='also say where the time goes; not with --compile')
    add('--device', default='cpu')
    add('--threads', type=counted, default=1)
    add('--rounds', type=counted, default=15)
    add('--system-allocator', action='store_true', help="leave the C library's allocator as it is")
    add('--output', type=new_file)
    options = parser.parse_args()
    if options.parts and options.compile:
        parser.error('expected --parts or --compile, got both')
    return options


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All combinations of what was asked for."""
    names = ('model', 'localizer', 'mode', 'dtype', 'batch', 'tokens', 'source')
    values = (
        options.models, options.localizers, options.modes, options.dtypes, options.batches, options.tokens,
        options.sources,
    )  # fmt: skip
    how = {'compiled': options.compile, 'channels_last': options.channels_last}
    for combination in itertools.product(*values):
        yield {**dict(zip(names, combination, strict=True)), **how}


def measure(case: dict[str, Any], rounds: int, device: str = 'cpu', parts: bool = False) -> dict[str, Any]:
    """Time a case and its two ViTs, in turn."""
    torch.manual_seed(0)
    torch.compiler.reset()
    name = timm_apvit.vit_name(case['model'])
    ours = timm.create_model(case['model'], img_size=SIDE, num_patches=case['tokens'], localizer=case['localizer'])
    models, images = {'ours': randomised(ours)}, {'ours': (case['source'], case['source'])}
    # A layout of N patches has as many rows and columns as an image of this size.
    rows, columns = rows_of(case['tokens'], (SIDE, SIDE)).grid
    height, width = ours.patch_embed.patch_size
    sizes = {'full': (SIDE // height * height, SIDE // width * width), 'few': (rows * height, columns * width)}
    for reference, size in sizes.items():
        if reference == 'full' or size != sizes['full']:
            models[reference], images[reference] = timm.create_model(name, img_size=size), size
    added = {key: multiply_adds(model, torch.randn(1, 3, *images[key])).total() for key, model in models.items()}

    made = {key: torch.randn(case['batch'], 3, *size, device=device) for key, size in images.items()}
    if case['channels_last']:
        made = {key: image.contiguous(memory_format=torch.channels_last) for key, image in made.items()}
        models = {key: model.to(memory_format=torch.channels_last) for key, model in models.items()}
    steps = {key: step(model.to(device), made[key], case) for key, model in models.items()}
    seconds = time_in_turns(steps, rounds, device)
    row = {
        **case,
        'milliseconds': {key: 1000 * statistics.median(own) for key, own in seconds.items()},
        'multiply_adds': added,
        'to_full': quartiles(seconds['ours'], seconds['full']),
        'to_few': quartiles(seconds['ours'], seconds.get('few', seconds['full'])),
    }
    if parts:
        row['parts'] = time_parts(models['ours'], steps['ours'], rounds)
    if device.startswith('cuda'):
        row['peak_mib'] = {key: peak_memory(call, device) for key, call in steps.items()}
    return row


def randomised(model: nn.Module) -> nn.Module:
    """An APViT whose patches lie anywhere within their bounds."""
    localizer = model.patch_embed.patching.localizer
    for layer in localizer.fields.values():
        nn.init.normal_(layer.weight, std=0.3)
    if glances(model):
        nn.init.normal_(localizer.classes[-1].weight, std=0.3)
    if localizer.crowd:
        nn.init.normal_(localizer.score.weight, std=3.0)
    return model


def step(model: nn.Module, image: Tensor, case: dict[str, Any]) -> Callable[[], None]:
    """A forward in the dtype, or a forward and a backward under autocast to it."""
    dtype, trains = getattr(torch, case['dtype']), case['mode'] == 'train'
    model.train(trains)
    run = torch.compile(model) if case['compiled'] else model
    if not trains:
        model.to(dtype)
        image = image.to(dtype)

        @torch.inference_mode()
        def forward() -> None:
            run(image)

        return forward

    def train() -> None:
        with torch.autocast(image.device.type, dtype, enabled=dtype != torch.float32):
            loss = run(image).float().square().mean()
        loss.backward()
        model.zero_grad()

    return train


def shown(row: dict[str, Any]) -> str:
    """A row of the table; the parts below it, in milliseconds."""
    flags = [name.replace('_', ' ') for name in ('compiled', 'channels_last') if row[name]]
    flags += [row['localizer']] * (row['localizer'] != 'cnn')
    setting = [f'{row["tokens"]} of {row["source"]} px', f'batch {row["batch"]}', row['dtype'], row['mode']]
    what = ', '.join([row['model'], *setting, *flags])
    ratios = (f'{m:.3f} ({low:.3f} to {high:.3f})' for low, m, high in (row['to_full'], row['to_few']))
    lines = [f'{what:<62}{row["milliseconds"]["ours"]:>8.1f} ' + ' '.join(f'{ratio:>26}' for ratio in ratios)]
    lines += [f'    {part:<20}{milliseconds:>8.2f}' for part, milliseconds in row.get('parts', {}).items()]
    return '\n'.join(lines)


if __name__ == '__main__':
    if '--system-allocator' not in sys.argv:
        keep_memory()
    main()
