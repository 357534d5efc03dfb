"""Imports only point down, siblings do not know each other, everything is documented and annotated."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "ldctl"
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = (
    {"errors", "types", "samples", "toml_text", "locks", "memory"},
    {"boxes", "fused", "curves", "schema", "keys", "distributed", "toml", "files", "preset_files"},
    {
        "assign",
        "regions",
        "losses",
        "distill",
        "models",
        "data",
        "checkpoint",
        "classes",
        "pairing",
        "mmdet",
        "export",
        "metrics",
        "optim",
        "log",
    },
    {"distillation"},
    {"spec"},
    {"step", "predict", "cacheable"},
    {"trainer", "run_folder"},
    {"assemble"},
    {"caching", "evaluation", "probe"},
    {"engine", "exchange", "options"},
    {"cli"},
    {"__main__"},
)
LAYER = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of everything imported from the package, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "ldctl")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            if node.module and node.module.split(".")[0] == "ldctl":
                yield from (f"{node.module}.{name.name}" for name in node.names)


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_point_down(path: Path) -> None:
    if (name := dotted(path)) == "ldctl":
        return
    part = name.split(".")[1]
    assert part in LAYER, f"{part} has no layer: give it one in the table above"
    for target in imported(ast.parse(path.read_text())):
        other = target.split(".")[1]
        if other in LAYER and other != part:
            assert LAYER[other] < LAYER[part], f"{name} imports {target}"


def test_files_of_a_package_do_not_import_in_circles() -> None:
    names = {dotted(path) for path in FILES}
    graph = {}
    for path in FILES:
        targets = set(imported(ast.parse(path.read_text())))
        # `from package.file import thing` names the file by its longest known prefix
        found = {next((p for p in (t, t.rpartition(".")[0]) if p in names), "ldctl") for t in targets}
        graph[dotted(path)] = found - {"ldctl"}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(names) - 1


def functions(
    body: list[ast.stmt], prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Yield functions, classes and methods with their dotted names, but nothing nested in a function."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield f"{prefix}.{node.name}", node
        if isinstance(node, ast.ClassDef):
            yield from functions(node.body, f"{prefix}.{node.name}")


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if tree.body:
        assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for name, node in functions(tree.body, dotted(path)):
        # magic methods speak through their class, except a call, which is what its object is for
        if not any(part.startswith("_") and part not in ("__call__", "__main__") for part in name.split(".")):
            assert ast.get_docstring(node), f"{name} has no docstring"


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_every_function_is_annotated(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        spec = node.args
        arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
        names = [x.arg for x in arguments if x and x.annotation is None and x.arg not in ("self", "cls")]
        assert names == [], f"{node.name}, line {node.lineno}: without annotation"
        assert node.returns is not None, f"{node.name}, line {node.lineno}: no return annotation"
