"""Private parts of torch: in one module, and only while there is nothing public to take their place."""

import ast
from functools import reduce
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wan_s2v_core import private_torch
from wan_s2v_core.acceleration.quantization import fp8, int8
from wan_s2v_core.libraries import FLOORS, is_older
from wan_s2v_core.private_torch import HAS_GROUPED_PRODUCT, PUBLIC, grouped_product, integer_product, scaled_product

CORE = Path(private_torch.__file__).parent
SUCCEEDED = {name: public for name, public in PUBLIC.items() if public}
NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@pytest.mark.parametrize("name", SUCCEEDED)
def test_a_private_call_goes_once_every_torch_has_the_public_one(name):
    public, since = SUCCEEDED[name]
    assert is_older(FLOORS["torch"], since), f"torch>={FLOORS['torch']} has {public}: call it instead of {name}"
    owner, _, leaf = public.rpartition(".")
    has_it = hasattr(reduce(getattr, owner.split(".")[1:], torch), leaf)
    assert has_it != is_older(torch.__version__, since)


@pytest.mark.parametrize("name", [name for name, public in PUBLIC.items() if not public])
def test_torch_has_not_made_public_what_has_no_successor(name):
    bare = name.strip("_")
    elsewhere = {"parameters", "buffers"}  # what gives them; they cannot be set there
    assert not [owner for owner in (torch, F, nn.Module, nn.Conv3d) if hasattr(owner, bare) and bare not in elsewhere]


def private_names(tree: ast.AST) -> list[str]:
    """Attributes that belong to torch alone, and private ones of its modules."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            spelled = ast.unparse(node.value).split(".")[0]
            found += [node.attr] if node.attr in PUBLIC or spelled in ("torch", "F", "nn") else []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            found += [name for name in names if name.startswith("_")]
    return found


def test_they_are_used_in_one_module():
    homes = {path.name: private_names(ast.parse(path.read_text(encoding="utf-8"))) for path in CORE.rglob("*.py")}
    assert {name for name, found in homes.items() if found} == {"private_torch.py"}
    assert set(homes["private_torch.py"]) == set(PUBLIC), "what is no longer used is no longer listed"
    for source in ("torch._C.x", "layer._parameters", "from torch._dynamo import reset", "torch.ops.aten._mm(x)"):
        assert private_names(ast.parse(source)), source


def products(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Rows 48 32, weight 64 32 and a scale for each row of both."""
    rows, weight = (torch.randn(n, 32, device=device) for n in (48, 64))
    if dtype == torch.int8:
        return tuple(int8.quantize(t)[0] for t in (rows, weight))
    made = [fp8.quantize(t) for t in (rows, weight)]
    return made[0][0], made[1][0], made[0][1], made[1][1].view(1, -1)


@pytest.mark.parametrize("device", DEVICES)
def test_integer_products_are_exact(device, fresh_seed):
    torch.manual_seed(fresh_seed)
    rows, weight = products(device, torch.int8)
    assert torch.equal(integer_product(rows, weight).cpu(), rows.int().cpu() @ weight.int().cpu().t())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.skipif(not hasattr(F, "scaled_mm"), reason="this torch has private ones alone")
def test_the_public_scaled_product_gives_the_same(device, fresh_seed):
    torch.manual_seed(fresh_seed)
    rows, weight, row_scale, scale = products(device, torch.float8_e4m3fn)
    recipe = F.ScalingType.RowWise
    public = F.scaled_mm(rows, weight.t(), row_scale, recipe, scale, recipe, use_fast_accum=True)
    assert torch.equal(scaled_product(rows, weight, row_scale, scale), public)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.skipif(not (HAS_GROUPED_PRODUCT and hasattr(F, "grouped_mm")), reason="this torch has private ones alone")
def test_the_public_grouped_product_gives_the_same(device, fresh_seed):
    torch.manual_seed(fresh_seed)
    rows, weights = (torch.randn(*shape, device=device).bfloat16() for shape in ((48, 32), (3, 64, 32)))
    ends = torch.tensor([16, 16, 48], dtype=torch.int32, device=device)
    public = F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    assert torch.equal(grouped_product(rows, weights, ends), public)
