"""Names of repositories, and errors of the Hub in words that say what to do."""

import pytest
from conftest import create

import timm_apvit
from timm_apvit.hub.access import check_repo_id, explained


@pytest.mark.parametrize('repo_id', ['a/b/c', 'a--b', 'me/', '/model', '', 'me/mod el', 'hf-hub:me/model', 'x' * 97])
def test_rejects_malformed_repository_before_anything_is_sent(repo_id, tmp_path):
    for act in (check_repo_id, lambda name: timm_apvit.push_to_hub(create(), name)):
        with pytest.raises(ValueError, match='expected a repository as NAMESPACE/NAME, got'):
            act(repo_id)
    with pytest.raises(ValueError, match='expected a repository as NAMESPACE/NAME, got'):
        timm_apvit.push_to_hub(tmp_path, repo_id)


def test_rejects_no_name_and_no_branch_as_they_are_given():
    with pytest.raises(ValueError, match='expected a repository as NAMESPACE/NAME, got None'):
        timm_apvit.push_to_hub(create(), None)
    with pytest.raises(ValueError, match="expected the name of a branch as revision, got ''"):
        timm_apvit.push_to_hub(create(), 'me/model', revision='')


def test_errors_name_what_failed_in_one_line():
    with (
        pytest.raises(ConnectionError, match=r'^cannot reach the Hub for me/model: of old; of late$'),
        explained('me/model'),
    ):
        raise RuntimeError('of yore') from OSError('of old;\nof late')
    with pytest.raises(ConnectionError, match='RuntimeError'), explained('me/model'):
        raise RuntimeError
    with pytest.raises(ValueError, match=r'^as it is$'), explained('me/model'):
        raise ValueError('as it is')
