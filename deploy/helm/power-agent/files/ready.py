"""`helm test`: every pod of the release is ready, which means that it enforces."""

# ruff: noqa: S310, T201 - it asks one https server, and people read what it prints

import json
import ssl
import sys
import urllib.parse
import urllib.request
from pathlib import Path

server, namespace, selector, credentials = sys.argv[1:]
request = urllib.request.Request(
    f"{server}/api/v1/namespaces/{namespace}/pods?labelSelector={urllib.parse.quote(selector)}",
    headers={"Authorization": "Bearer " + Path(credentials, "token").read_text()},
)
trusted = ssl.create_default_context(cafile=str(Path(credentials, "ca.crt")))
with urllib.request.urlopen(request, context=trusted, timeout=10) as response:
    pods = json.load(response)["items"] or []
failed = not pods
if failed:
    print("no pod: does a node carry the label of nodeSelector? kubectl describe the DaemonSet")
for pod in pods:
    status = pod["status"]
    ready = {c["type"]: c["status"] for c in status.get("conditions", ())}.get("Ready") == "True"
    print(pod["spec"].get("nodeName"), pod["metadata"]["name"], "ready" if ready else "NOT READY")
    failed |= not ready
sys.exit(failed)
