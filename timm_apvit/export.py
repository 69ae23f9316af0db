"""Export to ONNX, a program of torch.export or a compiled package, each checked against the model that it is of."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_apvit.failures import one_line, require
from timm_apvit.files import AnyPath, check_writable, replacing
from timm_apvit.hub.labels import own_label_names
from timm_apvit.models.mixin import APViT, check_apvit
from timm_apvit.pictures.images import image_config

FORMATS = {'onnx': '.onnx', 'torch': '.pt2', 'aoti': '.pt2'}  # the first of an ending is its default
OPSET = 20
OLDEST_OPSET = 18
BATCH_SIZES = (1, 2, 5)  # that an export is checked on
METADATA = 'images.json'  # of the images that a program of torch.export takes
TOLERANCE = 1e-4  # of the outputs, or of the largest of them if that is above 1


class Exported(NamedTuple):
    """What an export is, and how near to its model.

    Attributes:
        path: of the file.
        format: a key of `FORMATS`.
        output: ``'logits'``, or ``'features'`` of a model without a classifier.
        img_size: ``(h, w)`` of the images that it takes.
        difference: largest absolute difference from the model's own outputs.
        largest: of these outputs, in magnitude.
    """

    path: Path
    format: str
    output: str
    img_size: tuple[int, int]
    difference: float
    largest: float

    def __str__(self) -> str:
        """What was measured, in a sentence."""
        *most, last = BATCH_SIZES
        batches = f'batches of {", ".join(map(str, most))} and {last} images'
        return (
            f'The largest difference from the {self.output} of the model is {self.difference:.1e}, on {batches} whose '
            f'{self.output} are up to {self.largest:.2g}.'
        )


def export_model(
    model: APViT,
    path: AnyPath,
    format: str | None = None,
    *,
    img_size: tuple[int, int] | None = None,
    opset: int = OPSET,
    overwrite: bool = False,
) -> Exported:
    """Export a model as it is in eval mode: images ``(B, C, H, W)``, B free -> what it returns for them, in float32.

    The file runs without this package, on the CPU, and says what images it takes (`image_facts`): as properties of an
    ONNX model, in JSON, or as the extra file ``images.json`` of a program. It is read again and compared with the model
    on batches of several sizes before it takes its name, so that what is there is whole and was checked.

    Args:
        model: stays as it is.
        path: ending in .onnx or .pt2.
        format: ``'onnx'``; ``'torch'``, for ``torch.export.load``; or ``'aoti'``, machine code for processors like this
            one and ``torch._inductor.aoti_load_package``, which takes a C++ compiler and a minute. Default: by the
            ending, ``'torch'`` for .pt2.
        img_size: ``(h, w)`` of the images, all of one size: how coarsely they are read follows it. Default: the model's
            own.
        opset: of ONNX, at least 18: older ones know no resize with anti-aliasing.
        overwrite: replace a file that is there.

    Raises:
        ValueError: not an APViT, or an argument does not fit the model or the others.
        FileExistsError, FileNotFoundError, PermissionError: the file cannot be written.
        ModuleNotFoundError: the extra ``export`` is not installed.
        RuntimeError: it cannot be exported, or gives another output than the model.
    """
    check_apvit(model)
    path = Path(path)
    check_writable(path, overwrite)
    chosen = checked_format(path, format, opset)
    model = deepcopy(model).eval().to('cpu', torch.float32)
    size = img_size or (model.patch_embed.img_size[0], model.patch_embed.img_size[1])
    with replacing(path) as unfinished, _quiet():
        try:
            _write(model, unfinished, chosen, size, opset)
            difference, largest = _compared(model, _read(unfinished, chosen), size)
        except OSError:
            raise
        except Exception as error:  # of the exporters, each of which has its own
            raise RuntimeError(f'cannot export to {chosen}: {one_line(error)}') from error
        exported = Exported(path, chosen, _output(model), size, difference, largest)
        if not difference <= TOLERANCE * max(1.0, largest):  # nor where it is not a number
            raise RuntimeError(f'expected the output of the model within {TOLERANCE:g}. {exported}')
    return exported


def checked_format(path: AnyPath, format: str | None, opset: int) -> str:
    """The format of a file, by its ending if none is asked for.

    Raises:
        ValueError: an unknown format, ending or opset, or an ending of another format.
        ModuleNotFoundError: what writes or checks it is not installed.
    """
    ending = Path(path).suffix.lower()
    if format is None:
        format = next((name for name, known in FORMATS.items() if known == ending), None)
        if format is None:
            raise ValueError(f'expected a file that ends in .onnx or .pt2, got {str(path)!r}')
    if format not in FORMATS:
        raise ValueError(f'expected a format among {", ".join(FORMATS)}, got {format!r}')
    if ending != FORMATS[format]:
        raise ValueError(f'expected a file that ends in {FORMATS[format]} for the format {format}, got {str(path)!r}')
    if format == 'onnx':
        if opset < OLDEST_OPSET:
            raise ValueError(f'expected an opset >= {OLDEST_OPSET}, got {opset}')
        for module in ('onnx', 'onnxscript', 'onnxruntime'):
            require(module, 'export to ONNX', "'timm-apvit[export]'")
    return format


def _images(model: APViT, batch: int, size: tuple[int, int]) -> Tensor:
    """Images ``(B, C, H, W)``, the same each time: coarse structure, which moves patches, and noise."""
    generator = torch.Generator().manual_seed(batch)
    channels = model.patch_embed.patching.in_chans
    coarse = torch.randn(batch, channels, 8, 8, generator=generator)
    fine = torch.randn(batch, channels, *size, generator=generator)
    return F.interpolate(coarse, size=size, mode='bilinear') + fine / 2


def _write(model: APViT, path: Path, format: str, size: tuple[int, int], opset: int) -> None:
    """Trace a model and write it in a format."""
    free = ({0: torch.export.Dim('batch')},)
    program = torch.export.export(model, (_images(model, 2, size),), dynamic_shapes=free)
    facts = image_facts(model, size)
    if format == 'torch':
        torch.export.save(program, path, extra_files={METADATA: json.dumps(facts)})
    elif format == 'aoti':
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    else:
        onnx: Any = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=['image'],
            output_names=[_output(model)],
            dynamic_shapes=free,  # for its name
            verbose=False,
        )
        onnx.model.metadata_props.update({key: json.dumps(value) for key, value in facts.items()})
        onnx.save(path, external_data=False)


def image_facts(model: APViT, size: tuple[int, int]) -> dict[str, Any]:
    """What the file says of the images that it takes, and of what it gives."""
    config = image_config(model)
    facts = {'img_size': size, 'mean': config['mean'], 'std': config['std'], 'interpolation': config['interpolation']}
    names = own_label_names(model)
    return {**facts, 'crop_pct': config['crop_pct'], **({} if names is None else {'label_names': names})}


def _read(path: Path, format: str) -> Callable[[Tensor], Tensor]:
    """Read an exported model, to run it on images ``(B, C, H, W)``."""
    if format == 'torch':
        return torch.export.load(path).module()
    if format == 'aoti':
        compiled: Callable[[Tensor], Tensor] = torch._inductor.aoti_load_package(str(path))
        return compiled
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return lambda image: torch.from_numpy(session.run(None, {'image': image.numpy()})[0])


@torch.no_grad()
def _compared(model: APViT, run: Callable[[Tensor], Tensor], size: tuple[int, int]) -> tuple[float, float]:
    """Largest difference between the outputs of a model and of its export, and the largest of these outputs."""
    differences, largest = [], []
    for batch in BATCH_SIZES:
        image = _images(model, batch, size)
        expected = model(image)
        differences.append((run(image) - expected).abs().max())
        largest.append(expected.abs().max())
    return torch.stack(differences).max().item(), torch.stack(largest).max().item()


def _output(model: APViT) -> str:
    """What a model returns."""
    return 'logits' if model.num_classes else 'features'


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' warnings, of their own insides, from the reader; what fails is an error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)
