"""Is it right, and how fast is it, on this machine's GPU? One command, ten minutes, no network.

    python benchmarks/gpu.py [--minutes 10] [--output gpu.json]

First what a GPU could get wrong (`checks.py`), then the sampler against the speed at which the device copies memory
(`sampling.py`), then throughput against timm's ViTs in turn (`speed.py`), what counts most first; the two ratios of a
row are to the ViT on all of 224 px and to the ViT of as many tokens, each with its quartiles. What fails is told and
the rest goes on; what there was no time for is named. The last line says which targets hold.

Without CUDA, or with `--reduced`, all of it runs on a tiny model and says nothing of speed.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from checks import CHECKS, NotHereError, Setting
from environment import new_file, write_report
from sampling import COPIED, WAYS, Sampling
from speed import measure, shown
from timing import time_in_turns

from timm_apvit.finetuning.values import number

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # which PyTorch reads once, for the deterministic mode
# Twins, and how many patches are all of 224 px.
TWINS = {'apvit_small_patch14_dinov2': 256, 'apvit_small_patch16_dinov3': 196}
USUAL: dict[str, Any] = {
    'model': 'apvit_small', 'localizer': 'cnn', 'mode': 'forward', 'dtype': 'bfloat16', 'batch': 256, 'tokens': 196,
    'source': 224, 'compiled': False, 'channels_last': False,
}  # fmt: skip
# What a GPU must reach, of cases that differ from the usual one: largest ratio to the ViT.
TARGETS = {
    'apvit_small, compiled': ({'compiled': True}, 1.03),
    'apvit_tiny, compiled': ({'model': 'apvit_tiny', 'compiled': True}, 1.06),
}
SAMPLER_TARGET = 2.0


def cases(reduced: bool) -> list[dict[str, Any]]:
    """What differs from the usual case, in the order in which it counts."""
    if reduced:
        usual = {**USUAL, 'model': 'test_apvit', 'dtype': 'float32', 'batch': 2}
        return [usual, {**usual, 'mode': 'train', 'tokens': 49}, {**usual, 'localizer': 'glance', 'tokens': 16}]
    few, sides = (98, 49, 16), (448, 1024)
    models = ('apvit_small', 'apvit_tiny', 'apvit_base')
    twins = [{'model': model, 'tokens': tokens} for model, tokens in TWINS.items()]
    differing: list[dict[str, Any]] = [
        *(changes for changes, _ in TARGETS.values()),
        *({'model': model} for model in models),
        *twins,
        *({'tokens': tokens} for tokens in few),
        *({'model': model, 'mode': 'train', 'batch': 64} for model in models),
        *({**twin, 'mode': 'train', 'batch': 64} for twin in twins),
        *({'localizer': 'glance', 'tokens': tokens} for tokens in (49, 16)),
        {'mode': 'train', 'batch': 64, 'compiled': True},
        {'tokens': 49, 'compiled': True},
        *({'source': side, 'batch': 64} for side in sides),
        *({'model': model, 'batch': batch} for batch in (1, 64) for model in models),
        {'channels_last': True},
        {'dtype': 'float16'},
        {'dtype': 'float32', 'batch': 64},
        {'mode': 'train', 'batch': 64, 'tokens': 49, 'localizer': 'glance'},
        {'batch': 1, 'compiled': True},
        *({'model': model, 'tokens': n} for model, n in itertools.product(('apvit_tiny', 'apvit_base', *TWINS), few)),
        {'model': 'apvit_base', 'compiled': True},
    ]
    return [{**USUAL, **changes} for changes in differing]


def attempt(act: Callable[[], Any]) -> tuple[Any, str | None]:
    """What comes of it and None, or None and why nothing does; a failure must not cost the rest of the run."""
    try:
        return act(), None
    except NotHereError as reason:
        return None, f'not here: {reason}'
    except Exception as error:  # of any kind, as nobody saw this run before
        first = str(error).strip().partition('\n')[0]
        return None, f'{type(error).__name__}: {first}'
    finally:
        with contextlib.suppress(RuntimeError):  # which CUDA goes on to raise once it has failed
            torch.cuda.empty_cache()


def check(setting: Setting) -> Iterator[dict[str, Any]]:
    """Run all checks, and say what each found."""
    for name, act in CHECKS.items():
        result, reason = attempt(lambda act=act: act(setting))
        if result is None:
            outcome = {'check': name, 'holds': None if reason.startswith('not here') else False, 'reason': reason}
        else:
            figures = {'figure': result.figure, 'limit': result.limit, 'text': result.text}
            outcome = {'check': name, 'holds': result.figure <= result.limit, **figures}
            reason = f'{result.figure:.2g}, at most {result.limit:g} ({result.text})'
        say(f'{ {True: "ok", False: "FAILED", None: "skipped"}[outcome["holds"]]:<8}{name:<22}{reason}')
        yield outcome


def against_bound(device: str, batch: int, source: int, rounds: int) -> dict[str, Any]:
    """Time of the ways to sample, in shares of that of the bytes that must move."""
    sampling = Sampling(batch, 196, source, device)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda way=way: way(sampling) for name, way in WAYS.items() if name != 'expanded'
    }
    source_, target = (torch.ones(COPIED, device=device) for _ in range(2))
    calls['copy'] = lambda: target.copy_(source_)
    with torch.inference_mode():
        seconds = {name: statistics.median(own) for name, own in time_in_turns(calls, rounds, device).items()}
    bound = seconds.pop('copy') / (2 * 4 * COPIED) * sampling.bytes_to_move()
    for name, value in seconds.items():
        say(f'{name}, {batch} images of {source} px: {1000 * value:.2f} ms, {value / bound:.1f} x the bound')
    return {'batch': batch, 'source': source, **{name: value / bound for name, value in seconds.items()}}


def verdict(found: dict[str, Any], reduced: bool) -> str:
    """The last line: what holds, what does not, and what is not known."""
    outcomes: dict[str, bool | None] = {each['check']: each['holds'] for each in found['checks']}
    if not reduced:
        for name, (changes, limit) in TARGETS.items():
            wanted = {**USUAL, **changes}
            ratios = [row['to_full'][1] for row in found['rows'] if all(row[k] == v for k, v in wanted.items())]
            outcomes[f'{name} <= {limit} x the ViT'] = ratios[0] <= limit if ratios else None
        bounds = [
            each['package'] for each in found['sampler'][-1:]
        ]  # of the larger images: of small ones launches are all of the time
        outcomes[f'sampler <= {SAMPLER_TARGET:g} x its bound'] = bounds[0] <= SAMPLER_TARGET if bounds else None
    parts = []
    for text, state in (('hold', True), ('MISSED', False), ('not known', None)):
        names = [name for name, holds in outcomes.items() if holds is state]
        if names:
            parts.append(f'{len(names)} {text}' + ('' if state else f': {", ".join(names)}'))
    return f'Of {len(outcomes)} targets: {"; ".join(parts)}.'


def say(line: str) -> None:
    """At once, for who waits."""
    sys.stdout.write(f'{line}\n')
    sys.stdout.flush()


def main() -> int:
    """Check, measure, sum up; 1 if something is wrong or too slow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--minutes', type=number(float, 0), default=10.0, help='no case is begun after nine tenths of them')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--reduced', action='store_true', help='a tiny model, little of everything')
    add('--output', type=new_file, default=Path('gpu.json'))
    options = parser.parse_args()
    begin = time.perf_counter()
    device, cuda = options.device, options.device.startswith('cuda')
    reduced = options.reduced or not cuda
    rounds = 3 if reduced else 20
    name = torch.cuda.get_device_name(device) if cuda else 'the CPU'
    if cuda:
        torch.cuda.set_device(device)
    say(f'On {name}{", at reduced size" * reduced}.')
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # or it compares roundings
    setting = Setting(device, 'test_apvit', None) if reduced else Setting(device)
    found: dict[str, Any] = {'checks': [], 'rows': [], 'sampler': [], 'failed': [], 'no_time_for': []}

    def save() -> None:  # again and again, so that a run that is cut off leaves what it found
        facts = {'device': name, 'reduced': reduced, 'seconds': round(time.perf_counter() - begin)}
        write_report(options.output, torch.get_num_threads(), **facts, **found)

    for outcome in check(setting):
        found['checks'].append(outcome)
        save()
    for batch, source in [(2, 64)] if reduced else [(64, 224), (64, 1024)]:
        row, reason = attempt(lambda b=batch, s=source: against_bound(device, b, s, rounds))
        found['sampler' if row else 'failed'].append(row or {'sampler': [batch, source], 'reason': reason})
        save()
    for case in cases(reduced):
        if time.perf_counter() - begin > 54 * options.minutes:
            found['no_time_for'].append(case)
            continue
        row, reason = attempt(lambda case=case: measure(case, rounds, device))
        if row is None:
            say(f'FAILED {case}: {reason}')
            found['failed'].append({**case, 'reason': reason})
            continue
        row['images_per_second'] = {key: 1000 * case['batch'] / ms for key, ms in row['milliseconds'].items()}
        found['rows'].append(row)
        say(f'{shown(row)}  {row["images_per_second"]["ours"]:.0f} images/s')
        save()
    found['verdict'] = verdict(found, reduced)
    save()
    if found['no_time_for']:
        say(f'No time for {len(found["no_time_for"])} cases, which {options.output} names: --minutes gives more.')
    say(found['verdict'])
    return int('MISSED' in found['verdict'] or bool(found['failed']))


if __name__ == '__main__':
    sys.exit(main())
