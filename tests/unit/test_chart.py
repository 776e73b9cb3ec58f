"""The chart, rendered by the real helm: the same as the plain files, and no nonsense gets in."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from enforcer.settings import EnforcerSettings
from shared import __version__
from shared.settings import DEFAULT_RUN_DIR, SettingsError, parse_settings
from tests.kube.chart import (
    CHART,
    DEPLOY,
    NAMESPACE,
    ROOT,
    Object,
    RefusedError,
    containers,
    documents,
    helm,
    kustomize,
    literals,
    named,
    render,
    template,
    without_helm_labels,
)
from watcher.settings import WatcherSettings

MONITORING = {
    each: {"enabled": True} for each in ("podMonitor", "prometheusRule", "dashboard")
}  # fmt: skip


def refusal(values: Object, *flags: str) -> str:
    """Helm's words when it refuses."""
    with pytest.raises(RefusedError) as refused:
        render(values, *flags)
    return str(refused.value)


def kinds(objects: list[Object]) -> set[str]:
    return {each["kind"] for each in objects}


def test_lint_has_nothing_to_say() -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART))


# ---------------------------------------------------------------------- the plain files

SAME: dict[str, tuple[str, Object]] = {
    "manifest": ("power_agent", {}),
    "reduced-privileges": ("overlays/reduced-privileges", {"privileges": "minimal"}),
    "supervised": ("overlays/supervised", {"supervised": True}),
    "namespaced": ("overlays/namespaced", {"settings": {"watchNamespace": "default"}}),
    "dry-run": ("overlays/dry-run", {"settings": {"dryRun": True}}),
    "monitoring": ("overlays/monitoring", {"monitoring": MONITORING}),
    "selinux": ("overlays/selinux", {"seLinux": {"enabled": True}}),
    "openshift": ("overlays/openshift", {"openshift": {"enabled": True}}),
    "dra": ("overlays/dra", {"dra": True}),
}


@pytest.mark.parametrize("case", SAME)
def test_the_chart_says_the_same_as_the_plain_files(case: str) -> None:
    folder, values = SAME[case]
    rendered = named(render({"namespace": {"create": True}, **values}, "--no-hooks"))
    plain = named(kustomize(DEPLOY / folder))
    assert rendered.keys() == plain.keys()
    for name, each in plain.items():
        assert without_helm_labels(rendered[name]) == without_helm_labels(each), name


@pytest.mark.parametrize("folder", ["policies", "policies-dynamo"])
def test_the_chart_has_the_same_admission_policies(folder: str) -> None:
    values: Object = {"admission": {"enabled": True}}
    if folder == "policies-dynamo":
        values = yaml.safe_load((CHART / "values-dynamo.yaml").read_text())
    chart = {
        name: each
        for name, each in named(render(values)).items()
        if name[0].startswith("ValidatingAdmission") or name[0] == "ConfigMap"
    }
    plain = named(kustomize(DEPLOY / folder))
    writers = plain["ConfigMap", "power-agent-policy"]["data"]
    writers["writers"] = writers["writers"].strip()  # one line more or less is the same list
    assert chart.keys() == plain.keys()
    for name, each in plain.items():
        assert without_helm_labels(chart[name]) == without_helm_labels(each), name


def test_the_charts_copies_are_the_plain_files() -> None:
    rules = documents((DEPLOY / "monitoring/prometheusrule.yaml").read_text())[0]["spec"]
    assert yaml.safe_load((CHART / "files/rules.yaml").read_text()) == rules
    assert (CHART / "files/dashboard.json").read_bytes() == (
        DEPLOY / "monitoring/dashboard.json"
    ).read_bytes()


def test_alerts_and_dashboard_link_to_where_the_runbooks_are() -> None:
    where = "https://wiki.example/power.md"
    rules = {"enabled": True, "runbookUrl": where}
    made = named(render({"monitoring": MONITORING | {"prometheusRule": rules}}))
    (group,) = made["PrometheusRule", "power-agent"]["spec"]["groups"]
    for rule in group["rules"]:
        if "alert" in rule:
            link = rule["annotations"]["runbook_url"]
            assert link == f"{where}#{rule['alert'].lower()}"
    board = json.loads(made["ConfigMap", "power-agent-dashboard"]["data"]["power-agent.json"])
    links = [link["url"] for part in (board, *board["panels"]) for link in part.get("links", ())]
    assert {link.partition("#")[0] for link in links} == {where}
    for wrong in ("", "a b", 'a"b', "a\\b", "a#b"):
        bad = {"prometheusRule": {"enabled": True, "runbookUrl": wrong}}
        assert "runbookUrl" in refusal({"monitoring": bad}), wrong


def test_versions_are_the_products() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    assert values["image"]["tag"] == f"v{__version__}"


# ---------------------------------------------------------------------- settings

# None has the program's default, so each shows that it arrives.
EVERY: Object = {
    "annotation": "example.com/limit",
    "watchNamespace": "workers",
    "metricsAddr": "[::]:9200",
    "events": True,
    "minWatts": 100.5,
    "maxWatts": "700",
    "safeDefault": "70%",
    "conflict": "safe-default",
    "releaseTo": "default",
    "onExit": "hold",
    "exitSeconds": 12,
    "lease": "release:90.5",
    "dryRun": True,
    "scanSeconds": 0.5,
    "reconcileSeconds": 604800,
    "watcherUid": 1000700000,
    "readerUids": "0, 1000",
    "stateDir": "/var/lib/elsewhere",
    "procRoot": "/host/proc",
    "sysfsRoot": "/host/sys",
    "cgroupRoot": "/kubelet.slice",
    "kubeletDir": "/var/lib/k0s/kubelet",
    "kubeletResources": "example.com/gpu",
    "runDir": "/run/elsewhere",
    "logLevel": "debug",
    "logFormat": "text",
}
# Given by the pod itself, or without a meaning in a pod.
NOT_VALUES = {"NODE_NAME", "KUBECONFIG", "KUBERNETES_SERVICE_HOST", "POWER_AGENT_SUPERVISED"}


def variable(value: str) -> str:
    """The variable that a value of `settings` becomes."""
    words = re.sub("([A-Z])", r"_\1", value).upper()
    return words if value == "watchNamespace" else f"POWER_AGENT_{words}"


def parsed(objects: list[Object]) -> tuple[WatcherSettings, EnforcerSettings]:
    """What both programs make of their containers' variables."""
    found = containers(objects)
    watcher = found.get("watcher") or found["power-agent"]
    enforcer = found.get("enforcer") or found["power-agent"]
    return (
        parse_settings(WatcherSettings, literals(watcher) | {"NODE_NAME": "n"}),
        parse_settings(EnforcerSettings, literals(enforcer)),
    )


def test_every_setting_is_a_value_and_every_value_is_a_setting() -> None:
    known = {
        each.metadata["variable"].name
        for kind in (WatcherSettings, EnforcerSettings)
        for each in dataclasses.fields(kind)
    }
    values = yaml.safe_load((CHART / "values.yaml").read_text())["settings"]
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert {variable(each) for each in values} == known - NOT_VALUES
    assert set(values) == set(EVERY) == set(schema["properties"]["settings"]["properties"])


@pytest.mark.parametrize("supervised", [False, True])
def test_every_value_reaches_the_program_that_reads_it(supervised: bool) -> None:
    objects = render({"settings": EVERY, "supervised": supervised})
    defaults = (
        parse_settings(WatcherSettings, {"NODE_NAME": "n"}),
        parse_settings(EnforcerSettings, {}),
    )
    for had, has in zip(defaults, parsed(objects), strict=True):
        for each in dataclasses.fields(has):
            name = each.metadata["variable"].name
            if name not in NOT_VALUES:
                assert getattr(has, each.name) != getattr(had, each.name), name


def test_without_values_the_programs_keep_their_defaults() -> None:
    """So the chart and the programs cannot disagree on what a default is."""
    for container in containers(render()).values():
        # The one that is off by default: outside Kubernetes there is no kubelet.
        known = {"POWER_AGENT_KUBELET_DIR"}
        assert not {name for name in literals(container) if name[:7] != "NVIDIA_"} - known


def test_values_shape_the_pod_too() -> None:
    objects = render({"settings": EVERY})
    pod, found = template(objects)["spec"], containers(objects)
    volumes = {each["name"]: each for each in pod["volumes"]}
    mounts = {
        (name, mount["name"]): mount["mountPath"]
        for name, each in found.items()
        for mount in each["volumeMounts"]
    }
    assert found["watcher"]["securityContext"]["runAsUser"] == 1000700000
    assert found["watcher"]["securityContext"]["runAsGroup"] == 1000700000
    assert pod["securityContext"]["fsGroup"] == 1000700000
    assert found["watcher"]["ports"][0]["containerPort"] == 9200
    assert volumes["state"]["hostPath"]["path"] == "/var/lib/elsewhere"
    assert volumes["proc"]["hostPath"]["path"] == "/proc"
    assert volumes["sys"]["hostPath"]["path"] == "/sys"
    assert mounts["enforcer", "proc"] == "/host/proc"
    assert mounts["enforcer", "sys"] == "/host/sys"
    assert mounts["enforcer", "state"] == "/var/lib/elsewhere"
    assert mounts["enforcer", "run"] == mounts["watcher", "run"] == "/run/elsewhere"


def test_without_metrics_nothing_asks_for_them() -> None:
    for supervised in (False, True):
        found = containers(
            render({"settings": {"metricsAddr": "off"}, "supervised": supervised})
        )  # fmt: skip
        for container in found.values():
            assert "ports" not in container
            assert "httpGet" not in json.dumps(container)


# ---------------------------------------------------------------------- nonsense

SETTINGS_REFUSED: dict[str, tuple[Object, str]] = {
    "bounds that cross": (
        {"minWatts": 400, "maxWatts": 300},
        "settings.minWatts=400 is above settings.maxWatts=300: lower the first",
    ),
    "bounds that cross as texts": ({"minWatts": "1000", "maxWatts": "300"}, "is above"),
    "conflict without its default": (
        {"conflict": "safe-default"}, "safeDefault",
    ),
    "conflict with no default": (
        {"conflict": "safe-default", "safeDefault": None}, "safeDefault",
    ),
    "conflict unknown": ({"conflict": "highest"}, "'lowest', 'safe-default'"),
    "no watts": ({"minWatts": "350W"}, "watts, such as 300"),
    "zero watts": ({"minWatts": 0}, "watts, such as 300"),
    "zero watts as text": ({"maxWatts": "0.0"}, "watts, such as 300"),
    "negative watts": ({"maxWatts": -1}, "watts, such as 300"),
    "watts beyond all": ({"maxWatts": 100001}, "at most 100000"),
    "watts beyond milliwatts": ({"minWatts": 0.0005}, "watts, such as 300"),
    "a share of nothing": ({"safeDefault": "0%"}, "a share between 1% and 100%"),
    "more than all": ({"safeDefault": "101%"}, "a share between 1% and 100%"),
    "safe default in words": ({"safeDefault": "low"}, "watts, such as 300"),
    "exit unknown": ({"onExit": "leave"}, "'restore', 'hold'"),
    "release unknown": ({"releaseTo": "factory"}, "'original', 'default'"),
    "lease unknown": ({"lease": "30"}, "hold, or release:<seconds>"),
    "lease of nothing": ({"lease": "release:0"}, "at least 6"),
    "lease too short": ({"lease": "release:5.999"}, "at least 6: three heartbeats of the watcher"),
    "lease too short by zeros": ({"lease": "release:000005"}, "at least 6"),
    "lease too long": ({"lease": "release:1000000"}, "at least 6"),
    "scan too fast": ({"scanSeconds": 0.01}, "seconds, at least 0.05"),
    "scan too fast as text": ({"scanSeconds": "0.049"}, "seconds, at least 0.05"),
    "never": ({"reconcileSeconds": "00.00"}, "seconds, at least 0.05"),
    "reconcile too fast as text": ({"reconcileSeconds": "0.01"}, "seconds, at least 0.05"),
    "flag in words": ({"dryRun": "yes"}, "want null or boolean"),
    "readers by name": ({"readerUids": "root"}, "numeric user ids"),
    "readers beyond all": ({"readerUids": "0, 4294967295"}, "below 4294967295"),
    "a reader far beyond": ({"readerUids": "9999999999,1"}, "below 4294967295"),
    "relative path": ({"stateDir": "var/lib"}, "an absolute path"),
    "socket path too long": ({"runDir": "/" + "x" * 100}, "at most 94 characters"),
    "cgroup unknown": ({"cgroupRoot": "kubelet"}, "auto, or a cgroup path"),
    "cgroups, one without a slash": ({"cgroupRoot": "/a,b"}, "auto, or a cgroup path"),
    "cgroups, one empty": ({"cgroupRoot": "/a,,/b"}, "auto, or a cgroup path"),
    "IPv6 without brackets": ({"metricsAddr": ":::9100"}, "0.0.0.0:9100"),
    "a bracket alone": ({"metricsAddr": "[::1:9100"}, "0.0.0.0:9100"),
    "address without port": ({"metricsAddr": "0.0.0.0"}, "0.0.0.0:9100"),
    "port beyond all": ({"metricsAddr": ":65536"}, "0.0.0.0:9100"),
    "log level unknown": ({"logLevel": "trace"}, "'debug', 'info', 'warning', 'error'"),
    "log format unknown": ({"logFormat": "xml"}, "'json', 'text'"),
}  # fmt: skip


def both_parse(environment: dict[str, str]) -> None:
    parse_settings(EnforcerSettings, environment)
    parse_settings(WatcherSettings, environment | {"NODE_NAME": "n"})


@pytest.mark.parametrize("case", SETTINGS_REFUSED)
def test_helm_refuses_in_clear_words_what_the_agent_would_refuse(case: str) -> None:
    values, words = SETTINGS_REFUSED[case]
    assert words in refusal({"settings": values})
    environment = {
        variable(key): str(each) for key, each in values.items() if each is not None
    }  # fmt: skip
    with pytest.raises(SettingsError):
        both_parse(environment)


# At the edges of what is refused: as the agent takes them, so does helm.
SETTINGS_TAKEN: list[Object] = [
    {"lease": "hold"},
    {"lease": "release:6"},
    {"lease": "release:000006.000"},
    {"lease": "release:10"},
    {"lease": "release:999999.999"},
    {"scanSeconds": "0.05", "reconcileSeconds": "0.050"},
    {"scanSeconds": "0.1", "reconcileSeconds": "00.06"},
    {"scanSeconds": "10", "reconcileSeconds": "999999"},
    {"readerUids": "0,4294967294 , 1000"},
    {"readerUids": "0429496729,3999999999"},
    {"metricsAddr": "[::]:9100"},
    {"metricsAddr": ":9100"},
    {"cgroupRoot": "/, /kubelet.slice ,/x"},
    {"metricsAddr": "10.127.0.1:9100"},
]


@pytest.mark.parametrize("values", SETTINGS_TAKEN)
def test_helm_takes_what_the_agent_takes(values: Object) -> None:
    assert "DaemonSet" in kinds(render({"settings": values}))
    both_parse({variable(key): str(each) for key, each in values.items()})


LOOPBACKS = ("127.0.0.1:9100", "localhost:9100", "[::1]:9100", "[::ffff:127.0.0.1]:1")


@pytest.mark.parametrize("address", LOOPBACKS)
def test_metrics_where_no_probe_reaches_them_are_refused(address: str) -> None:
    words = refusal({"settings": {"metricsAddr": address}})
    assert f"settings.metricsAddr={address}" in words
    assert "name 0.0.0.0 or [::] with the port, or off" in words


REFUSED: dict[str, tuple[Object, str]] = {
    "no tag": ({"image": {"tag": None}}, "missing property 'tag'"),
    "empty tag": ({"image": {"tag": ""}}, "a released version such as v1.0.0"),
    "latest": ({"image": {"tag": "latest"}}, "not latest: nodes would run different ones"),
    "tag that is no tag": ({"image": {"tag": "v1 0"}}, "a released version such as v1.0.0"),
    "digest that is none": ({"image": {"digest": "sha256:1"}}, "sha256:<64 hex digits>"),
    "a stop longer than the pod is given": (
        {"settings": {"exitSeconds": 26}}, "settings.exitSeconds=26, so a stop would be cut off",
    ),
    "a stop longer than supervisord waits": (
        {"settings": {"exitSeconds": 14}, "supervised": True}, "set it to at most 13",
    ),
    "root as watcher": ({"settings": {"watcherUid": 0}}, "minimum: got 0, want 1"),
    "an annotation that is none": (
        {"settings": {"annotation": "a b"}}, "an annotation key such as dynamo",
    ),
    "two namespaces": ({"settings": {"watchNamespace": "a,b"}}, "the name of one namespace"),
    "a value misspelt": ({"settings": {"minWatt": 1}}, "additional properties 'minWatt'"),
    "a group misspelt": ({"setting": {}}, "additional properties 'setting'"),
    "privileges unknown": ({"privileges": "none"}, "'all', 'minimal'"),
    "no node at a time": ({"maxUnavailable": 0}, "maxUnavailable"),
    "an update unknown": ({"updateStrategy": "Recreate"}, "'RollingUpdate', 'OnDelete'"),
    "policies that cross": (
        {"admission": {"enabled": True, "minWatts": 300}, "settings": {"maxWatts": 200}},
        "admission.minWatts=300 is above admission.maxWatts=200",
    ),
    "a stranger's image": (
        {"image": {"pullPolicy": "IfNotPresent"}},
        "would pull image.repository=dynamo/power-agent from docker.io, from an account that",
    ),
    "a stranger's image by its full name": (
        {"image": {"repository": "docker.io/dynamo/power-agent", "pullPolicy": "Always"}},
        "name the registry that you pushed to, pin image.digest, or leave the policy empty",
    ),
    "a ledger in the root": ({"settings": {"stateDir": "/"}}, "settings.stateDir=/ is the whole"),
    "a ledger in a roundabout root": (
        {"settings": {"stateDir": "/var/../"}}, "settings.stateDir=/var/../ is the whole root",
    ),
    "a ledger in the system": (
        {"settings": {"stateDir": "/etc/power-agent"}},
        "settings.stateDir=/etc/power-agent is the system's own: name a folder of its own, such as",
    ),
    "sockets over the image": ({"settings": {"runDir": "/opt/power-agent"}}, "is the system's own"),
    "a kubelet in the root": ({"settings": {"kubeletDir": "/"}}, "settings.kubeletDir=/ is the"),
    "a ledger in another's folder": (
        {"settings": {"stateDir": "/var/lib/kubelet", "kubeletDir": "off"}},
        "settings.stateDir=/var/lib/kubelet belongs to another program of the node",
    ),
    "writers, and nobody looks": (
        {"admission": {"writerGroups": ["power-operators"]}},
        "admission.enabled=false lets everybody",
    ),
    "peers, and nobody looks": (
        {"networkPolicy": {"from": [{"podSelector": {}}]}},
        "networkPolicy.enabled=false lets everybody",
    ),
    "policies that deny and warn": (
        {"admission": {"enabled": True, "actions": ["Deny", "Warn"]}}, "leave one out",
    ),
    "a path with dots": (
        {"settings": {"stateDir": "/var/lib/x/../y"}}, "as /var/lib/y",
    ),
    "the node's root as driver": (
        {"driver": {"hostPath": "/", "libraryPath": "/usr/local/nvidia/lib64"}},
        "driver.hostPath=/ is the whole root",
    ),
    "a library elsewhere": (
        {"driver": {"hostPath": "/opt/nvidia", "libraryPath": "/opt/nvidia/lib"}},
        "driver.libraryPath=/opt/nvidia/lib is not below driver.mountPath=/usr/local/nvidia",
    ),
    "a ledger among the sockets": (
        {"settings": {"stateDir": "/run/power-agent/state"}}, "lie one inside the other",
    ),
    "a monitor of nothing": (
        {"settings": {"metricsAddr": "off"}, "monitoring": {"podMonitor": {"enabled": True}}},
        "monitoring.podMonitor.enabled=true, but settings.metricsAddr=off serves no metrics",
    ),
    "alerts on nothing": (
        {"settings": {"metricsAddr": "off"}, "monitoring": {"prometheusRule": {"enabled": True}}},
        "monitoring.prometheusRule.enabled=true, but settings.metricsAddr=off",
    ),
    "a monitor without its Service": (
        {"monitoring": {"serviceMonitor": {"enabled": True}}},
        "set monitoring.service.enabled=true too",
    ),
    "all series twice": (
        {"monitoring": {each: {"enabled": True} for each in (
            "service", "serviceMonitor", "podMonitor",
        )}},
        "scraped and counted twice",
    ),
    "an alert that is none": (
        {"monitoring": {"prometheusRule": {"enabled": True, "disabled": ["PowerAgentUp"]}}},
        "names PowerAgentUp, which is no alert of the chart: name one of PowerAgentDown",
    ),
    "a default below the bounds": (
        {"settings": {"minWatts": 300, "safeDefault": 200}},
        "settings.safeDefault=200 is below settings.minWatts=300, so it would never be set",
    ),
    "a default above the bounds": (
        {"settings": {"maxWatts": "300", "safeDefault": "350.5"}},
        "settings.safeDefault=350.5 is above settings.maxWatts=300",
    ),
    "policies above the bounds": (
        {"settings": {"maxWatts": 300}, "admission": {
            "enabled": True, "minWatts": 400, "maxWatts": 500}},
        "admission.minWatts=400 is above settings.maxWatts=300: every limit that may be written",
    ),
    "policies below the bounds": (
        {"settings": {"minWatts": 300}, "admission": {
            "enabled": True, "minWatts": 100, "maxWatts": 200}},
        "admission.maxWatts=200 is below settings.minWatts=300: every limit that may be written",
    ),
    "every node": (
        {"nodeSelector": None}, "so every node would get a privileged pod, with a GPU or without",
    ),
    "every node that is only liked": (
        {"nodeSelector": {"nvidia.com/gpu.present": None}, "affinity": {"nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": []}}},
        "name a label of your GPU nodes, or set allNodes=true",
    ),
    "every node and one label": ({"allNodes": True}, "set nodeSelector=null, or allNodes=false"),
    "a label of the chart's": ({"podLabels": {"app": "other"}}, "podLabels names app, by which"),
    "a setting as a variable": (
        {"extraEnv": [{"name": "POWER_AGENT_MIN_WATTS", "value": "1"}]},
        "extraEnv names POWER_AGENT_MIN_WATTS: set settings.minWatts",
    ),
    "a variable of the chart's": (
        {"enforcer": {"extraEnv": [{"name": "NVIDIA_VISIBLE_DEVICES", "value": "0"}]}},
        "enforcer.extraEnv sets what the chart sets; use driver.visibleDevices",
    ),
    "a variable twice": (
        {"extraEnv": [{"name": "A"}], "watcher": {"extraEnv": [{"name": "A"}]}},
        "extraEnv says A twice for one container",
    ),
    "a volume of the chart's": (
        {"extraVolumes": [{"name": "state"}]}, "extraVolumes names state, which is a volume of the",
    ),
    "the ledger for the watcher": (
        {"watcher": {"extraVolumeMounts": [{"name": "state", "mountPath": "/state"}]}},
        "watcher.extraVolumeMounts names state, which extraVolumes does not have",
    ),
    "a volume over the sockets": (
        {"extraVolumes": [{"name": "a"}],
         "extraVolumeMounts": [{"name": "a", "mountPath": "/run/power-agent/x"}]},
        "extraVolumeMounts a (/run/power-agent/x) and settings.runDir (/run/power-agent) lie one",
    ),
    "labels of SELinux twice": (
        {"seLinux": {"enabled": True}, "seLinuxOptions": {"type": "spc_t"}}, "use one of them",
    ),
    "a probe cut short": (
        {"probes": {"enforcer": {"liveness": {"timeoutSeconds": 5}}}},
        "probes.enforcer.liveness.timeoutSeconds=5 would end a probe that may ask for 8 seconds",
    ),
    "nobody in blanks": (
        {"admission": {"enabled": True, "writers": ["a b"]}}, "admission/writers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_helm_refuses_in_clear_words(case: str) -> None:
    values, words = REFUSED[case]
    assert words in refusal(values)


def test_what_a_cluster_is_too_old_for_is_refused() -> None:
    old = ("--kube-version", "1.29.0")
    assert "needs Kubernetes 1.30" in refusal({"admission": {"enabled": True}}, *old)
    assert "needs Kubernetes 1.30" in refusal({"privileges": "minimal"}, *old)
    assert "DaemonSet" in kinds(render({}, *old))


# ---------------------------------------------------------------------- options


def test_a_digest_pins_the_image() -> None:
    digest = "sha256:" + "0" * 64
    for container in containers(render({"image": {"digest": digest}})).values():
        assert container["image"] == f"dynamo/power-agent:v{__version__}@{digest}"


PULLED = {
    "dynamo/power-agent": "Never",
    "docker.io/dynamo/power-agent": "Never",
    "index.docker.io/dynamo/power-agent": "Never",
    "power-agent": "Never",
    "docker.io/example/power-agent": "IfNotPresent",
    "images.example.com/dynamo/power-agent": "IfNotPresent",
    "localhost:5000/power-agent": "IfNotPresent",
}


@pytest.mark.parametrize("repository", PULLED)
def test_nothing_is_pulled_from_an_account_that_is_not_ours(repository: str) -> None:
    """The pod of `helm test` too."""
    made = render({"image": {"repository": repository}})
    found = [
        *containers(made).values(),
        *named(made)["Pod", "power-agent-test"]["spec"]["containers"],
    ]
    assert {each["imagePullPolicy"] for each in found} == {PULLED[repository]}


def test_pinned_bytes_may_be_pulled_from_anywhere() -> None:
    image = {"digest": "sha256:" + "0" * 64, "pullPolicy": "IfNotPresent"}
    for container in containers(render({"image": image})).values():
        assert container["imagePullPolicy"] == "IfNotPresent"


def test_a_cluster_without_the_runtime_class() -> None:
    assert "runtimeClassName" not in template(render({"runtimeClassName": ""}))["spec"]


def test_two_releases_keep_apart() -> None:
    """One for each kind of node, with bounds of its own."""
    one, other = render(), render(release="blue", namespace="blue")
    assert not named(one).keys() & named(other).keys()
    (blue,) = [each for each in other if each["kind"] == "DaemonSet"]
    assert blue["metadata"]["name"] == "blue-power-agent"
    assert blue["spec"]["selector"]["matchLabels"]["app.kubernetes.io/instance"] == "blue"
    assert blue["spec"]["template"]["metadata"]["labels"]["app"] == "power-agent"


def test_events_add_one_rule() -> None:
    rules = named(render({"settings": {"events": True}}))["ClusterRole", "power-agent"]["rules"]
    assert rules == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]},
    ]


def test_nothing_optional_is_there_by_default() -> None:
    assert kinds(render({}, "--no-hooks")) == {
        "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "DaemonSet",
    }  # fmt: skip


def test_the_network_policy_leaves_the_metrics_port_and_the_api_server() -> None:
    peer = {"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}
    address = {"ipBlock": {"cidr": "10.0.0.1/32"}}
    values = {"enabled": True, "from": [peer], "apiServer": [address]}
    (policy,) = [
        each for each in render({"networkPolicy": values}) if each["kind"] == "NetworkPolicy"
    ]
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert policy["spec"]["ingress"] == [
        {"ports": [{"protocol": "TCP", "port": 9100}], "from": [peer]}
    ]
    assert policy["spec"]["egress"] == [
        {
            "ports": [{"protocol": "TCP", "port": port} for port in (443, 6443)],
            "to": [address],
        }
    ]
    labels = template(render({"networkPolicy": values}))["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_network_policy_without_metrics_lets_nobody_in() -> None:
    values = {"networkPolicy": {"enabled": True}, "settings": {"metricsAddr": "off"}}
    (policy,) = [each for each in render(values) if each["kind"] == "NetworkPolicy"]
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policy["spec"]


def test_the_policies_take_the_agents_bounds_and_annotation() -> None:
    values = {
        "settings": {"minWatts": 100, "maxWatts": 700, "annotation": "example.com/limit"},
        "admission": {"enabled": True, "maxWatts": 600, "writers": ["a", "b"]},
    }
    objects = named(render(values))
    assert objects["ConfigMap", "power-agent-policy"]["data"] == {
        "minWatts": "100", "maxWatts": "600", "writers": "a\nb", "writerGroups": "",
    }  # fmt: skip
    text = json.dumps([each for (kind, _), each in objects.items() if kind.startswith("Valid")])
    assert "example.com/limit" in text
    assert "dynamo.nvidia.com" not in text


def test_the_minimal_form_of_one_container_can_change_user_and_no_more() -> None:
    found = containers(render({"privileges": "minimal", "supervised": True}))
    assert found["power-agent"]["securityContext"]["capabilities"] == {
        "drop": ["ALL"],
        "add": ["SYS_ADMIN", "SYS_PTRACE", "SETUID", "SETGID", "KILL"],
    }


def test_supervisords_folder_for_temporary_files_can_be_written() -> None:
    """On a read-only root; the image names the default folder."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"\nENV TMPDIR={DEFAULT_RUN_DIR}\n" in dockerfile
    values: Object = {"supervised": True, "settings": {"runDir": "/run/elsewhere"}}
    found = containers(render(values))["power-agent"]
    assert literals(found)["TMPDIR"] == "/run/elsewhere"
    assert "/run/elsewhere" in [each["mountPath"] for each in found["volumeMounts"]]
    assert "TMPDIR" not in literals(containers(render({"supervised": True}))["power-agent"])


def test_the_notes_say_how_to_see_it_work() -> None:
    text = helm(
        *("install", "power-agent", str(CHART), "--namespace", NAMESPACE),
        *("--dry-run=client", "--set", "settings.dryRun=true"),
    ).partition("NOTES:")[2]
    for command in (
        "kubectl get ds -n dynamo-system power-agent",
        "helm test power-agent -n dynamo-system",
        "-c enforcer -- powerctl status",
        "kubectl annotate pod POD dynamo.nvidia.com/gpu-power-limit=350",
        "nodes pull nothing: dynamo/power-agent:v1.0.0 has to be on each of them",
    ):
        assert command in text
    assert "DRY RUN" in text
    assert "<no value>" not in text


def test_the_chart_packages_whole(tmp_path: Path) -> None:
    helm("package", str(CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.iterdir()
    listed = subprocess.run(
        ["tar", "-tzf", package], capture_output=True, text=True, check=True
    ).stdout.split()  # fmt: skip
    sources = {str(path.relative_to(CHART)) for path in CHART.rglob("*") if path.is_file()}
    assert {each.removeprefix("power-agent/") for each in listed} == sources


# ---------------------------------------------------------------------- what people add

EXTRAS: Object = {
    "extraEnv": [{"name": "NO_PROXY", "value": ".svc"}],
    "extraVolumes": [{"name": "ca", "configMap": {"name": "ca"}}, {"name": "c", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "c", "mountPath": "/c"}],
    "watcher": {
        "extraEnv": [{"name": "SSL_CERT_FILE", "value": "/ca/ca.crt"}],
        "extraVolumeMounts": [{"name": "ca", "mountPath": "/ca", "readOnly": True}],
    },
    "enforcer": {"extraEnv": [{"name": "LD_BIND_NOW", "value": "1"}]},
    "seLinuxOptions": {"type": "own_t"},
}


@pytest.mark.parametrize("supervised", [False, True])
def test_what_is_added_is_in_the_containers_that_it_is_for(supervised: bool) -> None:
    made = render(EXTRAS | {"supervised": supervised})
    found = containers(made)
    assert {"ca", "c"} <= {each["name"] for each in template(made)["spec"]["volumes"]}
    wanted = {"watcher": {"NO_PROXY", "SSL_CERT_FILE"}, "enforcer": {"NO_PROXY", "LD_BIND_NOW"}}
    mounted = {"watcher": {"/c", "/ca"}, "enforcer": {"/c"}}
    for name, container in found.items():
        for added, got in (
            (wanted, {each["name"] for each in container["env"]}),
            (mounted, {each["mountPath"] for each in container["volumeMounts"]}),
        ):
            every = set().union(*added.values())
            assert got & every == (every if supervised else added[name])
        assert container["securityContext"]["seLinuxOptions"] == {"type": "own_t"}


def test_probes_have_the_numbers_that_they_are_given() -> None:
    probes = {
        "watcher": {"liveness": None, "startup": {"failureThreshold": 90}},
        "enforcer": {"readiness": {"timeoutSeconds": 30, "initialDelaySeconds": 5}},
    }
    made, plain = containers(render({"probes": probes})), containers(render())
    assert "livenessProbe" not in made["watcher"]
    startup, before = (each["watcher"]["startupProbe"] for each in (made, plain))
    assert startup == before | {"failureThreshold": 90}
    readiness, before = (each["enforcer"]["readinessProbe"] for each in (made, plain))
    assert readiness == before | {"timeoutSeconds": 30, "initialDelaySeconds": 5}


RELABEL = {"targetLabel": "cluster", "replacement": "one"}
DROP = {"sourceLabels": ["__name__"], "regex": "python_.*", "action": "drop"}


@pytest.mark.parametrize("kind", ["podMonitor", "serviceMonitor"])
def test_both_monitors_scrape_alike_and_are_relabelled(kind: str) -> None:
    more = {"enabled": True, "relabelings": [RELABEL], "metricRelabelings": [DROP]}
    values = {"service": {"enabled": kind == "serviceMonitor"}, kind: more}
    made = named(render({"monitoring": values, "fullnameOverride": "gpu-limits"}))
    monitor = made[kind[0].upper() + kind[1:], "gpu-limits"]["spec"]
    (endpoint,) = monitor.get("podMetricsEndpoints") or monitor["endpoints"]
    assert (endpoint["port"], endpoint["honorLabels"]) == ("metrics", True)
    assert [each["targetLabel"] for each in endpoint["relabelings"]] == ["node", "cluster"]
    assert endpoint["metricRelabelings"] == [DROP]
    # The alerts know the agent by its job's name, whatever the release is called.
    assert monitor["jobLabel"] == "app"


def test_the_service_leads_to_every_agent_and_its_monitor_to_it() -> None:
    values = {each: {"enabled": True} for each in ("service", "serviceMonitor")}
    made = named(render({"monitoring": values, "settings": {"metricsAddr": ":9200"}}))
    service = made["Service", "power-agent"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert [each["port"] for each in service["spec"]["ports"]] == [9200]
    pods = made["DaemonSet", "power-agent"]["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= pods.items()
    wanted = made["ServiceMonitor", "power-agent"]["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= service["metadata"]["labels"].items()


def test_single_alerts_can_be_left_out() -> None:
    def alerts(disabled: list[str]) -> list[str]:
        values = {"prometheusRule": {"enabled": True, "disabled": disabled}}
        rule = named(render({"monitoring": values}))["PrometheusRule", "power-agent"]
        rules = [each for group in rule["spec"]["groups"] for each in group["rules"]]
        return [each["alert"] for each in rules if "alert" in each]

    every = alerts([])
    off = [every[0], every[-1]]
    assert alerts(off) == [each for each in every if each not in off]


def test_helm_test_runs_where_the_agent_does() -> None:
    """Other nodes may not have the image, and pull none."""
    wanted: Object = {
        "nodeSelector": {"nvidia.com/gpu.present": None, "example.com/gpu": "yes"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
    }
    made = named(render(wanted))
    test = made["Pod", "power-agent-test"]["spec"]
    agent = template(list(made.values()))["spec"]
    for field in ("nodeSelector", "tolerations", "affinity"):
        assert test[field] == agent[field], field
    assert test["nodeSelector"] == {"example.com/gpu": "yes"}


def test_an_update_may_wait_for_whoever_deletes_the_pods() -> None:
    daemonset = named(render({"updateStrategy": "OnDelete"}))["DaemonSet", "power-agent"]
    assert daemonset["spec"]["updateStrategy"] == {"type": "OnDelete"}


def test_every_node_if_it_is_said() -> None:
    spec = template(render({"allNodes": True, "nodeSelector": None}))["spec"]
    assert "nodeSelector" not in spec


# ---------------------------------------------------------------------- names, accounts


@pytest.mark.parametrize("supervised", [False, True])
def test_claims_show_the_kubelets_root_to_roots_container_alone(supervised: bool) -> None:
    values: Object = {"dra": True, "supervised": supervised}
    made = render(values | {"settings": {"kubeletDir": "/var/lib/k0s/kubelet/"}})
    volumes = {each["name"]: each for each in template(made)["spec"]["volumes"]}
    assert volumes["kubelet"]["hostPath"] == {"path": "/var/lib/k0s/kubelet", "type": "Directory"}
    mounted = {
        name: mount
        for name, container in containers(made).items()
        for mount in container["volumeMounts"]
        if mount["name"] == "kubelet"
    }
    assert mounted == {
        "power-agent" if supervised else "enforcer": {
            "name": "kubelet",
            "mountPath": "/var/lib/k0s/kubelet",
            "readOnly": True,
            "mountPropagation": "HostToContainer",
        }
    }
    assert "settings.kubeletDir=off names none" in refusal(
        values | {"settings": {"kubeletDir": "off"}}
    )
    assert "dra" in refusal({"dra": "yes"})


def test_without_the_kubelets_word_nothing_of_it_is_mounted() -> None:
    made = render({"settings": {"kubeletDir": "off"}})
    assert "POWER_AGENT_KUBELET_DIR" not in literals(containers(made)["enforcer"])
    assert "kubelet" not in {each["name"] for each in template(made)["spec"]["volumes"]}


def test_an_account_of_ones_own_is_bound_and_not_made() -> None:
    made = render({"serviceAccount": {"create": False, "name": "own"}})
    assert "ServiceAccount" not in kinds(made)
    assert template(made)["spec"]["serviceAccountName"] == "own"
    assert named(made)["Pod", "power-agent-test"]["spec"]["serviceAccountName"] == "own"
    assert named(made)["ClusterRoleBinding", "power-agent"]["subjects"][0]["name"] == "own"


def test_an_account_has_the_annotations_that_it_is_given() -> None:
    made = render({"serviceAccount": {"annotations": {"a": "b"}}, "rbac": {"create": False}})
    assert named(made)["ServiceAccount", "power-agent"]["metadata"]["annotations"] == {"a": "b"}
    assert not {each for each in kinds(made) if "Role" in each}


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"fullnameOverride": "gpu-power"}, "gpu-power"),
        ({"nameOverride": "limits"}, "power-agent-limits"),
    ],
)
def test_names_can_be_overridden_and_the_contracts_labels_stay(values: Object, name: str) -> None:
    made = named(render(values))
    assert ("DaemonSet", name) in made
    labels = made["DaemonSet", name]["spec"]["template"]["metadata"]["labels"]
    assert labels["app"] == "power-agent"
    assert labels["app.kubernetes.io/component"] == "agent"


def test_the_grace_period_is_longer_than_a_stop_takes() -> None:
    made = render({"terminationGracePeriodSeconds": 65, "settings": {"exitSeconds": 60}})
    assert template(made)["spec"]["terminationGracePeriodSeconds"] == 65
    for values in (
        {"terminationGracePeriodSeconds": 14},
        {"settings": {"exitSeconds": 30}},
    ):
        assert "so a stop would be cut off before GPUs are given back" in refusal(values)


def test_under_supervisord_the_grace_period_is_as_long_as_its_stops_together() -> None:
    """It stops the watcher first, and the enforcer gets what is left."""
    conf = (ROOT / "supervisord.conf").read_text()
    stops_s = sum(int(each) for each in re.findall(r"^stopwaitsecs=(\d+)$", conf, re.MULTILINE))
    values: Object = {"supervised": True, "settings": {"exitSeconds": 1}}
    made = render(values | {"terminationGracePeriodSeconds": stops_s})
    assert template(made)["spec"]["terminationGracePeriodSeconds"] == stops_s
    words = refusal(values | {"terminationGracePeriodSeconds": stops_s - 1})
    assert f"supervisord takes up to {stops_s} to stop watcher, enforcer and watchdog" in words
