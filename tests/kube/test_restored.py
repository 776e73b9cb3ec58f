"""A real cluster that is restored from a backup, as the watcher meets it."""

from __future__ import annotations

import pytest

from tests.chaos.scale import whole_only
from tests.kube.agent_node import Audit
from tests.kube.conftest import MakeNode
from tests.kube.test_end_to_end import logged, wait_for_watch


@whole_only
@pytest.mark.timeout(180)
def test_a_restored_cluster_is_followed_soon(make_node: MakeNode, audit: Audit) -> None:
    """The versions go back with a backup: a watch that goes on where it was brings nothing."""
    node = make_node(gpus=3)
    changed = node.add_pod("changed", limit=350, gpus=[0])
    node.add_pod("kept", limit=400, gpus=[1])
    node.wait_for_limit(1, 400)
    node.cluster.back_up()
    for watts in range(200, 300):
        node.annotate(changed, watts)
    node.add_pod("lost", limit=450, gpus=[2])
    node.wait_for_limit(0, 299)
    node.wait_for_limit(2, 450)
    wait_for_watch(node, audit)
    node.cluster.restore()
    node.wait_for_limit(0, 350, deadline_s=120)  # the first watch was silent for a minute
    wait_for_watch(node, audit)
    node.annotate(changed, 310)
    node.wait_for_limit(0, 310)
    # At the start, what is no older (refused: the server is not so far), and what there is now.
    assert audit.count("list", node.name) == 3
    assert len(logged(node, "kubernetes_restored")) == 1
    assert (node.limit_mw(1), node.limit_mw(2)) == (400_000, 450_000)  # its processes still run
