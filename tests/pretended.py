"""A pretended device: tensors with the values and kernels of CPUs that say they are on a GPU, and may not meet others.

Whose memory is on the device is known by its storage. Calls that name the device are caught on their way into torch,
operations on their way to the kernels.
"""

from types import SimpleNamespace

import torch
from torch.func import debug_unwrap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import clip_grad
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)
CROSSES = {"copy_", "_foreach_copy_", "_to_copy"}
WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2"}
MAKES = ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint", "eye", "as_tensor")


def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class Mixed(AssertionError):
    """An operation on tensors of several devices."""


class Pretended(TorchFunctionMode):
    """While it is entered `DEVICE` is there. Its `reads` are what the host waited for."""

    def __init__(self, patch):
        super().__init__()
        self.held, self.reads, self.kernels = {}, [], Kernels(self)
        module = SimpleNamespace(**{n: getattr(torch, n) for n in ("get_rng_state", "set_rng_state", "manual_seed")})
        module.is_available = lambda: False
        patch.setattr(torch, "get_device_module", lambda device=None: module)
        generator, group = torch.Generator, clip_grad._group_tensors_by_device_and_dtype
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**20))
        patch.setattr(torch, "Generator", lambda device=None: generator())

        def grouped(*args, **named):
            """By the device; torch's goes by what C++ knows."""
            of_kind = group(*args, **named).items()
            return {(DEVICE if self.has(v[0][0][0]) else k[0], k[1]): v for k, v in of_kind}

        for place in (clip_grad, optimizer):
            patch.setattr(place, "_group_tensors_by_device_and_dtype", grouped)

    def __enter__(self):
        self.kernels.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.kernels.__exit__(*error)

    def has(self, t):
        while (inner := debug_unwrap(t)) is not t:
            t = inner
        return t.untyped_storage()._cdata in self.held

    def hold(self, t):
        """Known for good: no other storage gets the address of one that has a weak reference."""
        self.held[t.untyped_storage()._cdata] = StorageWeakRef(t.untyped_storage())
        return t

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, named = getattr(function, "__name__", ""), dict(kwargs or {})
        if name == "__get__":
            owner = getattr(function.__self__, "__name__", "")
            if owner in ("device", "is_cpu", "is_cuda") and self.has(args[0]):
                return {"device": DEVICE, "is_cpu": False, "is_cuda": True}[owner]
            return function(*args, **named)
        if name in ("to", "cpu", "cuda"):
            return self.moved(function, name, *args, **named)
        if name in ("tolist", "numpy") and self.has(args[0]):
            self.reads.append(name)
        if name in MAKES or name.startswith("new_") or name.endswith("_like"):
            asked = named.pop("device", None)
            if asked is None or torch.device(asked).type != DEVICE.type:
                return function(*args, **named, **({} if asked is None else {"device": asked}))
            return self.hold(function(*args, **named))
        return function(*args, **named)

    def moved(self, function, name, t, *args, **named):
        """`Tensor.to` and what is short for it."""
        given, where = (args, dict(named)), {"cpu": torch.device("cpu"), "cuda": DEVICE}.get(name)
        others = [a for a in (*args, named.pop("device", None)) if isinstance(a, (str, torch.device, torch.Tensor))]
        for a in others:
            where = (DEVICE if self.has(a) else a.device) if isinstance(a, torch.Tensor) else torch.device(a)
        dtype = next((a.dtype for a in others if isinstance(a, torch.Tensor)), None)
        rest = [*([dtype] if dtype else []), *(a for a in args if isinstance(a, torch.dtype))]
        named = {k: v for k, v in named.items() if v is not None and k != "non_blocking"}
        here = self.has(t)
        if not here and where != DEVICE:
            return function(t, *given[0], **given[1])
        changed = t.to(*rest, **named) if rest or named else t
        if where is None or (where == DEVICE) == here:
            return changed
        if here:
            self.reads.append(name)
        with self.kernels.crossing():
            return changed.detach().clone() if here else self.hold(changed.detach().clone())


class Kernels(TorchDispatchMode):
    """Operations: results are where their arguments are, which are all in one place, but for numbers of the host."""

    def __init__(self, device):
        super().__init__()
        self.device, self.crosses = device, False

    def crossing(self):
        return Crossing(self)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, given = function.overloadpacket.__name__, tensors((args, kwargs or {}))
        there = [t for t in given if self.device.has(t)]
        strangers = [t for t in given if not self.device.has(t) and (t.ndim or "_fused" in name)]
        if there and strangers and name not in CROSSES and not self.crosses:
            raise Mixed(f"{name}: {[tuple(t.shape) for t in there]} and {[tuple(t.shape) for t in strangers]}")
        if there and (name in WAITS or name == "copy_" and not self.device.has(args[0])):
            self.device.reads.append(name)
        before = {t.untyped_storage()._cdata for t in given}
        result = function(*args, **(kwargs or {}))
        for t in tensors(result) if there and not self.crosses else ():
            if t.untyped_storage()._cdata not in before:
                self.device.hold(t)
        return result


class Crossing:
    """While a tensor goes from one device to the other."""

    def __init__(self, kernels):
        self.kernels = kernels

    def __enter__(self):
        self.kernels.crosses = True

    def __exit__(self, *_):
        self.kernels.crosses = False
