"""Fixtures of the nodes' tests: one real ComfyUI for all of them, with this pack linked in.

python3 dev/run.py test sets COMFYUI_PATH and REQUIRE_COMFYUI. Without the first one there is nothing to test against;
the second turns the skip into a failure, so that CI is never green on nothing.
"""

import os
from pathlib import Path

import pytest
from comfy_server import ComfyServer, sigterm_as_interrupt

ROOT = Path(__file__).resolve().parents[2]
PACK = "wan_s2v"


@pytest.fixture(scope="session")
def comfy():
    """A running server; its `base` holds models, input, output and temp."""
    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui:
        if os.environ.get("REQUIRE_COMFYUI"):
            pytest.fail("REQUIRE_COMFYUI is set and COMFYUI_PATH is not. Run python3 dev/run.py test.")
        pytest.skip("COMFYUI_PATH is not set. Run python3 dev/run.py test.")
    sigterm_as_interrupt()
    with ComfyServer(Path(comfyui), {PACK: ROOT}, environment={"OMP_NUM_THREADS": "2"}) as server:
        assert server.import_problems() == []
        yield server


@pytest.fixture(scope="session")
def pack_nodes(comfy) -> list[str]:
    """The ids of this pack's nodes, as the server lists them."""
    return comfy.pack_nodes()[PACK]


@pytest.fixture
def run(comfy):
    """Run a prompt in API format -> comfy_client.Run; takes the options of ComfyClient.run."""
    return comfy.client.run
