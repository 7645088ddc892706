"""A module that behaves as a model's artifact will and trains: quantization-aware, with anyone's loop.

Parameters pass through their formats on the way in, straight-through (Bengio et al. 2013, arXiv:1308.3432),
and what formats learn are parameters too (LSQ: Esser et al. 2020, arXiv:1902.08153; tools/sim_learned.py)::

    forward(x) = module(project(parameters), x)        traced values are projected as they are made

Without formats of traced values the eager module itself runs; with them its exported graph, in which batch
norm and dropout are live. In inference mode outputs are those of ``simulate``, bit by bit.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from featherweight.errors import RecipeError
from featherweight.formats import IntQuant, PerTensor, TensorFormat, encode
from featherweight.graph import Graph, trace
from featherweight.model import Model
from featherweight.tools.sim_learned import Learned, as_data
from featherweight.tools.sim_norms import Moments, TemporaryNorm, normable, normalized, observed
from featherweight.tools.sim_replay import Call, TrainableReplay, leaving, moved

MOVES = frozenset(
    {"max_pool2d", "reshape", "view", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "clone"}
)
_FIXED = frozenset(
    {"sigmoid", "tanh", "softmax", "hardsigmoid", "log_softmax"}
)  # ranges that kernels may know


class Simulated(nn.Module):
    """A trained copy of a model, which stays untouched.

    ``parameters()`` are the module's and what formats learn; :meth:`groups` tells them apart. A fresh one is
    in training mode, as any module.

    Args:
        model: With formats or without.
        entry: Which way of calling it.
        fixed: Traced values whose range is not learned, beside those of sigmoid, tanh and softmax.
        normalize: Batches of flat inputs; where some are given, a batch norm stands behind every folded layer
            while it trains, the identity on these batches at first (tools/sim_norms.py).

    Attributes:
        module: The copy that is trained.
        seen: What the watched layers returned in the last call.
    """

    def __init__(
        self,
        model: Model,
        entry: str = "forward",
        *,
        fixed: Collection[str] = (),
        normalize: Sequence[tuple[Tensor, ...]] = (),
    ) -> None:
        super().__init__()
        self.module = model.copy_module()
        self.seen: dict[str, Tensor] = {}
        self._plan = _Plan(model, entry, frozenset(fixed), bool(normalize))
        self._watched: dict[str, str] = {}  # path -> value, where a graph is replayed
        self._replay = _Replay()
        self._frozen: frozenset[str] = frozenset()
        self.formats = nn.ModuleDict(
            {key: Learned(fmt, *self._plan.learning(key)) for key, fmt in self._plan.formats.items()}
        )
        self._share_codebooks()
        self.norms = nn.ModuleList()
        if normalize:
            self._normalize(normalize)
        self.train()

    # ---- what is learned

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that train, by what they are: ``weights`` (all of the module's), ``steps``, ``norms``.

        Steps are relative to what they were at first: rates of 1e-4 to 1e-2 suit Adam.
        """
        parts = {"weights": self.module, "steps": self.formats, "norms": self.norms}
        return {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}

    def freeze(self, parameters: Collection[str]) -> None:
        """These parameters and their formats stay as the model has them, also when they are read back.

        Args:
            parameters: First names; before training, and none that a temporary norm stands behind.
        """
        self._frozen = frozenset(parameters)
        for name, parameter in self.module.named_parameters():
            if name in self._frozen:
                parameter.requires_grad_(False)
                for key in self._plan.keys.get(name, ()):
                    self.formats[key].requires_grad_(False)

    def advance(self, fraction: float) -> None:
        """Tell formats with a schedule how far training is, from 0 to 1."""
        for name, parameter in self.module.named_parameters():
            for key in () if name in self._frozen else self._plan.keys.get(name, ()):
                self._learned(key).advance(parameter.detach(), fraction)

    def penalty(self) -> Tensor | None:
        """What formats add to the loss, e.g. for gates that are open; None: nothing."""
        having: list[Any] = [one for one in map(self._learned, self.formats) if hasattr(one.base, "penalty")]
        found = [extra for one in having if (extra := one.current().penalty()) is not None]
        return torch.stack(found).sum() if found else None

    def _share_codebooks(self) -> None:
        """Centroids that several tensors share are one parameter."""
        first: dict[str, Learned] = {}
        for one in map(self._learned, self.formats):
            if one.codebook:
                one.centroids = first.setdefault(one.codebook, one).centroids

    def _learned(self, key: str) -> Learned:
        one = self.formats[key]
        assert isinstance(one, Learned)
        return one

    def _project(self, name: str, value: Tensor) -> Tensor:
        for key in self._plan.keys[name]:
            value = self.formats[key](value)
        return value

    def _stored(self, folded: bool) -> dict[str, Tensor]:
        """The parameters that have formats, as those hold them, with norms folded into them or without."""
        parameters = dict(self.module.named_parameters())
        stored = {
            name: self._project(name, parameters[name]) for name in self._plan.keys if name in parameters
        }
        if folded:
            for name, norm in self._norms():
                fmt = self._learned(self._plan.keys[name][0]).current()
                stored[name] = norm.folded_weight(stored[name], fmt)
                stored[self._plan.normed[name].parameters["bias"]] = norm.folded_bias()
        return stored

    # ---- temporary norms

    def _norms(self) -> Iterator[tuple[str, TemporaryNorm]]:
        """Weights and the norms behind them."""
        for name, one in zip(self._plan.normed, self.norms, strict=False):
            assert isinstance(one, TemporaryNorm)
            yield name, one

    @torch.no_grad()
    def _normalize(self, batches: Sequence[tuple[Tensor, ...]]) -> None:
        """Put norms behind layers, which begin as the identity on these batches."""
        graph, parameters = self._plan.graph, dict(self.module.named_parameters())
        assert graph is not None
        nodes = self._plan.normed
        moments = {name: Moments() for name in nodes}
        self.eval()
        counting = self._make_runner(graph, {nodes[name].fx_name: observed(moments[name]) for name in nodes})
        tensors = {**self._tensors(graph), **self._stored(folded=False)}
        for batch in batches:
            counting.run_with(tensors, batch)
        for name, node in nodes.items():
            bias = parameters[node.parameters["bias"]].requires_grad_(False)  # the norm's takes its place
            self.norms.append(moments[name].norm(bias))

    # ---- running

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Flat outputs of one call with flat inputs; differentiable."""
        self.seen = {}
        stored = self._stored(folded=not self.training)
        if self._plan.graph is None:
            return self._eager(stored, inputs)
        if self._replay.runner is None:
            calls = {self._plan.normed[name].fx_name: normalized(norm) for name, norm in self._norms()}
            self._replay.runner = self._make_runner(self._plan.graph, calls)
        return self._replay.runner.run_with({**self._tensors(self._plan.graph), **stored}, inputs)

    def _eager(self, stored: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        entry = self._plan.model.entries[self._plan.entry]
        named = {f"module.{name}": value for name, value in stored.items()}
        with self._watching():
            made = torch.func.functional_call(
                _Caller(self.module, entry.method), named, entry.arguments(inputs)
            )
        return tuple(leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor))

    def _tensors(self, graph: Graph) -> dict[str, Tensor]:
        state = {
            **dict(self.module.named_parameters(remove_duplicate=False)),
            **dict(self.module.named_buffers(remove_duplicate=False)),
        }
        constants: Mapping[str, Any] = graph.program.constants
        return {name: state[name] if name in state else constants[name] for name in graph.parameters.values()}

    def _make_runner(self, graph: Graph, calls: Mapping[str, Call]) -> TrainableReplay:
        some = {name: keys for name, keys in self._plan.keys.items() if name in graph.values}
        chains = {name: tuple(map(self._learned, keys)) for name, keys in some.items()}
        at_readers = {name: chain for name, chain in chains.items() if any(one.readers for one in chain)}
        whole = set(some) - set(at_readers) - moved(graph, some, MOVES)

        def observe(name: str, value: Tensor) -> Tensor:
            value = self._project(name, value) if name in whole else value
            self.seen |= {path: value for path, watched in self._watched.items() if watched == name}
            return value

        return TrainableReplay(graph, self.module, observe, at_readers, calls)

    # ---- watching

    def watch(self, layers: Sequence[str]) -> None:
        """Keep what these layers or blocks return in ``seen``: of the last call, the first tensor.

        Args:
            layers: Paths of submodules; they replace those of before.

        Raises:
            RecipeError: There is no such layer, or nothing reads what it returns.
        """
        known, watched = {path for path, _ in self.module.named_modules()}, {}
        for path in layers:
            if path not in known:
                raise RecipeError(
                    f"the network has no layer '{path}'", fix="name layers as inspect lists them"
                )
            value = "" if self._plan.graph is None else leaving(self._plan.graph, path)
            if value is None:
                raise RecipeError(f"layer '{path}' returns nothing that is read", fix="name another layer")
            watched[path] = value
        self._watched, self.seen = watched, {}

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Hooks on the watched layers of the eager module."""

        def keep(path: str) -> Callable[..., None]:
            def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
                self.seen[path] = next(
                    leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)
                )

            return hook

        hooks = [self.module.get_submodule(path).register_forward_hook(keep(path)) for path in self._watched]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # ---- reading back

    @torch.no_grad()
    def absorb(self) -> Model:
        """The model with what was trained: values on the grids of their formats, buffers, ranges."""
        model = self._plan.model
        formats = dict(model.formats)
        for name, keys in self._plan.keys.items():
            if name in self._frozen:
                continue
            formats[name] = tuple(as_data(self._learned(key).current()) for key in keys)
        for name, norm in self._norms():
            fmt = self._learned(self._plan.keys[name][0]).current()
            formats[name] = (as_data(norm.folded_format(fmt)),)
        stored, module = self._stored(folded=True), copy.deepcopy(self.module)
        module.zero_grad(set_to_none=True)
        for name, parameter in module.named_parameters():
            begun = model.module.get_parameter(name)
            now = begun.to(parameter.device) if name in self._frozen else stored.get(name, parameter)
            parameter.data = now.detach().clone(memory_format=torch.contiguous_format)
            parameter.requires_grad_(begun.requires_grad)
        for buffer in module.buffers():
            buffer.data = buffer.data.contiguous()
        for path, layer in model.module.named_modules():
            module.get_submodule(path).training = layer.training
        return model.evolve(module=module.cpu(), formats=formats)


class _Plan:
    """What does not change in training: the model, its graph, and which format is whose."""

    def __init__(self, model: Model, entry: str, fixed: frozenset[str], normalized: bool) -> None:
        self.model, self.entry = model, entry
        self._parameters = model.parameters
        traced = [name for name in model.formats if name not in self._parameters]
        self.graph: Graph | None = trace(model, entry) if traced or normalized else None
        self.normed = normable(model, self.graph) if self.graph is not None and normalized else {}
        self.formats: dict[str, TensorFormat] = {}
        self.keys: dict[str, tuple[str, ...]] = {}  # parameter or value -> its chain, as keys of ``formats``
        self._names: dict[str, list[str]] = {}
        known: dict[str, str] = {}
        for name, chain in model.formats.items():
            if self.graph is not None and name not in self._parameters and name not in self.graph.values:
                continue  # a value of another way of calling the module
            keys = []
            for place, fmt in enumerate(chain):
                key = known.setdefault(self._identity(name, place, fmt), str(len(known)))
                self.formats.setdefault(key, fmt)
                self._names.setdefault(key, []).append(name)
                keys.append(key)
            self.keys[name] = tuple(keys)
        self._fixed = fixed | {
            name for node in self.graph or () if node.op in _FIXED for name in node.outputs
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> _Plan:
        return self

    def _identity(self, name: str, place: int, fmt: TensorFormat) -> str:
        """Traced values on equal grids share one; it may have been read from a file since it was made."""
        whole = isinstance(fmt, IntQuant) and isinstance(fmt.granularity, PerTensor)
        if name in self._parameters or not whole:
            return f"{name}/{place}"
        return str(sorted(encode(fmt).items()))

    def learning(self, key: str) -> tuple[int, bool]:
        """How many elements share a step of this format, and whether it stays as it is."""
        name, fmt = self._names[key][0], self.formats[key]
        if name in self._parameters:
            learned = fmt.learned()
            steps = max(1, next(iter(learned.values())).numel()) if learned else 1
            return max(1, self._parameters[name].numel() // steps), False
        value = self.graph.values.get(name) if self.graph is not None else None
        elements = torch.Size(value.shape[1:]).numel() if value is not None else 1
        return max(1, elements), any(one in self._fixed for one in self._names[key])


class _Replay:
    """Keeps what is made of a module once; a copy of the module makes its own."""

    def __init__(self) -> None:
        self.runner: TrainableReplay | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Replay:
        return _Replay()


class _Caller(nn.Module):
    """Calls a method of a module by name."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *inputs: Any) -> Any:
        return getattr(self.module, self.method)(*inputs)


def simulated(model: Model, entry: str = "forward") -> Simulated:
    """A module to train with anyone's loop, which behaves as the model with its formats will.

    Args:
        model: From ``load_model`` or ``apply``.
        entry: Which way of calling it.

    Returns:
        An ``nn.Module`` that takes flat tensors and returns a tuple of them.
    """
    return Simulated(model, entry)


def absorb(trained: nn.Module) -> Model:
    """The model that a trained :func:`simulated` module became; wrappers around it are looked through.

    Raises:
        RecipeError: There is no simulated module in it.
    """
    found = [one for one in trained.modules() if isinstance(one, Simulated)]
    if len(found) != 1:
        raise RecipeError(
            f"a simulated module was expected, not {type(trained).__name__} with {len(found)} of them",
            fix="give what featherweight.simulated returned",
        )
    return found[0].absorb()
