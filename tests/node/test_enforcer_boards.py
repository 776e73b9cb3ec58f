"""Boards and drivers that tell what is no text, or not all, under the whole enforcer process."""

from __future__ import annotations

import pytest

from shared.powerctl.explain import explain
from tests.node.enforcer_harness import EnforcerNode, pod_uid

A, B = pod_uid(1), pod_uid(2)
NOT_SUPPORTED, FUNCTION_NOT_FOUND, UNKNOWN = 3, 13, 999
# What a driver was seen to write where a name belongs, a cut character, and nothing at all.
NO_TEXTS = [b"\xf8\x10\x00", b"\xe2\x82", b"\x00\xf8"]
FACTS = {
    "nvmlDeviceGetName": "name",
    "nvmlDeviceGetPowerManagementDefaultLimit": "default_mw",
    "nvmlDeviceGetEnforcedPowerLimit": "enforced_mw",
    "nvmlDeviceGetPowerUsage": "power_mw",
    "nvmlDeviceGetPersistenceMode": "persistence",
}


def runs_two_pods(node: EnforcerNode) -> None:
    node.start()
    node.run_pod(A, 0)
    node.run_pod(B, 1)
    node.snapshot({A: 300, B: 400})


@pytest.mark.parametrize("text", NO_TEXTS)
def test_a_name_that_is_no_text_is_decoration(text: bytes) -> None:
    with EnforcerNode() as node:
        (node.gpus[0].folder / "name").write_bytes(text)
        runs_two_pods(node)
        assert (node.limit(0), node.limit(1)) == (300, 400)
        assert not node.gpu(0).name
        assert node.status().enforcer.nvml_message == "ok"


def test_a_driver_version_that_is_no_text_is_unknown() -> None:
    with EnforcerNode() as node:
        (node.gpus.directory / "driver").write_bytes(b"\xf8\x10\x00")
        runs_two_pods(node)
        assert (node.limit(0), node.limit(1)) == (300, 400)
        assert node.status().enforcer.driver_version is None


@pytest.mark.parametrize("text", NO_TEXTS)
def test_i11_a_gpu_without_a_uuid_is_a_fault_of_its_own_and_who_waits_for_it_is_told(
    text: bytes,
) -> None:
    with EnforcerNode() as node:
        (node.gpus[0].folder / "uuid").write_bytes(text)
        runs_two_pods(node)
        assert (node.limit(0), node.limit(1)) == (700, 400)
        enforcer, pod = node.status().enforcer, node.pod(A)
        assert enforcer.nvml == "ok"
        assert (pod.state, node.pod(B).state) == ("waiting", "enforced")
        for said in (enforcer.nvml_message, pod.reason):
            assert "GPU 0: nvmlDeviceGetUUID: NO_TEXT; what the driver answers is no text" in said


def test_i11_of_two_gpus_with_one_uuid_the_first_is_served() -> None:
    with EnforcerNode(gpus=3) as node:
        (node.gpus[1].folder / "uuid").write_text(node.gpus[0].uuid)
        node.start()
        node.run_pod(A, 0)
        node.run_pod(B, 2)
        node.snapshot({A: 300, B: 400})
        assert [node.limit(number) for number in range(3)] == [300, 700, 400]
        said = node.status().enforcer.nvml_message
        assert said == "GPU 1: nvmlDeviceGetUUID: NOT_UNIQUE; another GPU answers the same"


@pytest.mark.parametrize("error", [NOT_SUPPORTED, FUNCTION_NOT_FOUND, UNKNOWN])
@pytest.mark.parametrize("function", FACTS)
def test_a_board_that_does_not_tell_one_thing_has_its_limit(function: str, error: int) -> None:
    with EnforcerNode(release_to="default") as node:
        node.gpus[0].limit_mw = 650_000
        node.gpus[0].fault(function, error=error)
        runs_two_pods(node)
        assert (node.limit(0), node.limit(1)) == (300, 400)
        told = {name: getattr(node.gpu(0), name) for name in FACTS.values()}
        assert [name for name, value in told.items() if value is None] == [FACTS[function]]
        assert node.pod(A).state == "enforced"
        assert node.stop() == 0
        # To the factory default, or as found where that is not known.
        assert node.limit(0) == (650 if "DefaultLimit" in function else 700)


@pytest.mark.parametrize("default", ["missing", "0"])
def test_a_share_of_a_default_that_is_not_known_is_refused_in_words(default: str) -> None:
    with EnforcerNode(safe_default="70%") as node:
        file = node.gpus[0].folder / "default_mw"
        file.unlink() if default == "missing" else file.write_text(default)
        node.start()
        node.run_pod(A, 0)
        node.run_pod(B, 1)
        node.snapshot({A: None, B: None})
        assert (node.limit(0), node.limit(1)) == (700, 490)
        found = explain(node.status(), "0")
        assert found is not None
        text = "\n".join(found.text)
        assert "failed: left alone: 70% of its default, which is not known" in text
        assert "factory default -" in text
