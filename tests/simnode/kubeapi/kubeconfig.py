"""A kubeconfig file for plain kubectl and any other client."""

from __future__ import annotations

from pathlib import Path

_TEMPLATE = """\
apiVersion: v1
kind: Config
clusters:
- name: simnode
  cluster:
    server: {url}
users:
- name: {user}
  user: {credentials}
contexts:
- name: simnode
  context:
    cluster: simnode
    user: {user}
    namespace: default
current-context: simnode
"""


def write_kubeconfig(
    path: Path, url: str, *, token: str | None, token_file: Path | None, user: str
) -> None:
    credentials = "{}"
    if token is not None:
        credentials = f'{{token: "{token}"}}'
    if token_file is not None:
        credentials = f'{{tokenFile: "{token_file}"}}'
    path.write_text(_TEMPLATE.format(url=url, user=user, credentials=credentials))
    path.chmod(0o600)
