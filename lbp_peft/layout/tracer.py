"""Follows the positions of a model's input through one forward pass."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..transforms import in_transform, outside_transforms
from .contents import ConsultedTensor, version_of
from .operation_call import OperationCall, tensors_in
from .operation_names import DATA_INDEPENDENT, FILLED, FINITENESS, LENDING, MIXING, RANDOM, READING, SPATIAL
from .operations import RULES, RULES_BY_RESULT
from .operations.registry import Result, Rule
from .positions import LOST, compact, condense
from .trails import Origin, Trail, Trails, advance_origins, origins_after_layer, shares_memory


class PositionTracer(TorchFunctionMode):
    """Context in which the positions of tensors are followed through every operation.

    The rules in `operations/` say what each operation does to positions. After an operation without a rule there are no
    positions.

    Args:
        model: The module that is called. Its parameters and buffers count as constants, so an index among them picks
            the same elements in each pass.
        whole: The whole model that the module belongs to, by which layers are named; None: the module itself.
        on_layer: Called with the name, the input and the output of each layer that applies its weight to a tensor that
            depends on the model's input.

    Attributes:
        current_name: The name of the operation whose rule is being applied.
        read_by: Where Python code first read a value that may differ in the next pass, such as "item in model.py:12";
            "" if it has read none.
        applied: The names of the layers whose weights operations applied to tensors that depend on the input.
        consulted: The model's tensors by whose values tokens were ordered, as they were at that moment, by id.
    """

    def __init__(
        self,
        model: nn.Module,
        whole: nn.Module | None = None,
        on_layer: Callable[[str, Tensor, Tensor], None] | None = None,
    ):
        super().__init__()
        self._on_layer = on_layer
        self._owners = _owners(whole or model) | _owners(model, names_of=whole)
        self.current_name = ""
        self.read_by = ""
        self.applied: set[str] = set()
        self.consulted: dict[int, ConsultedTensor] = {}
        self._is_paused = False
        self._trails = Trails(_tensors_of(model))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Stop following positions within the block."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def start(
        self,
        tensor: Tensor,
        positions: Tensor | None,
        is_certain: bool = True,
        is_mask: bool = False,
        origins: Mapping[int, Origin] | None = None,
    ) -> None:
        """Follow a tensor of the input from here on.

        If `positions` is None, it has no positions, but tensors that are computed from it depend on the input.
        """
        self._trails.put(tensor, Trail(positions, origins or {}, is_certain=is_certain, of_mask=is_mask))

    def start_constant(self, tensor: Tensor) -> None:
        """Treat a tensor of the input as a constant: the trace is then valid for its values only."""
        self._trails.put_constant(tensor, ())

    def trail(self, tensor: Tensor) -> Trail | None:
        """The trail of a tensor; None if it is not known to depend on the input."""
        return self._trails.get(tensor)

    def positions(self, tensor: object) -> Tensor | None:
        """The positions of a tensor's elements, in its shape; None if there are none."""
        trail = self._trails.get(tensor) if isinstance(tensor, Tensor) else None
        return None if trail is None else trail.positions

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether a tensor is certain to be the same in each forward pass, as long as the model's tensors are."""
        made_of = self._trails.made_of(tensor)
        if made_of is None or any(self._trails.contents(source) is None for source in made_of):
            return False
        for source in made_of:
            if id(source) not in self.consulted and (contents := self._trails.contents(source)) is not None:
                self.consulted[id(source)] = ConsultedTensor(source, version_of(source), contents)
        return True

    def continue_at(self, output: Tensor, x: Tensor, positions: Tensor | None) -> None:
        """Follow the output of a layer with input x that was traced as a single operation."""
        before = self._trails.get(x) or Trail(None)
        self._trails.put(output, Trail(positions, advance_origins([before]), before.lost_by, before.is_certain))

    def __torch_function__(
        self, function: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if self._is_paused:
            return function(*args, **(kwargs or {}))
        operation = OperationCall(function, args, kwargs or {})
        if operation.name in READING:
            self._note_reading(operation.name, operation.tensors)
        if operation.name in LENDING:
            self._trails.lend(operation.tensors[0], operation.name)
        trails = [trail for t in operation.tensors if (trail := self._trails.get(t)) is not None]
        return self._run(operation, trails) if trails else self._run_without_trails(operation)

    def _run_without_trails(self, operation: OperationCall) -> Any:
        """Run an operation that does not depend on the input, and record which of its results are constants."""
        name, tensors = operation.name, operation.tensors
        result = operation.run()
        changed = operation.changed_tensors()
        for tensor in changed if name != "__set__" else tensors[:1]:
            self._trails.note_version(tensor)
            self._trails.lose(tensor, name)  # and perhaps changed otherwise in the next pass
        if name in RANDOM:
            self._note_result(operation, result, None, [])
        elif (tensors or name in DATA_INDEPENDENT) and not changed:
            sources = [self._trails.made_of(t) for t in tensors]
            if all(made_of is not None for made_of in sources):
                for tensor in tensors_in(result):
                    self._trails.put_constant(tensor, _union(made_of for made_of in sources if made_of is not None))
        return result

    def _run(self, operation: OperationCall, trails: list[Trail]) -> Any:
        """Run an operation that depends on the input, and record the positions of its results.

        Args:
            operation: The operation.
            trails: The trails of its arguments.
        """
        name, tensors, kwargs = operation.name, operation.tensors, operation.kwargs
        has_positions = kwargs.get("out") is None and any(trail.positions is not None for trail in trails)
        positions, rule_args, rule_kwargs = None, *_with_input_first(operation.args, kwargs)
        if has_positions and name in RULES:  # before the operation, which may change its arguments in place
            positions = self._apply(RULES[name], name, *rule_args, **rule_kwargs)
        before = self._trails.get(tensors[0])
        result = operation.run()
        if name == "__set__":  # x.data = y
            positions = self.positions(tensors[-1])
        if has_positions and name in RULES_BY_RESULT:
            positions = self._apply(RULES_BY_RESULT[name], name, result, *rule_args, **rule_kwargs)
        layers = self._layers(name, tensors)
        self.applied.update(layers)
        layer = layers[0] if layers and name in MIXING else ""
        changed = operation.changed_tensors()
        for tensor in changed:
            self._trails.note_version(tensor)
        self._note_result(operation, result, positions, trails, layer)
        if layer and self._on_layer is not None and isinstance(result, Tensor):
            with self.pause():
                self._on_layer(layer, next(t for t in tensors if self._trails.get(t) is not None), result)
        changes_first_argument = result is tensors[0] or name in ("__set__", "__setitem__")
        if changes_first_argument:
            self._trails.note_change(tensors[0], before)
        for tensor in [*changed, *tensors_in(kwargs.get("out"))]:
            if not (
                changes_first_argument and shares_memory(tensor, tensors[0])
            ):  # otherwise note_change has recorded it
                self._trails.lose(tensor, name)
        return result

    def _note_reading(self, name: str, tensors: list[Tensor]) -> None:
        if name == "__bool__" and all((t := self._trails.get(tensor)) and t.of_mask for tensor in tensors):
            return  # the key of the trace says whether there is padding
        are_constant = [self.is_constant(tensor) for tensor in tensors]  # a list, since is_constant records each tensor
        if not all(are_constant) and not self.read_by and (caller := _caller()):
            self.read_by = f"{name} in {caller}"

    def _apply(self, rule: Rule, name: str, *args: object, **kwargs: object) -> Result:
        """The positions of an operation's result by its rule; None if they are lost."""
        self.current_name = name
        try:
            _signature(rule).bind(self, *args, **kwargs)
        except TypeError:  # the rule does not know one of the keywords
            return None
        context = outside_transforms() if in_transform() else nullcontext()
        with context, torch.no_grad():
            try:
                return _condense_all(rule(self, *args, **kwargs))
            except (IndexError, RuntimeError, TypeError, ValueError):
                # An index that belongs to a transform cannot be read, or the rule does not know such arguments. The
                # operation itself has returned a result, and must not fail in training for want of positions.
                return None

    def _has_channels(self, name: str, args: tuple) -> bool:
        """Whether the elements along the axis that an operation takes for channels all lie at the same place.

        If not, that axis runs over rows, columns or tokens of the input.
        """
        positions = self.positions(args[0]) if args else None
        if positions is None:
            return True
        num_axes = next((int(c) for c in name if c in "123"), 2 if name.startswith(("pixel", "im2col")) else 0)
        compacted = compact(positions)
        channels_axis = -num_axes - 1 if num_axes else 1
        return bool((compacted == compacted.narrow(channels_axis, 0, 1)).all())

    def _layers(self, name: str, tensors: list[Tensor]) -> list[str]:
        """The names of the layers whose weights an operation applies, if it mixes channels."""
        if name not in MIXING and name != "multi_head_attention_forward":
            return []
        constants = (tensor for tensor in tensors if self._trails.get(tensor) is None)
        sources = (source for tensor in constants for source in self._trails.source_of(tensor))
        return [owner for source in sources if (owner := self._owners.get(id(source)))]

    def _note_result(
        self, operation: OperationCall, result: object, positions: Result, trails: list[Trail], layer: str = ""
    ) -> None:
        """Record the trails of an operation's results.

        Args:
            operation: The operation.
            result: What it returned.
            positions: The positions of each result; None where they are lost.
            trails: The trails of its arguments.
            layer: The name of the layer whose weight it applied, if any.
        """
        name, args = operation.name, operation.args
        outputs = [args[0]] if name in ("__setitem__", "__set__") else list(tensors_in(result))
        of_results = [positions] if positions is None or isinstance(positions, Tensor) else positions
        of_outputs: list[Tensor | None] = list(of_results)
        of_outputs += [None] * (len(outputs) - len(of_outputs))
        origins = origins_after_layer(advance_origins(trails), layer) if layer else advance_origins(trails)
        lost_by = next((trail.lost_by for trail in trails if trail.lost_by), "")
        had_positions = any(trail.positions is not None for trail in trails)
        is_certain = all(trail.is_certain for trail in trails) or (name in SPATIAL and self._has_channels(name, args))
        of_mask = all(trail.of_mask for trail in trails) and len(trails) > 0
        depends_on_shape_only = name in FILLED and len(trails) == 1 and bool(args) and self.trail(args[0]) is not None
        for output, p in zip(outputs, of_outputs, strict=False):
            if depends_on_shape_only or name in FINITENESS:  # what is not finite has no useful gradients anyway
                self._trails.put_constant(output, ())
                continue
            if p is not None and p.shape != output.shape:  # another operation of the same name
                p = None
            newly_lost = had_positions and not lost_by and (p is None or bool((compact(p) == LOST).any()))
            self._trails.put(output, Trail(p, origins, name if newly_lost else lost_by, is_certain, of_mask))


_signature = cache(inspect.signature)


def _with_input_first(args: tuple, kwargs: dict[str, object]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of an operation, with the first one by position even if it was given by name, as `input=x`."""
    if args or "input" not in kwargs:
        return args, kwargs
    return (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}


def _condense_all(result: Result) -> Result:
    """Condense the positions that a rule returns."""
    if isinstance(result, Tensor):
        return condense(result)
    return None if result is None else [None if positions is None else condense(positions) for positions in result]


def _owners(model: nn.Module, names_of: nn.Module | None = None) -> dict[int, str]:
    """The name of the module that holds each tensor, by the tensor's id.

    Args:
        model: The model that contains the tensors.
        names_of: The model by which the modules are named; None: the same model.
    """
    names = {id(module): name for name, module in (names_of or model).named_modules()}
    return {
        id(tensor): _WRAPPED.sub("", names.get(id(module), name))
        for name, module in model.named_modules()
        for tensor in _own_tensors_of(module)
    }


# The ends of the names that PEFT gives to a layer inside the adapter that has replaced it.
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save\.\w+|original_module)$")


def _union(groups: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    distinct = {id(tensor): tensor for tensors in groups for tensor in tensors}
    return tuple(distinct.values())


def _caller() -> str:
    """The innermost line of code outside of PyTorch and this module; "" if it belongs to this package."""
    own_package = __name__.partition(".")[0]
    for frame, line in traceback.walk_stack(None):
        name = frame.f_globals.get("__name__", "")
        package = name.partition(".")[0]
        if package == own_package and name != __name__:
            return ""
        if package not in ("torch", "traceback", own_package):
            return f"{Path(frame.f_code.co_filename).name}:{line}"
    return "the model"


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from _own_tensors_of(module)


def _own_tensors_of(module: nn.Module) -> Iterator[Tensor]:
    values = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    return (value for value in values if isinstance(value, Tensor))
