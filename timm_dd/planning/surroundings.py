"""What of Python and torch answers otherwise while a forward is traced, since it would not take symbols."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.autograd import Function

from ..compat import grad_modes, tree_leaves
from .functions import called
from .graphs import MAKERS
from .modes import line_here
from .symbols import NOT_ASKING, Known, KnownAttribute, Type, asks, is_callable, is_instance

LISTS = ("parameters", "named_parameters", "buffers", "named_buffers")


class Asked(Protocol):
    """A tracer, as far as it is told here what was asked.

    Attributes:
        grads: whether gradients are computed.
        with_grads: whether they are where the forward stands, in a block that switches them off or not.
        of_gradients: the line where a forward first asked that.
    """

    grads: bool
    with_grads: bool
    of_gradients: str | None

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        """The symbol of a tensor of the model."""


@contextlib.contextmanager
def where_symbols_are_taken(tracer: Asked) -> Iterator[None]:
    """All of these."""
    with (
        _buffers_may_be_computed(),
        _sizes_may_be_computed(),
        _types_may_be_asked_for(),
        _gradients_may_be_asked_for(tracer),
        _devices_may_be_named(),
        _tensors_may_be_listed(tracer),
        _backward_passes_are_kept(tracer),
    ):
        yield


@contextlib.contextmanager
def _buffers_may_be_computed() -> Iterator[None]:
    """A forward that makes its buffer anew, for positions of another size, gives what it made a name of its own."""
    original = nn.Module.__setattr__

    def assign(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, fx.Proxy) and name in module._buffers:
            del module._buffers[name]
        original(module, name, value)

    nn.Module.__setattr__ = assign  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _sizes_may_be_computed() -> Iterator[None]:
    """``torch.zeros(n, …)`` is a node where the graph computes n, of which torch says that it is no number; so are the
    limits of a tensor's dtype, which under autocast is another one."""

    def recording(maker: Callable) -> Callable:
        @functools.wraps(maker)
        def make(*args: Any, **kwargs: Any) -> Any:
            proxies = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy))
            proxy = next(proxies, None)
            if proxy is None:
                return maker(*args, **kwargs)
            return proxy.tracer.create_proxy("call_function", maker, args, kwargs)

        return make

    def of_tensor(maker: Callable) -> Callable:
        """``torch.as_tensor(x)`` is x where that is a tensor, to which C code would look."""

        @functools.wraps(maker)
        def make(data: Any, *args: Any, **kwargs: Any) -> Any:
            if is_instance(data, torch.Tensor):
                return data.to(*args, **kwargs) if args or kwargs else data
            return maker(data, *args, **kwargs)

        return make

    named = {f.__name__: recording(f) for f in (*MAKERS, torch.finfo, torch.iinfo)}
    named |= {f.__name__: of_tensor(f) for f in (torch.as_tensor, torch.asarray)}
    originals = {name: getattr(torch, name) for name in named}
    vars(torch).update(named)
    try:
        yield
    finally:
        vars(torch).update(originals)


@contextlib.contextmanager
def _types_may_be_asked_for() -> Iterator[None]:
    """``type(x)``, ``isinstance(x, …)`` and ``callable(x)`` wherever a forward may stand, and TorchScript's."""
    others = NOT_ASKING | sys.stdlib_module_names
    answers = {"type": Type, "isinstance": is_instance, "callable": is_callable}
    modules = [m for name, m in [*sys.modules.items()] if name.partition(".")[0] not in others]
    places = {id(vars(m)): vars(m) for m in modules if isinstance(m, ModuleType)}  # some have two names
    answered = [(names, name) for names in places.values() for name in answers if name not in names]
    for names, name in answered:
        names[name] = answers[name]
    script = torch.jit.isinstance

    def is_instance_of_script(value: Any, kind: Any) -> bool:
        known = issubclass(type(value), Known)
        return value.tracer.ask(value.node, lambda v: script(v, kind), False) if known else script(value, kind)

    torch.jit.isinstance = is_instance_of_script
    try:
        yield
    finally:
        torch.jit.isinstance = script
        for names, name in answered:
            del names[name]


@contextlib.contextmanager
def _gradients_may_be_asked_for(tracer: Asked) -> Iterator[None]:
    """``torch.is_grad_enabled()`` of a forward, not of torch or of what traces, tells what `grads` says."""
    original = torch.is_grad_enabled

    def tell(mode: bool) -> None:
        tracer.with_grads = mode

    def is_grad_enabled() -> bool:
        if not asks():
            return original()
        tracer.of_gradients = tracer.of_gradients or line_here()
        return original() and tracer.grads

    torch.is_grad_enabled = is_grad_enabled
    try:
        with grad_modes(tell):
            yield
    finally:
        torch.is_grad_enabled = original


@contextlib.contextmanager
def _tensors_may_be_listed(tracer: Asked) -> Iterator[None]:
    """``next(self.parameters()).device``: what a forward lists are symbols, as are the attributes that it reads."""

    def listing(original: Callable) -> Callable:
        @functools.wraps(original)
        def tensors(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator:
            return map(symbol, original(module, *args, **kwargs)) if asks() else original(module, *args, **kwargs)

        return tensors

    def symbol(found: Any) -> Any:
        name, tensor = found if isinstance(found, tuple) else ("", found)
        given = tracer.getattr(name, tensor, {})
        return (name, given) if isinstance(found, tuple) else given

    originals = {name: getattr(nn.Module, name) for name in LISTS}
    for name, original in originals.items():
        setattr(nn.Module, name, listing(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(nn.Module, name, original)


@contextlib.contextmanager
def _devices_may_be_named() -> Iterator[None]:
    """``with torch.autocast(x.device.type, enabled=False)``: a block that is recorded like any other."""
    original = torch.autocast.__init__

    @functools.wraps(original)
    def enter(self: torch.autocast, device_type: Any, *args: Any, **kwargs: Any) -> None:
        named = device_type.tracer.decide(device_type.node, str) if type(device_type) is KnownAttribute else device_type
        original(self, named, *args, **kwargs)

    torch.autocast.__init__ = enter  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _backward_passes_are_kept(tracer: Asked) -> Iterator[None]:
    """An autograd function is called by the graph, since what is recorded of its forward has another backward pass.
    Its ``apply`` may be held anywhere, its forward is looked up on the class."""

    def asking(function: type[Function]) -> Callable:
        original = function.forward
        own = 1 if function.setup_context is Function.setup_context else 0  # the context comes first

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not any(issubclass(type(a), fx.Proxy) for a in tree_leaves((args, kwargs))):
                return original(*args, **kwargs)
            with_grads = tracer.with_grads  # of the block around; here, in the forward of a function, none are
            with torch.set_grad_enabled(with_grads):
                given = called(tracer, function, args[own:], kwargs)
            tracer.with_grads = with_grads
            return given

        return forward

    functions = [f for f in _derived(Function) if f.__module__.partition(".")[0] not in NOT_ASKING]
    replaced = {f: vars(f).get("forward") for f in functions}
    for function, forward in [(f, asking(f)) for f in functions]:
        function.forward = staticmethod(forward)  # type: ignore[assignment]
    try:
        yield
    finally:
        for function, before in replaced.items():
            if before is None:
                del function.forward
            else:
                function.forward = before


def _derived(kind: type) -> list[type]:
    """All classes that are, at first or at last, derived from one."""
    return [c for direct in kind.__subclasses__() for c in (direct, *_derived(direct))]
