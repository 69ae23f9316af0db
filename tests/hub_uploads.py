"""The loopback Hub, with the calls that an upload makes: tokens, branches, pull requests, and faults on demand.

| request | answer |
|---|---|
| ``GET /api/whoami-v2`` | the owner of the token |
| ``POST /api/repos/create`` | ``{"url"}``; 409 if it exists |
| ``POST /api/models/ns/name/branch/BRANCH`` | 200; 409 if it exists |
| ``POST /api/validate-yaml`` | what is wrong with the front matter, by rules of the Hub |
| ``POST /api/models/ns/name/preupload/REVISION`` | ``"lfs"`` for safetensors and PNG, ``"regular"`` for others |
| ``POST /ns/name.git/info/lfs/objects/batch``, ``PUT /lfs/OID`` | where to put a file; its bytes, checked by its hash |
| ``POST /api/models/ns/name/commit/REVISION`` | ``{"commitUrl", "commitOid", "pullRequestUrl"}`` |
"""

import base64
import hashlib
import json
import re
import socket
import subprocess
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any

import yaml
from hub_server import REPOSITORY, ROUTES, HubRequestHandler, HubServer, client_environment

MODEL = rf'/api/models/{REPOSITORY}'
# huggingface_hub's own, on its way of sending a file.
OWN = "ignore:Use 'content=<...>' to upload raw bytes/text content.:DeprecationWarning"
REVISION = r'(?P<revision>[^/]+)'
UPLOAD_ROUTES = (
    ('GET', re.compile('/api/whoami-v2'), 'send_owner'),
    ('POST', re.compile('/api/repos/create'), 'create_repository'),
    ('POST', re.compile('/api/validate-yaml'), 'validate_card'),
    ('POST', re.compile(rf'{MODEL}/branch/{REVISION}'), 'create_branch'),
    ('POST', re.compile(rf'{MODEL}/preupload/{REVISION}'), 'say_how_to_upload'),
    ('POST', re.compile(rf'/{REPOSITORY}\.git/info/lfs/objects/batch'), 'say_where_to_upload'),
    ('PUT', re.compile(r'/lfs/(?P<oid>[0-9a-f]{64})'), 'receive'),
    ('POST', re.compile(rf'{MODEL}/commit/{REVISION}'), 'receive_commit'),
)
# Of those that the Hub lists.
LICENSES = {'apache-2.0', 'mit', 'cc-by-nc-4.0', 'other'}
RELATIONS = {'finetune', 'adapter', 'merge', 'quantized'}


class WritableHub(HubServer):
    """A Hub that takes uploads.

    Attributes:
        tokens: ``{token: (owner, role)}``; without any, everyone may write everything.
        branches: ``{"ns/name": {revision: files}}`` besides ``main``.
        commits: ``{"ns/name": {commit: files}}`` of all times.
        private: repositories that only their owner sees.
        stored: files of the large file storage by their hash.
        faults: ``{"METHOD /path": [fault, ...]}`` of the next such requests (``"POST /api/repos/create name"`` of a
            creation): a status to answer with, or ``'drop'``: read half of what comes and hang up.
        messages: of all commits.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(repositories, UploadHandler)
        self.tokens: dict[str, tuple[str, str]] = {}
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.stored: dict[str, bytes] = {}
        self.faults: dict[str, list[Any]] = {}
        self.messages: list[str] = []

    def at(self, repository: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision names, and its files; None: there is no such revision."""
        branches = {'main': self.repositories[repository], **self.branches.get(repository, {})}
        files = branches.get(revision or 'main', self.commits.get(repository, {}).get(revision or 'main'))
        return None if files is None else (digest(files), files)

    def owner(self, authorization: str | None) -> tuple[str, str] | None:
        """Who sent a request, and the role of the token."""
        if not self.tokens:
            return 'me', 'write'
        return self.tokens.get((authorization or '').removeprefix('Bearer '))

    def may_read(self, repository: str, authorization: str | None) -> bool:
        """Whether someone sees that a repository exists."""
        owner = self.owner(authorization)
        mine = owner is not None and repository.startswith(owner[0] + '/')
        return repository in self.repositories and (repository not in self.private or mine)


def digest(files: dict[str, bytes]) -> str:
    """A commit of these files."""
    content = json.dumps({name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)})
    return hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()


class UploadHandler(HubRequestHandler):
    """Answer one connection's requests, by the table `UPLOAD_ROUTES` too."""

    server: WritableHub
    routes = ROUTES + UPLOAD_ROUTES

    def do_POST(self) -> None:  # noqa: N802  as http.server has it
        """Answer a ``POST`` request."""
        self.route()

    def do_PUT(self) -> None:  # noqa: N802  as http.server has it
        """Answer a ``PUT`` request."""
        self.route()

    def route(self) -> None:
        """Answer as the table says, unless a fault is due or the token is wrong."""
        length = int(self.headers.get('Content-Length') or 0)
        path = self.path.partition('?')[0]
        if self._fault(f'{self.command} {path}', 'drop'):
            self.server.requests.append(f'{self.command} {path}')
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.body = self.rfile.read(length)
        name = f' {json.loads(self.body)["name"]}' if path == '/api/repos/create' else ''
        authorization = self.headers['Authorization']
        if status := self._fault(f'{self.command} {path}{name}'):
            self.server.requests.append(f'{self.command} {path}')
            self.send_json({'error': 'on demand'}, HTTPStatus(status))
        elif authorization and self.server.owner(authorization) is None:
            self.send_json({'error': 'Invalid credentials in Authorization header'}, HTTPStatus.UNAUTHORIZED)
        elif self.command == 'POST' and path != '/api/validate-yaml' and not self._may_write(authorization):
            self.send_json({'error': 'You have no right to write here'}, HTTPStatus.FORBIDDEN)
        else:
            super().route()

    def _fault(self, request: str, kind: Any = None) -> Any:
        """The next fault of a request, if one is due, and of this kind if it must be."""
        faults = self.server.faults.get(request, [])
        return faults.pop(0) if faults and (faults[0] == kind if kind else isinstance(faults[0], int)) else None

    def _may_write(self, authorization: str | None) -> bool:
        owner = self.server.owner(authorization)
        if owner is None or owner[1] == 'read':
            return False
        if self.path == '/api/repos/create':
            return (json.loads(self.body)['organization'] or owner[0]) == owner[0]
        return 'create_pr=1' in self.path or '.git/info/lfs' in self.path or f'/{owner[0]}/' in self.path

    def send_owner(self) -> None:
        """Answer with the token's owner."""
        owner = self.server.owner(self.headers['Authorization'])
        if owner is None:
            self.send_json({'error': 'Unauthorized'}, HTTPStatus.UNAUTHORIZED)
        else:
            token = {'displayName': 'a token', 'role': owner[1]}
            self.send_json({'type': 'user', 'name': owner[0], 'orgs': [], 'auth': {'accessToken': token}})

    def create_repository(self) -> None:
        """Make a repository, with the one file that the Hub makes."""
        given = json.loads(self.body)
        owner = self.server.owner(self.headers['Authorization'])
        assert owner is not None
        name = f'{given["organization"] or owner[0]}/{given["name"]}'
        exists = name in self.server.repositories
        if not exists:
            self._store(name, 'main', {'.gitattributes': b'*.safetensors filter=lfs\n'})
            if given.get('visibility') == 'private' or given.get('private'):
                self.server.private.add(name)
        status = HTTPStatus.CONFLICT if exists else HTTPStatus.OK
        self.send_json({'url': f'{self.server.endpoint}/{name}'}, status)

    def create_branch(self, repository: str, revision: str) -> None:
        """Make a branch off ``main``."""
        exists = revision == 'main' or revision in self.server.branches.get(repository, {})
        if not exists:
            self._store(repository, revision, self.server.repositories[repository])
        self.send_json({}, HTTPStatus.CONFLICT if exists else HTTPStatus.OK)

    def validate_card(self) -> None:
        """Say what is wrong with the front matter of a card."""
        problems = problems_of_card(json.loads(self.body)['content'])
        status = HTTPStatus.BAD_REQUEST if problems else HTTPStatus.OK
        if self.headers['Accept'] == 'text/plain':
            self.send_body(status, '\n'.join(f'- Error: {problem}' for problem in problems).encode(), {})
        else:
            self.send_json({'errors': [{'message': problem} for problem in problems], 'warnings': []}, status)

    def say_how_to_upload(self, repository: str, revision: str) -> None:
        """Say which files are large."""
        if not self.server.may_read(repository, self.headers['Authorization']):
            self.send_missing('RepoNotFound')
            return
        if self.server.at(repository, revision) is None:
            self.send_missing('RevisionNotFound')
            return
        paths = [each['path'] for each in json.loads(self.body)['files']]
        large = ('.safetensors', '.png')
        modes = ['lfs' if path.endswith(large) else 'regular' for path in paths]
        files = [{'path': p, 'uploadMode': m, 'shouldIgnore': False} for p, m in zip(paths, modes, strict=True)]
        self.send_json({'files': files})

    def say_where_to_upload(self, repository: str) -> None:
        """Say where large files go that are not there yet."""
        objects = []
        for each in json.loads(self.body)['objects']:
            actions = {'upload': {'href': f'{self.server.endpoint}/lfs/{each["oid"]}'}}
            objects.append(each if each['oid'] in self.server.stored else {**each, 'actions': actions})
        self.send_json({'transfer': 'basic', 'objects': objects})

    def receive(self, oid: str) -> None:
        """Take a large file, if it is what it says."""
        whole = hashlib.sha256(self.body).hexdigest() == oid
        if whole:
            self.server.stored[oid] = self.body
        self.send_json({}, HTTPStatus.OK if whole else HTTPStatus.BAD_REQUEST)

    def receive_commit(self, repository: str, revision: str) -> None:
        """Take a commit, all of it or nothing."""
        lines = [json.loads(line) for line in self.body.splitlines()]
        found = self.server.at(repository, revision)
        assert found is not None
        files = dict(found[1])
        for line in lines:
            value = line['value']
            if line['key'] == 'header':
                self.server.messages.append(value['summary'])
            elif line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'lfsFile':
                files[value['path']] = self.server.stored[value['oid']]
            elif line['key'] == 'deletedFile':
                del files[value['path']]
        answer = {}
        if 'create_pr=1' in self.path:
            number = 1 + sum(each.startswith('refs/pr/') for each in self.server.branches.get(repository, {}))
            revision = f'refs/pr/{number}'
            answer = {'pullRequestUrl': f'{self.server.endpoint}/{repository}/discussions/{number}'}
        self._store(repository, revision, files)
        oid = digest(files)
        self.send_json({'commitUrl': f'{self.server.endpoint}/{repository}/commit/{oid}', 'commitOid': oid, **answer})

    def _store(self, repository: str, revision: str, files: dict[str, bytes]) -> None:
        """Let a revision have these files."""
        self.server.commits.setdefault(repository, {})[digest(files)] = files
        if revision == 'main':
            self.server.repositories[repository] = files
        else:
            self.server.branches.setdefault(repository, {})[revision] = files


def front_matter(card: str) -> dict[str, Any]:
    """The metadata of a card."""
    start, text, _ = card.split('---\n', 2)
    assert start == ''
    data = yaml.safe_load(text)
    assert isinstance(data, dict)
    return data


def problems_of_card(card: str) -> list[str]:
    """What the Hub would say against a card's metadata."""
    data = front_matter(card)
    repository = re.compile(r'[\w.-]+/[\w.-]+')
    datasets = data.get('datasets', [])
    problems = {
        'license': data.get('license', 'mit') not in LICENSES,
        'base_model_relation': data.get('base_model_relation', 'finetune') not in RELATIONS,
        'base_model': not repository.fullmatch(data.get('base_model', 'a/b')),
        'tags': not all(isinstance(tag, str) for tag in data['tags']),
        'datasets': not all(isinstance(name, str) and re.fullmatch(r'[\w./-]+', name) for name in datasets),
    }
    for model in data.get('model-index', []):
        problems['model-index.name'] = not isinstance(model['name'], str)
        for result in model['results']:
            problems['model-index.task'] = not isinstance(result['task']['type'], str)
            problems['model-index.dataset'] = not all(
                isinstance(result['dataset'][key], str) for key in ('type', 'name')
            )
            problems['model-index.metrics'] = not all(
                isinstance(metric['type'], str) and isinstance(metric['value'], float) for metric in result['metrics']
            )
    return [f'"{key}" is not valid' for key, wrong in problems.items() if wrong]


def run_client(
    server: HubServer, home: Path, script: str, *arguments: str, **environment: str
) -> 'subprocess.CompletedProcess[str]':
    """Run a Python script in a fresh process, which finds `server` for the Hub and has an empty cache in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        [sys.executable, '-W', 'error', '-W', OWN, '-c', script, *arguments],
        env=client_environment(server.endpoint, home) | {'MPLBACKEND': 'Agg'} | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
