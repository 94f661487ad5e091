"""Where the weights of a network lie in main memory while it is on a card."""

from torch import nn


class Home:
    """The tensors of a network as they lie in main memory, to return to without copying them back from a card."""

    def __init__(self, network: nn.Module):
        owners = [held for module in network.modules() for held in (module._parameters, module._buffers)]
        self.places = [
            (held, name, tensor, tensor.data) for held in owners for name, tensor in held.items() if tensor is not None
        ]

    def take_back(self) -> None:
        """Let the network use them again; its copies elsewhere are freed."""
        for held, name, tensor, data in self.places:
            tensor.data = data
            held[name] = tensor
