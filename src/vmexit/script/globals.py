"""The global variables of a session, and which ones a script defines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vmexit.script import tree, typed
from vmexit.script.builtins import BUILTINS, Take
from vmexit.script.errors import Place, ScriptError
from vmexit.script.types import Type


class GlobalTable:
    """The global variables of a session: each has a cell for good; its type is the last declared one."""

    def __init__(self) -> None:
        self._known: dict[str, typed.Global] = {}

    def get(self, name: str) -> typed.Global | None:
        """The variable of that name, if it is defined."""
        return self._known.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, found: Mapping[str, typed.Global]) -> None:
        """Keep what a script that compiled has defined."""
        self._known.update(found)


def _nodes(start: object) -> Iterator[object]:
    """Everything in a part of the syntax tree, without recursion, in the order of the text."""
    stack = [start]
    while stack:
        node = stack.pop()
        if isinstance(node, list | tuple):
            stack.extend(reversed(node))
        elif isinstance(node, tree.Node):
            yield node
            stack.extend(getattr(node, name) for name in reversed(type(node).__slots__))


def defined_globals(script: tree.Script) -> dict[str, tuple[Place, Type | None]]:
    """The globals that the script defines, with the type where one is declared: those it assigns or takes the address of."""
    found: dict[str, tuple[Place, Type | None]] = {}

    def define(node: object, type_: Type | None = None) -> None:
        if isinstance(node, tree.Global) and (node.name not in found or type_ is not None):
            found.setdefault(node.name, (node.place, None))

    for node in _nodes([script.functions, script.body]):
        match node:
            case tree.Assign(targets=targets) | tree.Chain(targets=targets):
                for target in targets:
                    define(target)
            case tree.Unary(sign="&", operand=operand):
                define(operand)
            case tree.Call(name=name, arguments=arguments) if name in BUILTINS:
                takes = BUILTINS[name].takes
                for argument, take in zip(arguments, takes, strict=False):
                    if take is Take.ATOMIC or name == "reference":
                        define(argument)
            case tree.Declare(is_global=True) as declared:
                before = found.get(declared.name, (declared.place, None))[1]
                if before is not None and before != declared.type:
                    raise ScriptError(f"'.{declared.name}' is declared as {before} already", declared.place)
                found[declared.name] = (declared.place, declared.type)
    return found
