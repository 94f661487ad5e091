"""Networks that come home from elsewhere, and rooms that are planned for them."""

import pytest
import torch

from wan_s2v_core.acceleration.quantization import swap_linears
from wan_s2v_core.memory.home import Home
from wan_s2v_core.model.text_encoder import TextEncoder

SIZES = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", ["float8 DiT", "umT5 with tied weights"])
def test_a_network_comes_home_as_it_left(kind, inference, make_model):
    """On the way it may lose its values (meta holds none) and its Parameter objects."""
    with torch.inference_mode(inference):
        if kind == "float8 DiT":
            network = make_model()
            swap_linears(network)
        else:
            network = TextEncoder(SIZES)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        tensors = [*network.parameters(), *network.buffers()]
        addresses = [tensor.data_ptr() for tensor in tensors]
        home = Home(network)
        for _ in range(2):
            network.to("meta")
            assert all(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
            home.take_back()
        after = network.state_dict()
        assert all(torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before)
        assert [tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())] == addresses, "no copy"
        if "tied" in kind:
            assert network.network.encoder.embed_tokens.weight is network.network.shared.weight
