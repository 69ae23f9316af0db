"""Saving models, and pushing them to the Hub, so that timm rebuilds them with every adaptive argument."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from timm import create_model
from timm.models import is_model, save_for_hf
from timm.models.eva import Eva
from torch import nn

from timm_apvit.hub.access import check_access, check_card, check_repo_id, explained, one_line
from timm_apvit.hub.card import PICTURE, CardDetails, model_card, with_origin
from timm_apvit.hub.labels import LabelNames, checked_label_names, saved_label_names
from timm_apvit.models.mixin import APViT, check_apvit
from timm_apvit.patching.transforms import other_bounds
from timm_apvit.pictures.images import per_channel

SAVED = ('model.safetensors', 'config.json')


def reconstruction_args(model: APViT) -> dict[str, Any]:
    """Arguments of ``create_model`` that rebuild a model as it is now, without its classes and its drop rates.

    Raises:
        ValueError: no registered entrypoint made the model, it was made with an argument that config.json cannot hold,
            or it was changed in a way that no argument rebuilds.
    """
    recorded: dict[str, Any] = {**getattr(model, '_model_args', {}), **model.adaptive_args()}
    rates = {k: v for k, v in recorded.items() if k.endswith('_rate')}
    args = {k: v for k, v in recorded.items() if k != 'num_classes' and k not in rates}
    for name, value in args.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError(f'expected arguments that config.json can hold, got {name}={value!r}') from None
    in_chans, img_size = model.patch_embed.patching.in_chans, list(model.patch_embed.img_size)
    args |= {'in_chans': in_chans, 'img_size': img_size, 'global_pool': model.global_pool, 'depth': len(model.blocks)}
    if isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity):
        args |= dict.fromkeys(
            ('use_post_transformer_norm', 'use_fc_norm') if isinstance(model, Eva) else ('final_norm',), False
        )
    _check_rebuilt(model, {**args, **rates, 'num_classes': model.num_classes})
    return args


def _check_rebuilt(model: APViT, args: dict[str, Any]) -> None:
    """Raise ValueError unless the registered entrypoint of a model makes the same one of some arguments."""
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    if not architecture or not is_model(architecture):
        raise ValueError(
            'expected a model that timm.create_model made, or adapt of such a one, got one of no registered name: what '
            'rebuilds it is not known'
        )
    try:
        with torch.device('meta'):
            rebuilt = create_model(architecture, **args)
    except Exception as error:
        raise ValueError(f'expected a model that {architecture} rebuilds, which fails: {one_line(error)}') from error
    pairs = [(repr(model).splitlines(), repr(rebuilt).splitlines())]
    pairs += [tuple([f'{k}: {tuple(v.shape)}' for k, v in each.state_dict().items()] for each in (model, rebuilt))]  # type: ignore[list-item]
    for now, then in pairs:
        differing = next(((a, b) for a, b in zip_longest(now, then, fillvalue='nothing') if a != b), None)
        if differing is not None:
            raise ValueError(
                f'expected a model that {architecture} rebuilds from its arguments, got one with '
                f'{differing[0].strip()!r} where that has {differing[1].strip()!r}; give create_model the arguments '
                'that make it so, or save weights alone, by safetensors'
            )


def save_pretrained(
    model: APViT,
    directory: str | os.PathLike[str],
    label_names: LabelNames | None = None,
    model_config: dict[str, Any] | None = None,
) -> None:
    """Save a model as ``model.safetensors`` and ``config.json``, which hold all that rebuilds it.

    ``timm.create_model('local-dir:DIRECTORY', pretrained=True)`` gives the model back, with the same logits and every
    adaptive argument, also after ``set_num_patches``, ``set_input_size`` and ``reset_classifier``. Each file appears
    whole or not at all.

    Args:
        model: an APViT.
        directory: made if it does not exist; files of the same names in it are replaced.
        label_names: of the classes, in order, or by number as transformers' ``id2label``; default: those that the
            model was loaded with, if it still has as many classes.
        model_config: further entries of config.json.

    Raises:
        ValueError: not an APViT, without weights, one that no registered entrypoint rebuilds from arguments that
            config.json can hold, or labels of other classes.
    """
    _check_model(model)
    config = {**({'base_model': model.base_model} if model.base_model else {}), **(model_config or {})}
    if label_names is not None:
        config['label_names'] = checked_label_names(label_names, model.num_classes)
    model_args = reconstruction_args(model)
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix='.saving-') as unfinished:
        try:
            save_for_hf(model, unfinished, model_config=config, model_args=model_args, safe_serialization=True)
        except RuntimeError as error:
            raise ValueError(f'expected weights that safetensors can hold: {one_line(error)}') from error
        _mend_config(Path(unfinished, 'config.json'), model.patch_embed.patching.in_chans, model.patch_embed.img_size)
        for name in SAVED:
            Path(unfinished, name).replace(target / name)


def _check_model(model: Any) -> None:
    """Raise ValueError unless a model can be saved."""
    check_apvit(model)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError('expected weights, got a model on the meta device')


def _mend_config(path: Path, in_chans: int, img_size: tuple[int, int]) -> None:
    """Mend what timm writes and others cannot read back, and the size that images are to have."""
    config = json.loads(path.read_text())
    # timm repeats num_classes here, and transformers then passes it twice; it also records all that it was given, and
    # so bounds of a family that the model had before.
    for name in ('num_classes', *other_bounds(config['model_args']['transform'])):
        config['model_args'].pop(name, None)
    pretrained_cfg = config['pretrained_cfg']
    pretrained_cfg['input_size'] = [in_chans, *img_size]
    for key in ('mean', 'std'):
        pretrained_cfg[key] = per_channel(pretrained_cfg[key], in_chans)
    pretrained_cfg.pop('test_input_size', None)
    if 'label_names' in config:
        pretrained_cfg.pop('label_names', None)
        pretrained_cfg.pop('label_descriptions', None)
    path.write_text(json.dumps(config, indent=2) + '\n')


class Pushed(NamedTuple):
    """What became of a push.

    Attributes:
        repo_id: ``'namespace/name'``, also where the namespace was left out.
        commit_url: page of the commit.
        oid: the commit, which is a revision: ``timm.create_model(f'hf-hub:{repo_id}@{oid}', pretrained=True)``.
        pr_url: page of the pull request, if it is one.
        wrote_card: whether README.md was written; else the repository has one, which was kept.
    """

    repo_id: str
    commit_url: str
    oid: str
    pr_url: str | None
    wrote_card: bool


def push_to_hub(
    model: APViT | str | os.PathLike[str],
    repo_id: str,
    *,
    label_names: LabelNames | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: bool | str | None = None,
    commit_message: str | None = None,
    overwrite_card: bool = False,
    card: CardDetails | None = None,
) -> Pushed:
    """Push a model to the Hub: safetensors, config.json and a model card, in one commit.

    ``timm.create_model('hf-hub:NAMESPACE/NAME', pretrained=True)``, after ``import timm_apvit``, gives the model back,
    with the same logits and every adaptive argument.

    Args:
        model: an APViT, or the folder that `save_pretrained` wrote, which has to prove that it loads.
        repo_id: ``'namespace/name'``, or a name in the namespace of the token's owner; made if it does not exist.
        label_names: as for `save_pretrained`; a folder has its own.
        private: whether a new repository is private; default: as huggingface_hub has it, public.
        revision: branch to push to, made if it does not exist, or pull request (``'refs/pr/1'``); with ``create_pr``
            the branch to merge into.
        create_pr: open a pull request rather than push.
        token: as huggingface_hub has it; default, or if empty: that of ``HF_TOKEN``, or of ``hf auth login``.
        commit_message: its first line.
        overwrite_card: replace a README.md that the repository has, and its picture, which goes if there is no new one.
        card: what the model card is to say that the model does not know.

    Raises:
        FileNotFoundError: the folder is not one that `save_pretrained` wrote.
        ValueError: not an APViT, labels of other classes, a malformed ``repo_id`` or ``revision``, metadata that the
            Hub refuses, or a repository that exists and is public where ``private`` is asked for.
        PermissionError: the Hub refuses the token.
        ConnectionError: the Hub cannot be reached, or does not take the files, after huggingface_hub's own retries.
    """
    check_repo_id(repo_id)
    if revision == '':
        raise ValueError("expected the name of a branch as revision, got ''")
    token = None if token == '' else token  # of a variable of the shell that is not set
    api = HfApi(token=token, library_name='timm-apvit')
    with _saved(model, label_names) as (model, folder):
        with _explained_push(repo_id, token, create_pr):
            if '/' not in repo_id:
                repo_id = f'{api.whoami()["name"]}/{repo_id}'
            details = with_origin(model, repo_id, card or CardDetails(), lambda: _base_on_hub(api, repo_id, revision))
        names = saved_label_names(folder, model.num_classes)
        # What a pull request brings is used from where it is merged.
        shown = None if create_pr or (revision or '').startswith('refs/') else revision
        text = model_card(model, repo_id, label_names=names, revision=shown, details=details)
        files: dict[str, Path | bytes] = {
            'model.safetensors': folder / 'model.safetensors',
            'config.json': _config_with_origin(folder, details),
        }
        with _explained_push(repo_id, token, create_pr):
            # What the Hub could refuse comes before the repository is made.
            check_card(text)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise ValueError(f'expected a repository that is new or private, got {repo_id!r}, which is public')
            if revision is not None and not create_pr and not revision.startswith('refs/'):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            writes_card = overwrite_card or not api.file_exists(repo_id, 'README.md', revision=revision)
            removed = []
            if writes_card:
                files['README.md'] = text.encode()
                if details.picture is not None:
                    files[PICTURE] = Path(details.picture)
                elif api.file_exists(repo_id, PICTURE, revision=revision):
                    removed = [CommitOperationDelete(PICTURE)]
            architecture = model.pretrained_cfg.get('architecture', 'APViT')
            commit = api.create_commit(
                repo_id,
                [*(CommitOperationAdd(name, source) for name, source in files.items()), *removed],
                commit_message=commit_message or f'Upload {architecture}, {model.num_patches} patches',
                revision=revision,
                create_pr=create_pr,
            )
    return Pushed(repo_id, commit.commit_url, commit.oid, commit.pr_url, writes_card)


@contextmanager
def _saved(model: APViT | str | os.PathLike[str], label_names: LabelNames | None) -> Iterator[tuple[APViT, Path]]:
    """A model and a folder that it is saved in, of which one is given."""
    if not isinstance(model, str | os.PathLike):
        with tempfile.TemporaryDirectory() as made:
            save_pretrained(model, made, label_names)
            yield model, Path(made)
        return
    if label_names is not None:
        raise ValueError(
            'expected label_names with a model alone, got them with a folder, whose config.json has its own'
        )
    folder = Path(model)
    for name in SAVED:
        if not (folder / name).is_file():
            raise FileNotFoundError(f'expected a folder that save_pretrained wrote, with {name}, got {str(folder)!r}')
    try:
        loaded = create_model(f'local-dir:{folder}', pretrained=True)
    # Files that are damaged, or of another model, fail in as many ways as there are formats.
    except Exception as error:
        raise ValueError(f'expected files that load, got {str(folder)!r}: {one_line(error)}') from error
    if not isinstance(loaded, APViT):
        raise ValueError(f'expected an APViT in {str(folder)!r}, got {type(loaded).__name__}')
    yield loaded, folder


@contextmanager
def _explained_push(repo_id: str, token: bool | str | None, create_pr: bool) -> Iterator[None]:
    """Say what went wrong on the way to the Hub and, if it refused us, whether the token is for other repositories."""
    try:
        with explained(repo_id, token):
            yield
    except PermissionError:
        if not create_pr:  # everyone may open a pull request
            with suppress(ConnectionError):
                check_access(repo_id, token)
        raise


def _base_on_hub(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """The source weights that a repository names for the model that it has."""
    for at in dict.fromkeys((revision, None)):
        if api.file_exists(repo_id, 'config.json', revision=at):
            config = json.loads(Path(api.hf_hub_download(repo_id, 'config.json', revision=at)).read_text())
            base: str | None = config.get('base_model')
            return None if base == repo_id else base
    return None


def _config_with_origin(folder: Path, details: CardDetails) -> bytes:
    """A saved config.json with the source weights, and the license, that the card has."""
    config = json.loads((folder / 'config.json').read_text())
    for place, name, value in (
        (config, 'base_model', details.base_model),
        (config['pretrained_cfg'], 'license', details.license),
    ):
        place.pop(name, None)
        if value is not None:
            place[name] = value
    return (json.dumps(config, indent=2) + '\n').encode()
