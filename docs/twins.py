"""Write docs/twins.md anew: which ViTs of timm have an adaptive twin, and which have none, from timm's registry."""

from pathlib import Path

import timm
from timm.models import get_arch_pretrained_cfgs

import timm_apvit
from timm_apvit.models.apvit import MODULES, WITHOUT

PAGE = Path(__file__).with_suffix('.md')


def page() -> str:
    """The page for the installed timm."""
    vits = timm.list_models(module=[module.__name__.rpartition('.')[2] for module in MODULES])
    rows: list[str] = []
    tags = 0
    for vit in vits:
        named = [name.partition('.')[2] for name, cfg in get_arch_pretrained_cfgs(vit).items() if cfg.has_weights]
        rows.append(f'| `{vit}` | `{timm_apvit.twin_name(vit)}` | {", ".join(named) or "none"} |')
        tags += len(named)
    without = [
        f'| `timm.models.{module}` | {len(timm.list_models(module=module))} | {why.partition(";")[0]} |'
        for module, why in WITHOUT.items()
        if not module.startswith('_')
    ]
    return '\n'.join(
        [
            '# Which models of timm have an adaptive twin',
            '',
            f'timm {timm.__version__}: {len(vits)} ViTs have a twin, with {tags} pretrained tags. The name follows '
            "from the ViT's: a leading `vit_` becomes `apvit_`, other names get it in front; tags are the ViT's own. "
            '`timm_apvit.twin_name` and `timm_apvit.vit_name` go from one to the other. '
            'Written by `python docs/twins.py`.',
            '',
            '| ViT | twin | pretrained tags |',
            '|---|---|---|',
            *rows,
            '',
            'Without a twin are what `twin_name` refuses, saying what to take instead:',
            '',
            '| models of | how many | why |',
            '|---|---|---|',
            *without,
            '',
        ]
    )


if __name__ == '__main__':
    PAGE.write_text(page())
