"""No two files depend on each other, neither of Python nor of C, and no floor on a higher one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

Graph = Mapping[str, frozenset[str]]


def circles(graph: Graph) -> list[list[str]]:
    """Each strongly connected component with more than one node (Tarjan's algorithm), and each node with itself."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = []
            while True:
                component.append(stack.pop())
                if component[-1] == node:
                    break
            if len(component) > 1 or node in graph.get(node, ()):
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


# ------------------------------------------------------------------------------------------------------- Python


def modules() -> dict[str, Path]:
    files = {}
    for path in sorted((ROOT / "pyhv").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported(name: str, path: Path, known: Iterable[str]) -> frozenset[str]:
    """The modules of ours that a module imports when it runs, wherever the statement stands. Not what only type
    checkers import, and not its own package."""
    known = frozenset(known)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()

    def look(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base)
        for child in ast.iter_child_nodes(node):
            look(child)

    look(ast.parse(path.read_text(encoding="utf-8")))
    return frozenset(found & known) - {name}


def python_graph() -> dict[str, frozenset[str]]:
    files = modules()
    return {name: imported(name, path, files) for name, path in files.items()}


def test_no_circles_in_python() -> None:
    assert circles(python_graph()) == []


# From the ground up. Each package, or module beside them, imports only from floors below its own.
FLOORS = (
    "errors version",
    "_native arguments light guests",
    "cpu",
    "accel",
    "outcome vm",
    "boot state",
    "snapshot migration",
    "control machine",
    "soak",
    "cli",
    "__main__",
)


def floors_broken(graph: Graph, floors: Iterable[str]) -> list[str]:
    level = {name: number for number, names in enumerate(floors) for name in names.split()}

    def room(module: str) -> str:
        return module.split(".")[1]

    return [
        f"{module} imports {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if "." in module and "." in other and room(module) != room(other) and level[room(module)] <= level[room(other)]
    ]


def test_no_floor_imports_a_higher_one() -> None:
    graph = python_graph()
    assert {module.split(".")[1] for module in graph if "." in module} == {n for f in FLOORS for n in f.split()}
    assert floors_broken(graph, FLOORS) == []


# ------------------------------------------------------------------------------------------------------------ C

_DEFINITION = re.compile(
    r"^(?!static\b|typedef\b|struct \w+ \{|enum\b|union\b)[A-Za-z_][\w\s*()]*?\b(\w+)\([^;{]*\)\s*\{", re.M
)
_OBJECT = re.compile(
    r"^(?!static\b|typedef\b|extern\b)(?:const |_Thread_local )*\w[\w \*]*?\b(\w+)(?:\[\w*\])*\s*(?:=[^;{]*)?;", re.M
)


def plain(source: str) -> str:
    """Without comments, strings and preprocessor lines."""
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.S)
    source = re.sub(r'"(?:\\.|[^"\\])*"', '""', source)
    return re.sub(r"^#.*(?:\\\n.*)*$", "", source, flags=re.M)


def c_graph(sources: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """Which file uses a function, or an object, that another defines."""
    text = {name: plain(source) for name, source in sources.items()}
    home: dict[str, str] = {}
    for name, source in text.items():
        for pattern in (_DEFINITION, _OBJECT):
            for symbol in pattern.findall(source):
                home[symbol] = name
    words = {name: frozenset(re.findall(r"\b[A-Za-z_]\w*\b", source)) for name, source in text.items()}
    return {name: frozenset(home[word] for word in words[name] & home.keys()) - {name} for name in text}


def c_sources() -> dict[str, str]:
    files = (ROOT / "csrc").rglob("*.c")
    return {str(path.relative_to(ROOT / "csrc")): path.read_text(encoding="utf-8") for path in files}


def test_no_circles_in_c() -> None:
    graph = c_graph(c_sources())
    assert "registers" in str(graph["kvm/state.c"])  # it sees what is used
    assert circles(graph) == []


# ------------------------------------------------------------------------------------------------- that it works


@pytest.mark.parametrize(
    "graph, found",
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, [["b", "c"]]),
        ({"a": {"a"}}, [["a"]]),
    ],
)
def test_circles_are_found(graph: dict[str, set[str]], found: list[list[str]]) -> None:
    assert circles({node: frozenset(others) for node, others in graph.items()}) == found


def test_a_broken_floor_is_found() -> None:
    graph = {"p.low.a": frozenset({"p.high"}), "p.high": frozenset({"p.low.a", "p.beside"}), "p.beside": frozenset()}
    assert floors_broken(graph, ["low", "high beside"]) == ["p.high imports p.beside", "p.low.a imports p.high"]


def test_a_circle_in_c_is_found() -> None:
    sources = {
        "one.c": "#include <x.h>\nint one(int n)\n{\n    return two(n);\n}\n",
        "two.c": "static int own(void)\n{\n    return 0;\n}\n\nint two(int n)\n{\n    return one(n - own());\n}\n",
        "three.c": '/* calls one() */ const char *three(void)\n{\n    return "two(";\n}\n',
    }
    assert circles(c_graph(sources)) == [["one.c", "two.c"]]
