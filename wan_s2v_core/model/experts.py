"""A feed-forward of experts: a gate chooses for each token which of them see it, and the weighted results add up.

Terms as in GShard (arXiv 2006.16668) and Switch Transformer (arXiv 2101.03961).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import UNWEIGHTED, ExpertRouting, JsonConfig

ROWS_AT_ONCE = 4096
"""Tokens of which float32 copies are held while they are scored or added up."""


@dataclass(frozen=True)
class Share:
    """What one expert takes at once: the numbers of the tokens, rising, and how much the result counts for each."""

    expert: int
    tokens: Tensor
    weights: Tensor | None
    """float32; None where all are 1."""
    first: int | None = None
    """The first token, where the others follow it without a gap: every token has chosen the expert."""

    def rows(self, x: Tensor) -> Tensor:
        """The rows of its tokens, of L E; a view where they follow one another."""
        return x[self.tokens] if self.first is None else x[self.first : self.first + len(self.tokens)]


Round = list[Share]
"""At most one share per expert."""
ApplyExperts = Callable[[Tensor, Sequence[nn.Module], list[Round]], Tensor]
"""(tokens: L E, experts, rounds) -> L E in float32, the weighted sum for each token."""


def apply_each(x: Tensor, experts: Sequence[nn.Module], rounds: list[Round]) -> Tensor:
    """The plain sum at the `apply_experts` seam: one expert after the other, which bounds the activations."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for shares in rounds:
        for share in shares:
            add_share(out, share, experts[share.expert](share.rows(x)))
    return out


def add_share(out: Tensor, share: Share, rows: Tensor) -> None:
    """Add an expert's results, one row for each of its tokens, to the sum L E."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        added = rows[part] if share.weights is None else rows[part] * share.weights[part, None]
        if share.first is None:
            out.index_add_(0, share.tokens[part], added.float())
        else:
            share.rows(out)[part].add_(added)


@dataclass(frozen=True)
class ExpertLoad(JsonConfig):
    """How much each expert had to do, over all layers and steps that are added up."""

    tokens: int = 0
    """Tokens that came to the feed-forward; counted again in every layer and step."""
    chosen: tuple[int, ...] = ()
    """Of each expert: tokens that chose it."""
    overflow: tuple[int, ...] = ()
    """Those beyond its capacity."""
    dropped: tuple[int, ...] = ()
    """Those that skipped it because of that."""

    def __add__(self, other: "ExpertLoad") -> "ExpertLoad":
        if not self.chosen or not other.chosen:
            return self if self.chosen else other
        pairs = ((self.chosen, other.chosen), (self.overflow, other.overflow), (self.dropped, other.dropped))
        return ExpertLoad(
            self.tokens + other.tokens, *(tuple(a + b for a, b in zip(*pair, strict=True)) for pair in pairs)
        )

    def __str__(self) -> str:
        """A table, one line per expert, in percent of all tokens."""
        if not self.tokens:
            return "no tokens have come to any expert"
        lines = ["expert   tokens  overflow  dropped"]
        for number, counts in enumerate(zip(self.chosen, self.overflow, self.dropped, strict=True)):
            chosen, overflow, dropped = (100 * count / self.tokens for count in counts)
            lines.append(f"{number:>6}  {chosen:>6.1f}%  {overflow:>7.1f}%  {dropped:>6.1f}%")
        return "\n".join(lines)


@dataclass
class GateRecord:
    """What the gate said in the last forward of training, for balance losses."""

    logits: Tensor = field(repr=False)
    """L X, X experts, before anything was masked."""
    taken: Tensor = field(repr=False)
    """L X: whether the expert was chosen for the token."""


class Gate(nn.Linear):
    """One logit per token and expert, in float32 whatever the precision of the tokens (Switch, section 2.4)."""

    def __init__(self, width: int, num_experts: int):
        super().__init__(width, num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # L E -> L X
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([F.linear(rows.float(), self.weight.float()) for rows in x.split(ROWS_AT_ONCE)])


class ProbeGate(nn.Module):
    """Scores of experts from the activations of a few neurons of each: readout @ |gelu(probes)| + offset. After CMoE
    (arXiv 2502.04416); the formula is our own."""

    def __init__(self, width: int, num_experts: int, probes: int):
        super().__init__()
        seen = num_experts * probes
        self.weight, self.bias = nn.Parameter(torch.zeros(seen, width)), nn.Parameter(torch.zeros(seen))
        self.readout = nn.Parameter(torch.zeros(num_experts, seen))
        self.offset = nn.Parameter(torch.zeros(num_experts))

    def forward(self, x: Tensor) -> Tensor:  # L E -> L X
        return torch.cat([self.score(rows) for rows in x.split(ROWS_AT_ONCE)])

    def score(self, x: Tensor) -> Tensor:
        seen = probe_features(F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)))
        return F.linear(seen.float(), self.readout.float(), self.offset.float())


def probe_features(before: Tensor) -> Tensor:
    """What the gate sees of neurons, given their values before the activation."""
    return F.gelu(before, approximate="tanh").abs()


class RoutedFeedForward(nn.Module):
    """Experts and a gate. `routing` is set from outside; `apply_experts` is the seam for faster products.

    Args:
        experts: modules from tokens to tokens.
        gate: tokens L E -> logits L X.
        top_k: experts that a token sees, unless `routing` says otherwise.
        gate_over: chosen: weights are a softmax over the chosen experts. all: a softmax over all, of which those of
            the chosen are taken. none: weights are 1.
        bias: E, added for every token; for experts that are parts of a layer with one.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        gate: nn.Module,
        top_k: int,
        gate_over: str,
        bias: Tensor | None = None,
    ):
        super().__init__()
        self.gate, self.experts = gate, nn.ModuleList(experts)
        self.top_k, self.gate_over = top_k, gate_over
        self.bias = None if bias is None else nn.Parameter(bias)
        self.routing = ExpertRouting()
        self.apply_experts: ApplyExperts = apply_each
        self.load = ExpertLoad()
        self.record: GateRecord | None = None

    def forward(self, x: Tensor) -> Tensor:  # B L E
        tokens = x.flatten(0, -2)
        taken, weights = self.choose(self.gate(tokens))
        out = self.apply_experts(tokens, self.experts, list(self.rounds(taken, weights)))
        if self.bias is not None:
            out += self.bias
        return out.to(x.dtype).view_as(x)

    @property
    def is_by_token(self) -> bool:
        """Whether what becomes of a token depends on that token alone, so that they may come in parts."""
        routing = self.routing
        drops_tokens = routing.overflow == "drop" and routing.expert_capacity is not None
        return not (drops_tokens or routing.gate_dropout or self.training)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits -> whether each token sees each expert, and how much that counts (None: in full). Both L X."""
        top_k, scores = self.routing.top_k or self.top_k, self.drop_choices(logits)
        taken = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(top_k, dim=1).indices, True)
        taken &= scores.isfinite()
        self.record = GateRecord(logits, taken) if self.training else None
        if self.gate_over == UNWEIGHTED:
            return taken, None
        if self.gate_over == "chosen":
            scores = scores.masked_fill(~taken, -torch.inf)
        return taken, scores.softmax(dim=1)

    def drop_choices(self, logits: Tensor) -> Tensor:
        """Hide experts from tokens at random, never a token's best one; with fewer left than top_k it sees fewer."""
        routing = self.routing
        if not routing.gate_dropout or not (self.training or routing.gate_dropout_seed is not None):
            return logits
        if self.training:
            draw = torch.rand_like(logits)
        else:  # on the CPU, to be the same on every device
            generator = torch.Generator().manual_seed(routing.gate_dropout_seed)
            draw = torch.rand(logits.shape, generator=generator).to(logits.device)
        hidden = (draw < routing.gate_dropout).scatter(1, logits.argmax(dim=1, keepdim=True), False)
        return logits.masked_fill(hidden, -torch.inf)

    def rounds(self, taken: Tensor, weights: Tensor | None) -> Iterator[Round]:
        """Who takes which tokens when. Both L X.

        The tokens of an expert come in their own order, `expert_capacity` at a time. Dropped tokens lose what the
        expert would have added; the weights of their other experts stay as they are, as in GShard.
        """
        counts = taken.sum(dim=0).tolist()
        limit, drops = self.routing.expert_capacity or len(taken), self.routing.overflow == "drop"
        expert, tokens = taken.T.nonzero(as_tuple=True)  # by expert, then by token
        chosen = tokens.split(counts)
        counted = [None] * len(counts) if weights is None else weights[tokens, expert].split(counts)
        ends = [min(count, limit) if drops else count for count in counts]
        overflow = tuple(max(0, count - limit) for count in counts)
        dropped = tuple(count - end for count, end in zip(counts, ends, strict=True))
        self.load += ExpertLoad(len(taken), tuple(counts), overflow, dropped)
        for start in range(0, max(ends, default=0), limit):
            now = [(index, slice(start, min(start + limit, end))) for index, end in enumerate(ends) if start < end]
            yield [
                Share(
                    expert=index,
                    tokens=chosen[index][part],
                    weights=None if weights is None else counted[index][part],
                    first=start if counts[index] == len(taken) else None,
                )
                for index, part in now
            ]
