"""Private interfaces of other libraries that have no public twin, each in one place and under one test.

Who moves to a new torch or timm looks here. Nothing else in the package imports a name that begins with an underscore.
"""

from __future__ import annotations

import json
import keyword
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import _WeightNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import (
    SUPPORTED_NODES,
    register_pytree_node,
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)

__all__ = [
    "Convolution",
    "OpOverload",
    "TorchDispatchMode",
    "WeightNorm",
    "end_with_parent",
    "foreach_copy_",
    "foreach_lerp_",
    "foreach_mul_",
    "foreach_norm",
    "grad_modes",
    "has_vmap_rule",
    "let_einops_take",
    "let_fx_name_all",
    "overflows",
    "register_pytree_node",
    "storage_key",
    "timm_config",
    "tree_flatten",
    "tree_knows",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
]

Convolution = _ConvNd  # what all convolutions of torch.nn are
WeightNorm = _WeightNorm  # what torch.nn.utils.parametrizations.weight_norm registers

# Of lists of tensors, in one launch.
foreach_copy_, foreach_lerp_ = torch._foreach_copy_, torch._foreach_lerp_
foreach_mul_, foreach_norm = torch._foreach_mul_, torch._foreach_norm


@cache
def has_vmap_rule(name: str) -> bool:
    """Whether vmap knows an operation, of whatever arguments; what it does not know is done slice after slice."""
    operation = getattr(torch.ops.aten, name, None)
    names = [f"aten::{name}{'' if o == 'default' else f'.{o}'}" for o in operation.overloads()] if operation else []
    with suppress(RuntimeError):  # of TorchScript alone
        return any(torch._C._dispatch_has_kernel_for_dispatch_key(n, "FuncTorchBatched") for n in names)
    return False


def overflows(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Whether gradients that `scaler` has unscaled are not finite: not 0, on their device."""
    (found,) = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
    return found


def tree_knows(kind: type) -> bool:
    """Whether the functions of trees look into objects of this class."""
    return kind in SUPPORTED_NODES


def let_einops_take(*kinds: type) -> None:
    """Where einops is in use, its functions do with objects of these classes what they do with tensors."""
    if "einops" in sys.modules:
        backends = sys.modules["einops._backends"]
        for kind in kinds:
            backends._type2backend[kind] = backends.get_backend(torch.empty(0))


def let_fx_name_all() -> None:
    """From here on the code of torch.fx's graphs has ``getattr(m, "in")`` for ``m.in``, as it has for ``m.0``: an
    `nn.ModuleDict` takes any name."""

    def format_target(base: str, target: str) -> str:
        for name in target.split("."):
            plain = name.isidentifier() and not keyword.iskeyword(name)
            base = f"{base}.{name}" if plain else f"getattr({base}, {name!r})"
        return base

    fx.graph._format_target = format_target


@contextmanager
def grad_modes(tell: Callable[[bool], None]) -> Iterator[None]:
    """Here `tell` is called with whether gradients are computed, now and whenever Python changes it. C code changes it
    too: in the forward of an autograd function they never are."""
    original = torch._C._set_grad_enabled

    def change(mode: bool) -> None:
        original(mode)
        tell(mode)

    tell(torch.is_grad_enabled())
    torch._C._set_grad_enabled = change  # type: ignore[assignment]
    try:
        yield
    finally:
        torch._C._set_grad_enabled = original


def end_with_parent() -> None:
    """Let this process be killed when the thread that forked it ends; on Linux, elsewhere it lives on."""
    _prctl_pr_set_pdeathsig(signal.SIGKILL)


def storage_key(tensor: torch.Tensor) -> int:
    """The same for tensors that share memory. Addresses do not say it: on the meta device all are 0."""
    return tensor.untyped_storage()._cdata


def timm_config(model: nn.Module, pretrained_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What timm would write into ``config.json``, with entries of `pretrained_cfg`, which stays as it is.

    Raises:
        TypeError, ValueError: JSON has no form for an argument of the model.
    """
    from timm.models._hub import save_config_for_hf  # here, since merging files is not to wait for timm

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        save_config_for_hf(model, str(path), model_config={"pretrained_cfg": dict(pretrained_cfg)})
        return json.loads(path.read_text(encoding="utf-8"))
