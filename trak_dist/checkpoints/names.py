"""Names in a state dict: which are the model's, however training tools write them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trak_dist.listing import first_few

WRAPPERS = ("module", "_orig_mod")  # of DistributedDataParallel, of torch.compile
_PLACES = 5  # listed at most, of what is left out


class State(dict[str, Tensor]):
    """Named tensors, with the versions of the modules that saved them if those are known.

    By the version a module knows how to read an older state dict.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Any = None) -> None:
        super().__init__(tensors)
        usable = isinstance(metadata, Mapping) and all(
            isinstance(v, Mapping) for v in metadata.values()
        )
        self._metadata: Mapping[str, Any] | None = metadata if usable else None  # where torch looks

    @property
    def metadata(self) -> Mapping[str, Any] | None:
        """What torch keeps of each module, by its name."""
        return self._metadata


@dataclass(frozen=True)
class Part:
    """What a state dict holds below a prefix, under the model's names where it has such."""

    prefix: str
    state: State
    wrappers: tuple[str, ...]
    left_out: tuple[str, ...]

    def notes(self) -> list[str]:
        """What was left out of the names, and of the tensors."""
        notes = [f"the prefix {self.prefix!r} of its names is left out"] if self.prefix else []
        notes += [f"{wrapper + '.'!r} inside of its names is left out" for wrapper in self.wrappers]
        if self.left_out:
            notes.append(f"other parts that it holds are left out: {self.left_out_summary()}")
        return notes

    def left_out_summary(self) -> str:
        """The parts that are left out, as `criterion.weight, ema.* (12 tensors)`."""
        below = defaultdict(list)
        for name in self.left_out:
            below[_diverging_prefix(name, self.prefix)].append(name)
        places = [
            names[0] if len(names) == 1 else f"{place}.* ({len(names)} tensors)"
            for place, names in below.items()
        ]
        return first_few(places, _PLACES)


class Names:
    """The names of a model's tensors, in all spellings that training tools use."""

    def __init__(self, model: nn.Module, own: Mapping[str, Tensor]) -> None:
        self._own = own
        self._modules = {
            _without_wrappers(place): place for name in own for place in _module_paths(name)
        }
        aliases = defaultdict(set)
        for name in own:
            for alias in {name}.union(*(saved_by_peft(name, a) for a in adapters(model))):
                aliases[_without_wrappers(alias)].add(name)
        self._aliases = {
            alias: found for alias, names in aliases.items() if (found := self._unambiguous(names))
        }

    def _unambiguous(self, names: set[str]) -> str:
        """The name that is meant: of several adapters the trained one."""
        trained = {name for name in names if self._own[name].requires_grad} or names
        return next(iter(trained)) if len(trained) == 1 else ""

    def whole(self, state: State) -> Part:
        """The whole state dict."""
        return self._part(state, "")

    def parts(self, state: State) -> Iterator[Part]:
        """What lies below each prefix, in order of its length, that some name of the model has."""
        prefixes = {
            name[:start]
            for name in state
            for start in _prefix_ends(name)
            if self.own_name(name[start:])
        }
        return (self._part(state, p) for p in sorted(prefixes, key=lambda p: (len(p), p)))

    def own_name(self, name: str) -> str:
        """The model's name for it; empty if there is none, or if it begins with a wrapper's."""
        if name in self._own:
            return name
        return (
            ""
            if name.partition(".")[0] in WRAPPERS
            else self._aliases.get(_without_wrappers(name), "")
        )

    def _part(self, state: State, prefix: str) -> Part:
        tensors: dict[str, Tensor] = {}
        wrappers: dict[str, None] = {}
        below = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        for name in sorted(below, key=lambda name: name not in self._own):  # the exact ones first
            found = self.own_name(name)
            if found in tensors and torch.equal(tensors[found], below[name]):
                continue  # the same under another name
            if found and found not in tensors:
                wrappers |= dict.fromkeys(w for w in WRAPPERS if w in _dropped_parts(name, found))
                tensors[found] = below[name]
            else:
                tensors[name] = below[name]
        left_out = tuple(name for name in state if not name.startswith(prefix))
        versions = {
            self._modules.get(
                _without_wrappers(place[len(prefix) :]), place[len(prefix) :]
            ): version
            for place, version in (state.metadata or {}).items()
            if f"{place}.".startswith(prefix)
        }
        return Part(prefix, State(tensors, versions or None), tuple(wrappers), left_out)


def adapters(model: nn.Module) -> list[str]:
    """The names of a PEFT model's adapters."""
    found = getattr(model, "peft_config", None)
    return [str(name) for name in found] if isinstance(found, Mapping) else []


def saved_by_peft(name: str, adapter: str) -> set[str]:
    """The names that PEFT saves a tensor of an adapter under: its own, without the adapter's."""
    if name == f"prompt_encoder.{adapter}.embedding.weight":
        return {"prompt_embeddings"}
    if name.endswith(f".lora_magnitude_vector.{adapter}.weight"):
        return {name.removesuffix(f".{adapter}.weight")}
    saved = {name, name.replace(f".modules_to_save.{adapter}.", ".")}
    return {_without(adapter, method.split(".")) for method in saved}


def _without(adapter: str, parts: list[str]) -> str:
    """The name, where the last part but at most one is not the adapter's."""
    at = next((i for i in (-1, -2) if parts[i:][:1] == [adapter]), len(parts))
    return ".".join(part for i, part in enumerate(parts, -len(parts)) if i != at)


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _dropped_parts(name: str, found: str) -> set[str]:
    return set(name.split(".")) - set(found.split("."))


def _prefix_ends(name: str) -> Iterable[int]:
    """Where a prefix may end."""
    return (i + 1 for i, letter in enumerate(name) if letter == ".")


def _module_paths(name: str) -> Iterator[str]:
    """The modules that a tensor lies in."""
    yield ""
    yield from (name[: start - 1] for start in _prefix_ends(name))


def _diverging_prefix(name: str, prefix: str) -> str:
    """The beginning of a name up to where it leaves the prefix."""
    shared = 0
    parts, others = name.split("."), prefix.split(".")
    while shared < len(parts) - 1 and parts[shared] == others[shared]:
        shared += 1
    return ".".join(parts[: shared + 1])
