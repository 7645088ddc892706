"""A module whose code became data: the operator calls that ``torch.export`` saw, run one after the other.

Code with sizes written into it (``reshape(n, t, 3, heads, width // heads)``) cannot follow when channels are
removed; its calls can, since their sizes are plain numbers. The module keeps its layers, their names and all
parameters. A call of an ordinary layer stays a call of that layer, so batch norm and dropout train as before;
everything else runs as ATen operators in the scope of the layer whose code it was.

A program is JSON data::

    {"names": parameters of the method, "inputs": a name per flat tensor, "tree": how outputs are nested,
     "runs": [{"layer": path, "steps": [{"name", "target" or "call", "args", "kwargs"}]}], "outputs": [...]}

An argument is a number, text, None, a list of arguments, or ``{"value": name}``, ``{"tensor": name}``,
``{"dtype": name}``, ``{"device": null}`` (that of the inputs), ``{"layout": name}``, ``{"format": name}``.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

ProgramData = Mapping[str, Any]
_OWN = frozenset(vars(nn.Module()))
_NAMESPACES = frozenset({"aten", "prims"})  # of operators; others may load code
# Arithmetic of sizes; nothing else of these modules is called, since programs come from files.
_ARITHMETIC = frozenset({"add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs"})
_ARITHMETIC |= {"eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "getitem", "lshift", "rshift"}
_SIZES = frozenset({"sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum"})
_SIZES |= {"_sym_sqrt"}


class Unrolled(nn.Module):
    """Runs programs over the layers and tensors of another module, which it takes over.

    Make it with :func:`unroll`.
    """

    programs: Mapping[str, ProgramData]

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (dict(self.programs),), self.__dict__

    def run(self, method: str, arguments: Sequence[Any]) -> Any:
        """What the method returns for these positional arguments."""
        program = self.programs[method]
        flat = [leaf for leaf in pytree.tree_leaves(list(arguments)) if isinstance(leaf, Tensor)]
        values: dict[str, Any] = dict(zip(program["inputs"], flat, strict=True))
        device = flat[0].device if flat else None
        for chunk in program["runs"]:
            steps = partial(self._steps, chunk["steps"], values, device)
            if chunk["layer"]:
                self.get_submodule(chunk["layer"])(steps)  # so that its calls are traced under its name
            else:
                steps()
        results = [self._argument(item, values, device) for item in program["outputs"]]
        if program["tree"] is None:
            return results[0] if len(results) == 1 else tuple(results)
        return pytree.tree_unflatten(results, pytree.treespec_loads(program["tree"]))

    def _steps(
        self, steps: Sequence[Mapping[str, Any]], values: dict[str, Any], device: torch.device | None
    ) -> None:
        for step in steps:
            args = [self._argument(item, values, device) for item in step["args"]]
            if "call" in step:
                made = self.get_submodule(step["call"])(*args)
                made = tuple(pytree.tree_leaves(made)) if isinstance(made, tuple) else made
            else:
                kwargs = {key: self._argument(item, values, device) for key, item in step["kwargs"].items()}
                made = _target(step["target"])(*args, **kwargs)
            values[step["name"]] = made
            for name in step["last"]:
                del values[name]

    def _argument(self, item: Any, values: Mapping[str, Any], device: torch.device | None) -> Any:
        if isinstance(item, (list, tuple)):
            return [self._argument(one, values, device) for one in item]
        if not isinstance(item, Mapping):
            return item
        ((kind, name),) = item.items()
        if kind == "value":
            return values[name]
        if kind == "tensor":
            scope, _, own = name.rpartition(".")
            return getattr(self.get_submodule(scope), own)
        if kind == "device":
            return device
        return getattr(torch, name)  # dtype, layout, memory format


def _target(name: str) -> Any:
    """``aten.view.default`` or ``operator.mul`` as what is called.

    Raises:
        ValueError: It is neither an operator on tensors nor arithmetic of sizes.
    """
    match name.split("."):
        case ["operator", kind] if kind in _ARITHMETIC:
            return getattr(operator, kind)
        case ["torch", kind] if kind in _SIZES:
            return getattr(torch, kind)
        case [space, kind, overload] if space in _NAMESPACES:
            found = getattr(getattr(getattr(torch.ops, space), kind), overload)
            if isinstance(found, torch._ops.OpOverload):
                return found
    raise ValueError(f"'{name}' is no operator of a traced program")


def runs(name: str) -> bool:
    """Whether a program may call this."""
    try:
        _target(name)
    except (ValueError, AttributeError):
        return False
    return True


def _scope(run: Callable[[], None]) -> None:
    """The forward of a layer whose calls are data."""
    run()


def unroll(
    module: nn.Module, programs: Mapping[str, ProgramData], constants: Mapping[str, Sequence[Any]]
) -> Unrolled:
    """The module with its code as data; takes the layers and tensors over, so the module itself is used up.

    Args:
        module: Any module, or an unrolled one that gets other programs.
        programs: By method.
        constants: Tensors of the programs that are no parameters or buffers: name -> (shape, dtype). They
            become buffers (zeros unless the module has such an attribute).
    """
    made = _empty(programs)
    made.__dict__.update({key: value for key, value in vars(module).items() if key in _OWN})
    for name, (shape, dtype) in constants.items():
        scope, _, own = name.rpartition(".")
        owner = made.get_submodule(scope)
        held = owner.__dict__.pop(own, None)
        value = held if isinstance(held, Tensor) else torch.zeros(tuple(shape), dtype=getattr(torch, dtype))
        owner.register_buffer(own, value.detach().clone())
    for program in programs.values():
        for chunk in program["runs"]:
            if chunk["layer"]:
                made.get_submodule(chunk["layer"]).__dict__["forward"] = _scope
    return made


def _empty(programs: Mapping[str, ProgramData]) -> Unrolled:
    """A module with these methods and no layers."""
    methods = {name: _method(name, program["names"]) for name, program in programs.items()}
    kind: type[Unrolled] = type("Unrolled", (Unrolled,), {**methods, "__module__": __name__})
    made = kind()
    made.programs = dict(programs)
    return made


def _method(name: str, names: Sequence[str]) -> Callable[..., Any]:
    """A method with these parameters: torch.export reads dynamic shapes by them."""

    def method(self: Unrolled, *arguments: Any) -> Any:
        return self.run(name, arguments)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(one, kind) for one in ("self", *names)])
    method.__signature__ = signature  # type: ignore[attr-defined]
    method.__name__ = name
    return method
