"""Curves of accuracy against images seen."""

import statistics
from pathlib import Path
from typing import Any


def draw_curves(groups: dict[tuple[int, str, str], list[dict[str, Any]]], path: Path, together: bool) -> None:
    """Accuracy against images seen, the mean over the seeds: a panel for each number of patches, or one for all."""
    from matplotlib.figure import Figure

    budgets = [None] if together else sorted({key[0] for key in groups})
    figure = Figure(figsize=(6.5 if together else 4 * len(budgets), 3.6), layout='constrained')
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for panel, budget in zip(panels, budgets, strict=True):
        for key, runs in groups.items():
            if budget in (None, key[0]):
                mean = [statistics.mean(values) for values in zip(*(each['curve'] for each in runs), strict=True)]
                thousands = [seen / 1000 for seen in runs[0]['images_seen']]
                label = ' '.join(filter(None, key[1:]))
                cost = runs[0]['multiply_adds'] / 1e9
                panel.plot(thousands, mean, label=f'{label} {key[0]}: {cost:.1f} G' if together else label)
        panel.set(title='' if together else f'{budget} patches', xlabel='thousands of images seen')
        beside = {'title': 'patches: multiply-adds', 'loc': 'center left', 'bbox_to_anchor': (1, 0.5)}
        panel.legend(fontsize=7, **(beside if together else {}))
    panels[0].set_ylabel('top-1 on the test set')
    figure.savefig(path, dpi=90)
