"""Pushing models to the Hub, with a model card."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from timm import create_model

from timm_apvit.failures import one_line
from timm_apvit.hub.access import check_access, check_card, check_repo_id, explained
from timm_apvit.hub.card import PICTURE, CardDetails, model_card, with_origin
from timm_apvit.hub.labels import LabelNames, saved_label_names
from timm_apvit.hub.saving import SAVED, save_pretrained
from timm_apvit.models.mixin import APViT


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
