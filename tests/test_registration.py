"""Every operator in csrc/schema.cpp has a row in the inventory, and every source folder its twin."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from op_spec import OpSpec
from op_specs import SPECS, WITHOUT_TWIN

import quantkern  # noqa: F401

ROOT = Path(__file__).parents[1]

COMPOSED = ("sign_linear", "sign_conv2d", "fake_quantize_weights_kept")
"""They have no kernel of their own name, but call others."""

MADE_OF_OTHERS = ("fake_quantize_again", "lsq_again")
"""They compute nothing: a view, and a backward for it."""


def schemas() -> set[str]:
    text = (ROOT / "csrc" / "schema.cpp").read_text()
    return set(re.findall(r'"([a-z0-9_.]+)\(Tensor', text))


def test_the_inventory_is_complete() -> None:
    assert schemas() == {schema for spec in SPECS for schema in spec.schemas} | set(WITHOUT_TWIN)


@pytest.mark.parametrize("schema", WITHOUT_TWIN)
def test_operations_without_a_twin_pass_opcheck(schema: str) -> None:
    for arguments in WITHOUT_TWIN[schema]():
        torch.library.opcheck(getattr(torch.ops.quantkern, schema).default, arguments)


@pytest.mark.parametrize("schema", sorted(schemas()))
def test_operators_have_kernels_and_shape_functions(schema: str) -> None:
    name = f"quantkern::{schema}"
    stem, dot, overload = schema.partition(".")
    if stem in MADE_OF_OTHERS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
        return
    differentiable = f"{stem}_forward{dot}{overload}" in schemas() or stem in COMPOSED
    key = "CompositeExplicitAutograd" if differentiable else "CPU"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_one_stem_in_every_folder(spec: OpSpec) -> None:
    twin = () if spec.looped else (f"quantkern/triton/{spec.name}.py",)
    for place in (f"csrc/cpu/{spec.name}.cpp", f"csrc/cuda/{spec.name}.cu", *twin):
        assert (ROOT / place).exists(), f"{place} is missing"
    assert hasattr(quantkern.functional, spec.name)
    assert hasattr(quantkern.reference, spec.name)
