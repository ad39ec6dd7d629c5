"""Calls of the runtime interface as messages, which every rank of a model performs in the same order.

A tensor that a call returns is known to all ranks by the call's number and its place among the results; each has its own.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

from bagel_opt.profile import Profile
from bagel_opt.runtime.parallel import Part, RankRuntime

Name = tuple[int, int]


@dataclass(frozen=True)
class Ref:
    """A result of an earlier call, or a part of one: keys are what it is indexed by, one after another."""

    name: Name
    keys: tuple = ()


class Kept:
    """A result that all ranks keep as long as this object is there."""

    def __init__(self, name: Name, released: deque):
        self.name, self.released = name, released

    def __del__(self):
        self.released.append(self.name)


class Handle:
    """A tensor, or a batch's caches, that every rank has of its own."""

    def __init__(self, kept: Kept, keys: tuple = ()):
        self.kept, self.keys = kept, keys

    def __getitem__(self, key: Any) -> "Handle":
        return Handle(self.kept, (*self.keys, key))

    __iter__ = None  # or it would have no end

    @property
    def ref(self) -> Ref:
        return Ref(self.kept.name, self.keys)


def named_in(given: Any) -> Any:
    """With names in place of handles, for a message."""
    if isinstance(given, tuple | list):
        return type(given)(map(named_in, given))
    return given.ref if isinstance(given, Handle) else given


@dataclass(frozen=True)
class Call:
    """A method of RankRuntime. released: results that nobody uses any more. answered: whether each rank says when it is done;
    otherwise only what fails is told. profile: of the programs, where each profile has its own."""

    number: int
    method: str
    given: tuple
    released: tuple[Name, ...]
    profile: Profile | None = None
    answered: bool = False


@dataclass(frozen=True)
class Answer:
    """Of a rank, to a call. asked: whether the call is answered in any case. gathers: how many tensors it gathered for it.
    error: what it raised, by kind and text."""

    number: int
    asked: bool = True
    gathers: int = 0
    error: tuple[str, str] | None = None


class Rank:
    """One rank's results, and its performance of calls. gathers: of the last call."""

    def __init__(self, runtime: RankRuntime):
        self.runtime = runtime
        self.by_profile: dict[str, RankRuntime] = {}
        self.values: dict[Name, Any] = {}
        self.gathers = 0

    def __reduce__(self):
        raise TypeError(
            "a model on several GPUs cannot be pickled or copied: load it in each process that is to have it"
        )

    def perform(self, call: Call) -> tuple:
        """The results, which are kept under their names, too."""
        for name in call.released:
            self.values.pop(name, None)
        before = self.runtime.groups.count
        try:
            if call.method == "look":  # has gathered what it names
                return (self.look(*call.given),)
            if call.method == "give_back_any":  # of ranks of which some got none
                if caches := self.values.pop(call.given[0].name, None):
                    self.runtime.give_back(caches)
                return ()
            found = getattr(self._runtime(call.profile), call.method)(*self.look(call.given))
        except MemoryError:
            self.runtime.inner.free_memory()
            raise
        finally:
            self.gathers = self.runtime.groups.count - before
        results = found if isinstance(found, tuple) else (found,)
        self.values.update({(call.number, place): value for place, value in enumerate(results)})
        return results

    def look(self, given: Any) -> Any:
        """With the results themselves in place of their names. What is in parts is gathered by all ranks, once."""
        if isinstance(given, tuple | list):
            return type(given)(map(self.look, given))
        if not isinstance(given, Ref):
            return given
        if self.in_parts(given):
            self.values[given.name] = self.values[given.name].whole()
        value = self.values[given.name]
        for key in given.keys:
            value = value[key]
        return value

    def in_parts(self, ref: Ref) -> bool:
        return isinstance(self.values.get(ref.name), Part)

    def exchanges(self, call: Call) -> bool:
        """Whether ranks wait for each other in it."""
        runs = call.method == "run" and self.runtime.exchanging(call.given[0])
        return runs or call.method in ("first_ranks", "gather_seconds") or self._any_in_parts(call.given)

    def _any_in_parts(self, given: Any) -> bool:
        if isinstance(given, tuple | list):
            return any(map(self._any_in_parts, given))
        return isinstance(given, Ref) and self.in_parts(given)

    def _runtime(self, profile: Profile | None) -> RankRuntime:
        if profile is None:
            return self.runtime
        if profile.name not in self.by_profile:
            self.by_profile[profile.name] = self.runtime.for_profile(profile)
        return self.by_profile[profile.name]
