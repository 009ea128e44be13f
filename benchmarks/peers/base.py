"""What another library must say to take part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

from ..backends import Backend


@dataclass(frozen=True)
class Peer:
    """Another library.

    Attributes:
        name: of its figures.
        task: what it can do: "training" (it prepares a net) or "inference" (it makes a net's int8 form run).
        needs: the modules to be found for it.
        load: makes its backend, once, when it is first needed.
        slow: whether it compiles for long: not in a quick run.
    """

    name: str
    task: str
    needs: Sequence[str]
    load: Callable[[], Backend]
    slow: bool = False

    @cached_property
    def missing(self) -> list[str]:
        """What of its needs is not installed."""
        return [name for name in self.needs if find_spec(name) is None]

    @cached_property
    def _loaded(self) -> Backend:
        return self.load()

    def backend(self) -> Backend:
        """The library as a contender."""
        return self._loaded
