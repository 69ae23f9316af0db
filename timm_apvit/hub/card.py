"""Model cards: what a model on the Hub is, how to use it, what it is worth, and where it ends."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData

from timm_apvit.hub.labels import is_multi_label
from timm_apvit.models.mixin import APViT, crowds
from timm_apvit.results import check_results, results_table

TAGS = ('timm', 'apvit')
PICTURE = 'patches.png'
MOST_LABELS = 20
# The metrics of the Hub's index, and what we call them, by their keys in a row of results.
HUB_METRICS = {
    'top1': ('accuracy', 'top-1 accuracy'),
    'top5': ('accuracy', 'top-5 accuracy'),
    'map': ('mean_average_precision', 'mean average precision'),
}


@dataclass(frozen=True)
class CardDetails:
    """What a model card says that the model itself does not know.

    Args:
        base_model: repository on the Hub of the weights that the training started from, such as
            ``'timm/vit_small_patch16_224.augreg_in21k_ft_in1k'``; default: where ``pretrained=True`` took them from.
        license: identifier of a license that the Hub knows, such as ``'apache-2.0'``; default: that of the source
            weights, if they are known.
        datasets: on the Hub, that the model was trained on, such as ``('uoft-cs/cifar10',)``.
        results: what ``python -m timm_apvit evaluate --json`` wrote: its ``rows`` have at least ``budget``,
            ``num_patches`` and ``top1``. A ``note`` says how they came about.
        results_dataset: what the results were measured on, as identifier and name.
        training: configuration of the training, as YAML.
        picture: a PNG file that shows where the model looks.
    """

    base_model: str | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    results: Mapping[str, Any] | None = None
    results_dataset: tuple[str, str] = ('imagefolder', 'unnamed test data')
    training: str | None = None
    picture: Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.datasets, str):
            raise ValueError(f'expected a sequence of datasets, got the string {self.datasets!r}')
        if self.results is not None:
            check_results(self.results)
        if self.picture is not None and not Path(self.picture).is_file():
            raise FileNotFoundError(f'expected a picture, got {str(self.picture)!r}, which is not a file')


def model_card(
    model: APViT,
    repo_id: str,
    *,
    label_names: Sequence[str] | None = None,
    revision: str | None = None,
    details: CardDetails | None = None,
) -> str:
    """The text of a README.md for a model on the Hub, with its front matter.

    Args:
        model: with the weights that are pushed.
        repo_id: ``'namespace/name'``.
        label_names: of its classes, in order.
        revision: that it is pushed to, if not the default.
        details: what the model does not know of itself.
    """
    details = with_origin(model, repo_id, details or CardDetails())
    base = details.base_model
    name = f'hf-hub:{repo_id}' + (f'@{revision}' if revision else '')
    sections = [
        f'# {repo_id.partition("/")[2] or repo_id}',
        _introduction(model, label_names, base),
        '## Use\n\n' + _usage(model, name, label_names),
        '## Model\n\n' + _facts(model),
    ]
    if details.results is not None:
        sections.append('## Accuracy and speed\n\n' + results_table(details.results, details.results_dataset[1]))
    if details.picture is not None:
        sections.append(
            f'## Where it looks\n\n![Images, and the outlines of the patches that the model reads]({PICTURE})\n\n'
            'Each image, and what its patches cover.'
        )
    if details.training is not None:
        sections.append(
            '## Training\n\n`python -m timm_apvit finetune` with\n\n' + _fenced(details.training.strip(), 'yaml')
        )
    sections.append('## Limits\n\n' + _limits(model, base, details))
    front = _front_matter(model, repo_id, details).to_yaml()
    return f'---\n{front}\n---\n\n' + '\n\n'.join(sections) + '\n'


def _front_matter(model: APViT, repo_id: str, details: CardDetails) -> ModelCardData:
    """The metadata that the Hub reads."""
    task = 'image-classification' if model.num_classes else 'image-feature-extraction'
    data: dict[str, Any] = {
        'library_name': 'timm',
        'pipeline_tag': task,
        'tags': [task, *TAGS],
        'license': details.license,
        'datasets': list(details.datasets) or None,
    }
    if details.base_model:
        data |= {'base_model': details.base_model, 'base_model_relation': 'finetune'}
    if details.results is not None:
        found = [result for row in details.results['rows'] for result in _metrics(row, details)]
        data |= {'model_name': repo_id.partition('/')[2] or repo_id, 'eval_results': found}
        data['metrics'] = sorted({result.metric_type for result in found})
    return ModelCardData(**{key: value for key, value in data.items() if value is not None})


def _metrics(row: Mapping[str, Any], details: CardDetails) -> list[EvalResult]:
    """The metrics of a row, as the Hub's model index has them."""
    kind, name = details.results_dataset
    return [
        EvalResult(
            task_type='image-classification',
            dataset_type=kind,
            dataset_name=name,
            metric_type=kind_of_metric,
            metric_name=f'{title} at {row["budget"]} patches',
            metric_value=round(float(row[key]), 5),
            metric_args={'num_patches': row['num_patches']},
        )
        for key, (kind_of_metric, title) in HUB_METRICS.items()
        if key in row
    ]


def with_origin(
    model: APViT, repo_id: str, details: CardDetails, base_of_repository: Callable[[], str | None] = lambda: None
) -> CardDetails:
    """Details with the source weights and their license, where none are given and they are known.

    A repository is not the source of its own next version: that has the source of the last one, ``base_of_repository``.
    """
    base = details.base_model or model.base_model
    if base == repo_id:
        base = base_of_repository()
    return replace(details, base_model=base, license=details.license or _license(model, base, details))


def _license(model: APViT, base: str | None, details: CardDetails) -> str | None:
    """The license of source weights: as timm has it, or as it came with those that the model was pulled with."""
    for name in timm.list_pretrained('*apvit*') if base else ():
        cfg = timm.get_pretrained_cfg(name)
        if cfg.hf_hub_id == base:
            return str(cfg.license) if cfg.license else None
    was_pulled = model.base_model is not None and details.base_model in (None, model.base_model)
    own = model.pretrained_cfg.get('license') if was_pulled else None
    return str(own) if own else None


def _introduction(model: APViT, label_names: Sequence[str] | None, base: str | None) -> str:
    """What the model is, in a paragraph."""
    what = 'gives features of an image' if not model.num_classes else f'tells {model.num_classes} classes apart'
    text = (
        f'A Vision Transformer on {model.num_patches} adaptive patches: where they lie depends on the image. It {what} '
        f'and runs on [timm](https://github.com/huggingface/pytorch-image-models) with the plugin `timm-apvit`.'
    )
    if base:
        text += f' Its training started from the weights of [{base}](https://huggingface.co/{base}).'
    if label_names:
        shown = ', '.join(_code(str(label)) for label in label_names[:MOST_LABELS])
        rest = len(label_names) - MOST_LABELS
        text += f'\n\nClasses: {shown}' + (f' and {rest} more, in `config.json`.' if rest > 0 else '.')
    return text


def _usage(model: APViT, name: str, label_names: Sequence[str] | None) -> str:
    """A snippet that runs as it stands, given an image."""
    mode = {1: 'L', 3: 'RGB'}.get(model.patch_embed.patching.in_chans)
    lines = ['import timm', 'import torch']
    if mode:
        lines.append('from PIL import Image')
    lines += [
        '',
        'import timm_apvit  # makes the model known to timm',
        '',
        f"model = timm.create_model('{name}', pretrained=True).eval()",
    ]
    if mode:
        lines += [
            'transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model), is_training=False)',
            f"image = transform(Image.open('image.jpg').convert('{mode}'))[None]",
        ]
    else:
        shape = (1, model.patch_embed.patching.in_chans, *model.patch_embed.img_size)
        lines.append(f'image = torch.randn{shape}  # normalised as in training')
    lines.append('with torch.inference_mode():')
    if model.num_classes:
        several = is_multi_label(model)
        lines.append(f'    probabilities = model(image).{"sigmoid()" if several else "softmax(-1)"}[0]')
        best = '(probabilities > 0.5).nonzero().flatten().tolist()' if several else 'probabilities.argmax().item()'
        if label_names:
            names = "model.pretrained_cfg['label_names']"
            best = f'[{names}[n] for n in {best}]' if several else f'{names}[{best}]'
        lines.append(f'print({best})')
    else:
        lines.append('    features = model(image)')
    lines.append('')
    if not crowds(model):
        lines.append(
            f'model.set_num_patches({max(1, model.num_patches // 2)})  # or any other number, of the same weights'
        )
    lines.append('geometry = model.patch_geometry(image)  # where the patches lie')
    return _fenced('pip install timm-apvit', 'sh') + '\n\n' + _fenced('\n'.join(lines), 'python')


def _facts(model: APViT) -> str:
    """A table of what the model is made of."""
    height, width = model.patch_embed.img_size
    arguments = {key: value for key, value in model.adaptive_args().items() if key != 'num_patches'}
    rows = [
        ('architecture', _code(str(model.pretrained_cfg.get('architecture', 'APViT')))),
        ('parameters', f'{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M'),
        ('patches', f'{model.num_patches}, or any other {"even grid" if crowds(model) else "number"}'),
        ('image', f'{height} x {width} pixels, {model.patch_embed.patching.in_chans} channels'),
        *((_code(key), _code(str(value))) for key, value in arguments.items()),
    ]
    return '\n'.join(['| | |', '|---|---|', *(f'| {key} | {value} |' for key, value in rows)])


def _limits(model: APViT, base: str | None, details: CardDetails) -> str:
    """What the model cannot be relied on for."""
    limits = [
        f'Trained for {model.num_patches} patches and images of {model.patch_embed.img_size[0]} x '
        f'{model.patch_embed.img_size[1]} pixels, unless the training configuration says more; others work, with an '
        'accuracy of their own: measure it.',
        'An object that no patch sees at first may be missed; the fewer the patches, the likelier.',
        'timm finds the model only after `import timm_apvit`.',
    ]
    if details.results is None:
        limits.append('No accuracy was measured for this card.')
    elif model.num_classes:
        limits.append('The accuracy is that on images like those it was measured on; others may do worse.')
    if base:
        limits.append(f'The biases and the license of [{base}](https://huggingface.co/{base}) come with its weights.')
    return '\n'.join(f'- {limit}' for limit in limits)


def _code(text: str) -> str:
    """Text as inline code in Markdown."""
    return '`' + ' '.join(text.replace('`', "'").split()) + '`'


def _fenced(text: str, language: str) -> str:
    """Text as a block of code in Markdown, whatever it holds."""
    fence = '```'
    while fence in text:
        fence += '`'
    return f'{fence}{language}\n{text}\n{fence}'
