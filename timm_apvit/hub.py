"""Saving models, and pushing them to the Hub, so that timm rebuilds them with every adaptive argument."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from huggingface_hub import CommitOperationAdd, HfApi
from timm import create_model
from timm.models._hub import save_for_hf
from torch import nn

from timm_apvit.card import PICTURE, CardDetails, model_card
from timm_apvit.hub_access import check_repo_id, explained, one_line
from timm_apvit.vision_transformer import APViT

SAVED = ('model.safetensors', 'config.json')


def reconstruction_args(model: APViT) -> dict[str, Any]:
    """Arguments of ``create_model`` that rebuild a model as it is now, without its classes and its drop rates.

    Raises:
        ValueError: the model was made with an argument that config.json cannot hold.
    """
    recorded = {**model._model_args, **model.adaptive_args()}
    args = {k: v for k, v in recorded.items() if k != 'num_classes' and not k.endswith('_rate')}
    for name, value in args.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ValueError(f'expected arguments that config.json can hold, got {name}={value!r}') from None
    in_chans, img_size = model.patch_embed.patching.in_chans, list(model.patch_embed.img_size)
    now = {'in_chans': in_chans, 'img_size': img_size, 'global_pool': model.global_pool, 'depth': len(model.blocks)}
    if isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity):
        now['final_norm'] = False
    return {**args, **now}


def save_pretrained(
    model: APViT,
    directory: Union[str, os.PathLike[str]],
    label_names: Optional[list[str]] = None,
    model_config: Optional[dict[str, Any]] = None,
) -> None:
    """Save a model as ``model.safetensors`` and ``config.json``, which hold all that rebuilds it.

    ``timm.create_model('local-dir:DIRECTORY', pretrained=True)`` gives the model back, with the same logits and every
    adaptive argument, also after ``set_num_patches``, ``set_input_size`` and ``reset_classifier``. Use this rather
    than timm's own functions, which lose the number of patches before timm 1.0.31. Each file appears whole or not at
    all.

    Args:
        model: an APViT.
        directory: made if it does not exist; files of the same names in it are replaced.
        label_names: of the classes, in order.
        model_config: further entries of config.json.

    Raises:
        ValueError: not an APViT, made with an argument that config.json cannot hold, or labels of other classes.
    """
    if not isinstance(model, APViT):
        raise ValueError(f'expected an APViT, got {type(model).__name__}')
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f'expected names of {model.num_classes} classes, got {len(label_names)}')
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    config = {**({'base_model': model.base_model} if model.base_model else {}), **(model_config or {})}
    if label_names:
        config['label_names'] = list(label_names)
    with tempfile.TemporaryDirectory(dir=target, prefix='.saving-') as unfinished:
        save_for_hf(
            model, unfinished, model_config=config, model_args=reconstruction_args(model), safe_serialization=True
        )
        _mend_config(Path(unfinished, 'config.json'), model.patch_embed.patching.in_chans, model.patch_embed.img_size)
        for name in SAVED:
            Path(unfinished, name).replace(target / name)


def _mend_config(path: Path, in_chans: int, img_size: tuple[int, int]) -> None:
    """Mend what some releases of timm write and cannot read back, and the size that images are to have."""
    config = json.loads(path.read_text())
    # timm 1.0.31 repeats num_classes here, and transformers then passes it twice.
    config['model_args'].pop('num_classes', None)
    pretrained_cfg = config['pretrained_cfg']
    pretrained_cfg['input_size'] = [in_chans, *img_size]
    pretrained_cfg.pop('test_input_size', None)
    known = pretrained_cfg.get('label_names')
    if 'label_names' in config or (known is not None and len(known) != config['num_classes']):
        # timm < 1.0.31 keeps the labels of the classes that the model had before.
        pretrained_cfg.pop('label_names', None)
        pretrained_cfg.pop('label_descriptions', None)
    if in_chans != 3:
        # timm < 1.0.31 takes any first convolution for one of 3 channels and drops weights that it cannot convert.
        pretrained_cfg['first_conv'] = None
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
    model: APViT,
    repo_id: str,
    *,
    label_names: Optional[list[str]] = None,
    private: Optional[bool] = None,
    revision: Optional[str] = None,
    create_pr: bool = False,
    token: Union[bool, str, None] = None,
    commit_message: Optional[str] = None,
    overwrite_card: bool = False,
    card: Optional[CardDetails] = None,
) -> Pushed:
    """Push a model to the Hub: safetensors, config.json and a model card, in one commit.

    ``timm.create_model('hf-hub:NAMESPACE/NAME', pretrained=True)``, after ``import timm_apvit``, gives the model back,
    with the same logits and every adaptive argument.

    Args:
        model: an APViT.
        repo_id: ``'namespace/name'``, or a name in the namespace of the token's owner; made if it does not exist.
        label_names: of the classes, in order; default: those that the model was loaded with.
        private: whether a new repository is private; default: as huggingface_hub has it, public.
        revision: branch to push to, made if it does not exist, or pull request (``'refs/pr/1'``); with ``create_pr``
            the branch to merge into.
        create_pr: open a pull request rather than push.
        token: as huggingface_hub has it; default: that of ``HF_TOKEN``, or of ``hf auth login``.
        commit_message: its first line.
        overwrite_card: replace a README.md that the repository has.
        card: what the model card is to say that the model does not know.

    Raises:
        ValueError: not an APViT, a malformed ``repo_id``, metadata that the Hub refuses, or a repository that exists
            and is public where ``private`` is asked for.
        PermissionError: the Hub refuses the token.
        ConnectionError: the Hub cannot be reached, or does not take the files, after huggingface_hub's own retries.
    """
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, label_names)
        return _push_saved(
            model,
            Path(folder),
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            token=token,
            commit_message=commit_message,
            overwrite_card=overwrite_card,
            card=card,
        )


def push_folder(directory: Union[str, os.PathLike[str]], repo_id: str, **options: Any) -> Pushed:
    """Push what `save_pretrained` wrote, as it is, once it has proved to load.

    Args:
        directory: with ``model.safetensors`` and ``config.json``.
        repo_id: as for `push_to_hub`.
        options: those of `push_to_hub`, but for the labels, which ``config.json`` has.

    Raises:
        FileNotFoundError: the files are not there.
        ValueError: they do not make an APViT, or as for `push_to_hub`.
        OSError: as for `push_to_hub`.
    """
    check_repo_id(repo_id)
    folder = Path(directory)
    for name in SAVED:
        if not (folder / name).is_file():
            raise FileNotFoundError(f'expected a folder that save_pretrained wrote, with {name}, got {str(folder)!r}')
    try:
        model = create_model(f'local-dir:{folder}', pretrained=True)
    # Files that are damaged, or of another model, fail in as many ways as there are formats.
    except Exception as error:
        raise ValueError(f'expected files that load, got {str(folder)!r}: {one_line(error)}') from error
    if not isinstance(model, APViT):
        raise ValueError(f'expected an APViT in {str(folder)!r}, got {type(model).__name__}')
    return _push_saved(model, folder, repo_id, **options)


def _push_saved(
    model: APViT,
    folder: Path,
    repo_id: str,
    *,
    private: Optional[bool] = None,
    revision: Optional[str] = None,
    create_pr: bool = False,
    token: Union[bool, str, None] = None,
    commit_message: Optional[str] = None,
    overwrite_card: bool = False,
    card: Optional[CardDetails] = None,
) -> Pushed:
    """Push the saved files of a model and its card in one commit."""
    details = card or CardDetails()
    api = HfApi(token=token, library_name='timm-apvit')
    message = (
        commit_message or f'Upload {model.pretrained_cfg.get("architecture", "APViT")}, {model.num_patches} patches'
    )
    with explained(repo_id, token):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(f'expected a repository that is new or private, got {repo_id!r}, which is public')
        if revision is not None and not create_pr and not revision.startswith('refs/'):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files: dict[str, Union[Path, bytes]] = {name: folder / name for name in SAVED}
        writes_card = overwrite_card or not api.file_exists(repo_id, 'README.md', revision=revision)
        if writes_card:
            shown = None if create_pr else revision
            names = _label_names(folder)
            text = model_card(model, repo_id, label_names=names, revision=shown, details=details)
            files['README.md'] = text.encode()
            if details.picture is not None:
                files[PICTURE] = Path(details.picture)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, source) for name, source in files.items()],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
    return Pushed(repo_id, commit.commit_url, commit.oid, commit.pr_url, writes_card)


def _label_names(folder: Path) -> Optional[list[str]]:
    """The names of the classes that a saved model has, in order."""
    config = json.loads((folder / 'config.json').read_text())
    names = config.get('label_names') or config['pretrained_cfg'].get('label_names')
    return list(names.values()) if isinstance(names, dict) else names
