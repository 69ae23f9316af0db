"""A loopback stand-in for the Hugging Face Hub, and a client process that talks to it.

`HubServer` answers the calls that a download makes, out of a dictionary ``{"ns/name": {"file": bytes}}``:

| request | answer |
|---|---|
| ``HEAD`` and ``GET /ns/name/resolve/REVISION/FILE`` | the file, with ``X-Repo-Commit``, ``ETag``, ``Content-Length`` |
| ``GET /api/models/ns/name[/revision/REVISION]`` | ``{"id", "sha", "siblings": [{"rfilename"}]}`` |

Another call is another row of `ROUTES`; those of uploads are in `hub_uploads`. huggingface_hub reads its environment
when it is imported, so whatever talks to the server runs in a process of its own: `create_models` starts one for a list
of ``timm.create_model`` calls.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

REPOSITORY = r'(?P<repository>[\w.-]+/[\w.-]+)'
ROUTES = (
    ('HEAD', re.compile(rf'/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)'), 'send_repository_file'),
    ('GET', re.compile(rf'/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)'), 'send_repository_file'),
    ('GET', re.compile(rf'/api/models/{REPOSITORY}(/revision/(?P<revision>[^/]+))?'), 'send_model_info'),
)


class HubServer(ThreadingHTTPServer):
    """Serve `repositories` on a free loopback port.

    Attributes:
        repositories: ``{"ns/name": {"file": bytes}}``; may be changed while the server runs.
        truncate_once: ``{"ns/name/file"}`` whose next download ends after half of the bytes that its header promised.
        requests: ``"METHOD /path"`` of every request so far.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]], handler: type['HubRequestHandler'] | None = None):
        super().__init__(('127.0.0.1', 0), handler or HubRequestHandler)
        self.repositories = repositories
        self.truncate_once: set[str] = set()
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        """The address to give as ``HF_ENDPOINT``."""
        return f'http://127.0.0.1:{self.server_address[1]}'

    def commit(self, repository: str) -> str:
        """The repository's only commit: 40 hexadecimal digits that follow its content."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name, content in sorted(self.repositories[repository].items()):
            digest.update(name.encode() + hashlib.sha256(content).digest())
        return digest.hexdigest()

    def at(self, repository: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision names, and its files; None: there is no such revision."""
        commit = self.commit(repository)
        return (commit, self.repositories[repository]) if revision in (None, 'main', commit) else None

    def may_read(self, repository: str, authorization: str | None) -> bool:
        """Whether someone sees that a repository exists."""
        return repository in self.repositories


class HubRequestHandler(BaseHTTPRequestHandler):
    """Answer one connection's requests by the table `ROUTES`."""

    protocol_version = 'HTTP/1.1'
    server: HubServer
    routes = ROUTES

    def do_HEAD(self) -> None:
        """Answer a ``HEAD`` request."""
        self.route()

    def do_GET(self) -> None:
        """Answer a ``GET`` request."""
        self.route()

    def route(self) -> None:
        """Call the handler of the first row of `ROUTES` that matches, or answer 404."""
        path = urlsplit(self.path).path
        self.server.requests.append(f'{self.command} {unquote(path)}')
        for command, pattern, handler in self.routes:
            if command == self.command and (match := pattern.fullmatch(path)):
                values = {key: value and unquote(value) for key, value in match.groupdict().items()}
                getattr(self, handler)(**values)
                return
        self.send_missing('EntryNotFound')

    def send_repository_file(self, repository: str, revision: str, file: str) -> None:
        """Answer with a file's bytes, or with its headers alone."""
        if not self.server.may_read(repository, self.headers['Authorization']):
            self.send_missing('RepoNotFound')
        elif (found := self.server.at(repository, revision)) is None:
            self.send_missing('RevisionNotFound')
        elif file not in found[1]:
            self.send_missing('EntryNotFound', commit=found[0])
        else:
            commit, files = found
            content = files[file]
            headers = {
                'X-Repo-Commit': commit,
                'ETag': f'"{hashlib.sha256(content).hexdigest()}"',
            }
            if self.command == 'GET' and f'{repository}/{file}' in self.server.truncate_once:
                self.server.truncate_once.remove(f'{repository}/{file}')
                content = content[: len(content) // 2]
            self.send_body(HTTPStatus.OK, content, headers)

    def send_model_info(self, repository: str, revision: str | None) -> None:
        """Answer with a repository's commit and the names of its files."""
        if not self.server.may_read(repository, self.headers['Authorization']):
            self.send_missing('RepoNotFound')
        elif (found := self.server.at(repository, revision)) is None:
            self.send_missing('RevisionNotFound')
        else:
            commit, files = found
            private = repository in getattr(self.server, 'private', ())
            siblings = [{'rfilename': name} for name in sorted(files)]
            self.send_json({'id': repository, 'sha': commit, 'private': private, 'siblings': siblings})

    def send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        """Answer with JSON."""
        self.send_body(status, json.dumps(value).encode(), {'Content-Type': 'application/json'})

    def send_missing(self, error_code: str, commit: str | None = None) -> None:
        """Answer 404 with the Hub's own word for what is missing."""
        headers = {'X-Error-Code': error_code} | ({'X-Repo-Commit': commit} if commit else {})
        self.send_body(HTTPStatus.NOT_FOUND, b'', headers)

    def send_body(self, status: HTTPStatus, body: bytes, headers: dict[str, str]) -> None:
        """Send a whole answer; a ``HEAD`` request gets the headers of the ``GET``."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: `HubServer.requests` holds the log."""


@contextmanager
def serve(repositories: dict[str, dict[str, bytes]], kind: type[HubServer] = HubServer) -> Iterator[Any]:
    """Run a `HubServer` in a thread for the length of a ``with`` block."""
    with kind(repositories) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


CLIENT = """
import json, sys
import torch, timm, timm_apvit

torch.set_num_threads(1)
results = {}
for name, (model_name, kwargs, shape) in json.loads(sys.argv[1]).items():
    torch.manual_seed(0)
    try:
        model = timm.create_model(model_name, pretrained=True, **kwargs).eval()
    except Exception as error:
        results[name] = {"error": f"{type(error).__name__}: {error}"}
        continue
    with torch.no_grad():
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        features = getattr(model, "forward_features", model)(image)
        results[name] = {"features": features, "logits": None if kwargs.get("features_only") else model(image)}
    if isinstance(model, timm_apvit.APViT):
        results[name] |= {
            "args": model.adaptive_args(),
            "label_names": model.pretrained_cfg.get("label_names"),
            "base_model": model.base_model,
        }
torch.save(results, sys.argv[2])
"""


def client_environment(endpoint: str, home: Path) -> dict[str, str]:
    """This process's environment without proxies, tokens or offline mode, pointed at `endpoint` with its own cache."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(('HF_', 'HUGGINGFACE_', 'TRANSFORMERS_')) and not key.lower().endswith('_proxy')
    }
    return kept | {
        'HF_ENDPOINT': endpoint,
        'HF_HOME': str(home),
        'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_TELEMETRY': '1',
        'HF_HUB_DISABLE_PROGRESS_BARS': '1',
    }


def create_models(
    server: HubServer, home: Path, calls: dict[str, tuple[str, dict[str, Any], list[int]]], **environment: str
) -> Any:
    """Create pretrained models from `server`, in order, in one fresh process.

    Args:
        server: Where the process finds the Hub.
        home: A folder for its cache.
        calls: ``{name: (model name, keyword arguments, image shape (B, C, H, W))}``.
        environment: Further variables of the process, such as ``HF_TOKEN``.

    Returns:
        ``{name: {"features", "logits", "args", "label_names", "base_model"}}``, outputs of ``torch.randn`` seeded with
        0, or ``{name: {"error": "Type: message"}}``.
    """
    home.mkdir(parents=True, exist_ok=True)
    result = home / 'result.pt'
    process = subprocess.run(
        [sys.executable, '-W', 'error', '-c', CLIENT, json.dumps(calls), str(result)],
        env=client_environment(server.endpoint, home) | environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if process.returncode:
        raise RuntimeError(f'expected the client to succeed, got status {process.returncode}: {process.stderr}')
    return torch.load(result)
