"""What administrators apply, on a real API server: every overlay and the rendered chart are
accepted by strict validation, each form's token may what it must and nothing else, and the chart's
own test tells ready pods from others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.kube.chart import CHART, DEPLOY, NAMESPACE, helm, kustomize, render
from tests.kube.conftest import MakeNode
from tests.simnode.controlplane import ControlPlane
from tests.simnode.controlplane_rest import Object, RestClient
from tests.waiting import HANG_S

pytestmark = pytest.mark.kube

STRICT = ("apply", "--dry-run=server", "--validate=strict")
OVERLAYS = sorted(f"overlays/{each.name}" for each in (DEPLOY / "overlays").iterdir())
FOLDERS = ["power_agent", "policies", "policies-dynamo", "qualify", *OVERLAYS]
MONITORING = {each: {"enabled": True} for each in ("podMonitor", "prometheusRule", "dashboard")}
CHARTS: dict[str, Object] = {
    "default": {},
    "everything": {
        "settings": {
            "minWatts": 100, "maxWatts": 700.5, "safeDefault": "70%", "conflict": "safe-default",
            "events": True, "onExit": "hold", "procRoot": "/host/proc", "watcherUid": 1000700000,
        },
        "image": {"digest": "sha256:" + "0" * 64},
        "imagePullSecrets": [{"name": "pull"}],
        "podLabels": {"team": "power"},
        "podAnnotations": {"note": "one"},
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [
                {"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}
            ]}}},
        "maxUnavailable": "10%",
        "monitoring": {
            **MONITORING,
            "podMonitor": {"enabled": True, "relabelings": [
                {"targetLabel": "cluster", "replacement": "one"}
            ]},
            "prometheusRule": {"enabled": True, "disabled": ["PowerAgentDown"]},
        },
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "extraVolumes": [{"name": "certificates", "configMap": {"name": "ca"}}],
        "watcher": {"extraVolumeMounts": [
            {"name": "certificates", "mountPath": "/certificates", "readOnly": True}
        ]},
        "probes": {"watcher": {"liveness": None}, "enforcer": {"startup": {"periodSeconds": 9}}},
        "admission": {"enabled": True, "writers": ["system:serviceaccount:a:planner"]},
        "networkPolicy": {
            "enabled": True,
            "from": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
            "apiServer": [{"ipBlock": {"cidr": "10.0.0.1/32"}}],
        },
    },
    "namespaced": {"settings": {"watchNamespace": "default", "events": True}},
    "supervised": {"supervised": True, "privileges": "minimal"},
    "no metrics": {"settings": {"metricsAddr": "off"}, "runtimeClassName": ""},
    "a Service": {
        "monitoring": {"service": {"enabled": True}, "serviceMonitor": {"enabled": True}},
        "nodeSelector": None, "allNodes": True, "seLinuxOptions": {"type": "spc_t"},
    },
    "names and accounts": {
        "fullnameOverride": "gpu-power", "serviceAccount": {"create": False, "name": "own"},
        "terminationGracePeriodSeconds": 61, "seLinux": {"enabled": True}, "privileges": "minimal",
    },
    **{
        path.stem: yaml.safe_load(path.read_text())
        for path in sorted((DEPLOY / "helm/power-agent").glob("values-*.yaml"))
    },
}  # fmt: skip


def definition(kind: str, plural: str) -> Object:
    """As much of the Prometheus operator as it takes to be asked for its objects."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.monitoring.coreos.com"},
        "spec": {
            "group": "monitoring.coreos.com",
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural},
            "versions": [
                {
                    "name": "v1",
                    "served": True,
                    "storage": True,
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object",
                            "x-kubernetes-preserve-unknown-fields": True,
                        }
                    },
                }
            ],
        },
    }


@pytest.fixture(scope="module")
def kube(cluster: ControlPlane) -> Iterator[ControlPlane]:
    """With the kinds of the Prometheus operator."""
    kinds = [
        definition("PodMonitor", "podmonitors"),
        definition("ServiceMonitor", "servicemonitors"),
        definition("PrometheusRule", "prometheusrules"),
    ]
    text = manifest(kinds)
    cluster.kubectl("apply", "-f", "-", stdin=text)
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", "-", stdin=text)
    yield cluster
    cluster.kubectl("delete", "--wait=false", "-f", "-", stdin=text)


def manifest(objects: list[Object]) -> str:
    """As `kubectl -f -` takes it."""
    return "\n---\n".join(json.dumps(each) for each in objects)


# ---------------------------------------------------------------------- accepted


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_kustomize_makes_is_accepted(kube: ControlPlane, folder: str) -> None:
    objects = kustomize(DEPLOY / folder)
    done = kube.kubectl(*STRICT, "-f", "-", stdin=manifest(objects))
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == len(objects)


@pytest.mark.parametrize("case", CHARTS)
def test_what_the_chart_makes_is_accepted(kube: ControlPlane, case: str) -> None:
    """The hook of `helm test` too."""
    kube.create_namespace("trial")
    objects = render(CHARTS[case], release="trial", namespace="trial")
    done = kube.kubectl(*STRICT, "-f", "-", stdin=manifest(objects))
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == len(objects)


def test_a_misspelt_field_of_an_overlay_would_be_seen(kube: ControlPlane) -> None:
    text = manifest(kustomize(DEPLOY / "overlays/reduced-privileges"))
    wrong = text.replace('"appArmorProfile"', '"appArmor"')
    assert wrong != text
    done = kube.kubectl(*STRICT, "-f", "-", stdin=wrong, check=False)
    assert done.returncode == 1
    assert "appArmor" in done.stderr


# ---------------------------------------------------------------------- the life of a release


def release(kube: ControlPlane, command: str, values: Object | None, *flags: str) -> str:
    """What the administrator's helm does with the release `fleet`."""
    given = () if values is None else (str(CHART), "--values", "-")
    return helm(
        *(command, "fleet", *given, "--namespace", "fleet", *flags),
        stdin=json.dumps(values or {}),
        kubeconfig=kube.admin_kubeconfig,
    )


def of_the_release(kube: ControlPlane) -> list[str]:
    kinds = "daemonset,serviceaccount,clusterrole,clusterrolebinding,networkpolicy,configmap"
    kinds += ",role,rolebinding,podmonitor,prometheusrule"
    selector = "app.kubernetes.io/instance=fleet"
    answer = kube.kubectl("get", kinds, "--all-namespaces", "-o", "name", "-l", selector)
    return answer.stdout.split()


def test_a_release_is_installed_upgraded_and_leaves_nothing(kube: ControlPlane) -> None:
    """By helm itself; in between, what is optional comes and goes."""
    told = release(kube, "install", {}, "--create-namespace")
    assert "kubectl get ds -n fleet fleet-power-agent" in told
    installed = of_the_release(kube)
    assert {each.partition("/")[2] for each in installed} == {"fleet-power-agent"}
    assert len(installed) == 4
    release(kube, "upgrade", CHARTS["everything"] | {"admission": {"enabled": False}})
    assert len(of_the_release(kube)) == len(installed) + 4
    release(kube, "upgrade", {"settings": {"watchNamespace": "default"}})
    assert [each for each in of_the_release(kube) if "clusterrole" in each] == []
    release(kube, "uninstall", None, "--wait")
    assert of_the_release(kube) == []


# ---------------------------------------------------------------------- the watched namespace


@pytest.fixture(scope="module")
def narrow(kube: ControlPlane) -> Iterator[str]:
    """The account of a release that watches one namespace, with Events."""
    values = {"settings": {"watchNamespace": "workers", "events": True}}
    release = [
        each
        for each in render(values, "--no-hooks", release="narrow", namespace="narrow")
        if each["kind"] != "DaemonSet"
    ]
    for name in ("narrow", "workers"):
        kube.create_namespace(name)
    kube.kubectl("apply", "--validate=strict", "-f", "-", stdin=manifest(release))
    yield "narrow-power-agent"
    kube.kubectl("delete", "-f", "-", stdin=manifest(release))


@pytest.fixture(scope="module")
def narrow_token(kube: ControlPlane, narrow: str) -> Iterator[RestClient]:
    with kube.rest_client(kube.service_account_token("narrow", narrow)) as owner:
        yield owner


def test_the_token_of_a_role_reads_pods_of_its_namespace_alone(narrow_token: RestClient) -> None:
    status = {
        path: narrow_token.raw("GET", f"/api/v1/{path}")[0]
        for path in (
            "namespaces/workers/pods",
            "namespaces/default/pods",
            "namespaces/narrow/pods",
            "pods",
            "namespaces/workers/secrets",
        )
    }
    assert [path for path, code in status.items() if code == 200] == ["namespaces/workers/pods"]
    assert set(status.values()) == {200, 403}


def test_events_may_be_written_where_they_were_asked_for(narrow_token: RestClient) -> None:
    def write(namespace: str) -> int:
        event = {
            "metadata": {"generateName": "trial.", "namespace": namespace},
            "involvedObject": {"kind": "Pod", "namespace": namespace, "name": "trial"},
            "reason": "Trial",
            "message": "Trial",
            "type": "Normal",
        }
        return narrow_token.raw("POST", f"/api/v1/namespaces/{namespace}/events", event)[0]

    assert write("workers") == 201
    assert write("default") == 403
    assert narrow_token.raw("GET", "/api/v1/namespaces/workers/events")[0] == 403


def test_the_agent_works_with_a_role(make_node: MakeNode, narrow: str) -> None:
    node = make_node(account=("narrow", narrow), settings={"WATCH_NAMESPACE": "workers"})
    found = node.limit_mw(1)
    node.add_pod("elsewhere", limit=360, gpus=[1])
    node.add_pod("watched", namespace="workers", limit=350, gpus=[0])
    node.wait_for_limit(0, 350)
    assert node.limit_mw(1) == found


# ---------------------------------------------------------------------- helm test


@pytest.fixture
def credentials(kube: ControlPlane, tmp_path: Path) -> Path:
    """As the kubelet lays them out for the agent's service account."""
    (tmp_path / "token").write_text(kube.service_account_token(NAMESPACE, "power-agent"))
    (tmp_path / "ca.crt").write_bytes(kube.certificates.ca.read_bytes())
    return tmp_path


def run_chart_test(kube: ControlPlane, credentials: Path) -> subprocess.CompletedProcess[str]:
    """What the pod of `helm test` runs, at the same server."""
    (pod,) = [each for each in render() if each["kind"] == "Pod"]
    (container,) = pod["spec"]["containers"]
    script, server, namespace, selector, folder = container["args"]
    assert container["command"][1:] == ["-I", "-c"]
    assert (server, folder) == (
        "https://kubernetes.default.svc",
        "/var/run/secrets/kubernetes.io/serviceaccount",
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", script, kube.url, namespace, selector, str(credentials)],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
        env={key: value for key, value in os.environ.items() if "proxy" not in key.lower()},
    )


def test_helm_test_tells_ready_pods_from_others(kube: ControlPlane, credentials: Path) -> None:
    assert run_chart_test(kube, credentials).returncode == 1  # no pod at all
    labels = {"app": "power-agent", "app.kubernetes.io/instance": "power-agent"}
    names = ["power-agent-a", "power-agent-b"]
    for name in names:
        kube.create_pod(name, node=f"{name}-node", namespace=NAMESPACE, labels=labels)
    try:
        for ready, name in enumerate(names):
            done = run_chart_test(kube, credentials)
            assert done.returncode == 1, done.stderr
            assert done.stdout.count("NOT READY") == len(names) - ready
            set_ready(kube, name)
        done = run_chart_test(kube, credentials)
        assert done.returncode == 0, done.stderr
        assert "power-agent-a-node power-agent-a ready" in done.stdout
    finally:
        for name in names:
            kube.finish_deletion(NAMESPACE, name)


def set_ready(kube: ControlPlane, name: str) -> None:
    with kube.rest_client() as rest:
        rest.patch(
            f"/api/v1/namespaces/{NAMESPACE}/pods/{name}/status",
            {"status": {"conditions": [{"type": "Ready", "status": "True"}]}},
        )
