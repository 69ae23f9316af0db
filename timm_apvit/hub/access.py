"""Access to the Hub: what a repository may be called, who may write to it, and errors that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.utils import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, validate_repo_id

from timm_apvit.failures import one_line


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless a repository can have this name."""
    if not isinstance(repo_id, str) or not repo_id:
        raise ValueError(f'expected a repository as NAMESPACE/NAME, got {repo_id!r}')
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f'expected a repository as NAMESPACE/NAME, got {repo_id!r}: {one_line(error)}') from None


def check_card(text: str) -> None:
    """Raise ValueError if the Hub, which is asked, would refuse the metadata of a model card."""
    try:
        ModelCard(text).validate()
    except ValueError as error:
        raise ValueError(
            f'expected a model card that the Hub takes, got one of which it says: {one_line(error)}'
        ) from None


def check_access(repo_id: str, token: bool | str | None = None) -> None:
    """Ask the Hub, without writing, whether a token may write where a repository is to be.

    Raises:
        ValueError: a malformed ``repo_id``.
        PermissionError: there is no token, or it may not write there.
        ConnectionError: the Hub does not answer.
    """
    check_repo_id(repo_id)
    with explained(repo_id, token):
        user = HfApi(token=token).whoami()
    access = (user.get('auth') or {}).get('accessToken') or {}
    if access.get('role') == 'read':
        raise PermissionError(f'expected a token that may write to {repo_id}, got one that may only read')
    namespaces = [user['name'], *(each['name'] for each in user.get('orgs') or [])]
    namespace = repo_id.partition('/')[0] if '/' in repo_id else user['name']
    if namespace not in namespaces:
        raise PermissionError(f'expected a repository of {" or ".join(namespaces)}, whose token it is, got {repo_id!r}')


@contextmanager
def explained(repo_id: str, token: bool | str | None = None) -> Iterator[None]:
    """Say what went wrong between us and the Hub, in a line that says what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            raise  # bad input: it says so itself
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        answer = next((each.response for each in chain if isinstance(each, HfHubHTTPError)), None)
        refused = answer is not None and answer.status_code in (401, 403)
        if refused or isinstance(error, LocalTokenNotFoundError):
            has_token = refused and (isinstance(token, str) or get_token() is not None)
            got = f'one that it refuses: {one_line(error)}' if has_token else 'none'
            raise PermissionError(
                f'expected a token that lets us write to {repo_id} on the Hub, got {got}; log in with hf auth login '
                'or set HF_TOKEN'
            ) from error
        if answer is not None:
            raise ConnectionError(f'the Hub did not take {repo_id}: {one_line(error)}') from error
        raise ConnectionError(f'cannot reach the Hub for {repo_id}: {one_line(chain[-1])}') from error
