"""Imports point down, or sideways in their folder; read from the source by ast."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "portway"
GROUND = {"errors", "address", "deadline", "lifecycle", "provider", "_accel"}
ALLOWED = {
    "ground": set(),
    "wire": {"ground"},
    "kernel": {"ground", "wire"},
    "transport": {"ground", "wire", "kernel"},
    "channels": {"ground", "wire", "kernel", "transport"},
    "remoting": {"ground", "wire", "kernel", "transport"},
    "hosting": {"ground", "wire", "kernel", "transport", "channels", "remoting"},
    "supervise": {"ground", "wire", "kernel", "public"},
    "testing": {"ground", "wire", "kernel", "public", "supervise"},
    "cli": {"ground", "wire", "kernel", "public", "supervise", "testing", "tour"},
    "tour": {"ground", "wire", "kernel", "public", "supervise"},
    "public": {"ground", "wire", "kernel", "transport", "channels", "remoting", "hosting", "supervise", "cli"},
}
TOOLS = {"supervise", "cli", "tour", "dash"}
SOURCES = sorted(ROOT.rglob("*.py"))


def floor(module: str) -> str:
    """Of ``portway.kernel.inbox``: kernel."""
    parts = module.split(".")[1:]
    if not parts or parts[0] in ("aio", "__init__", "__main__", "win32pipe"):
        return "public"
    if parts[0] in GROUND:
        return "ground"
    return "native" if parts[0] in ("_native", "_handoff_python") else parts[0]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[str, int, list[str]]]:
    """(module, line, names) of every import of portway in a source file, also those in functions; those for types
    only are left out."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    found = []
    for node in _run_time(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(one.name, node.lineno, []) for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")
            base = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [one.name for one in node.names]
            if module == "portway":  # "from . import errors" names modules
                found += [(f"portway.{name}" if (ROOT / f"{name}.py").exists() or (ROOT / name).is_dir() else module,
                           node.lineno, [name]) for name in names]  # fmt: skip
            else:
                found.append((module, node.lineno, names))
    return [one for one in found if one[0].split(".")[0] == "portway"]


def _run_time(tree: ast.AST) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        nodes += [child, *_run_time(child)]
    return nodes


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    here = floor(name_of(path))
    for module, line, _ in imports(path):
        there = floor(module)
        if there == here or here == "native":
            continue
        assert there != "native", f"{path}:{line}: only _accel may choose an implementation"
        assert there in ALLOWED[here], f"{path}:{line}: {here} must not import {module} ({there})"


@pytest.mark.parametrize("path", [one for one in SOURCES if floor(name_of(one)) in TOOLS], ids=name_of)
def test_tools_use_only_public_names_of_the_floors_below(path: Path) -> None:
    for module, line, names in imports(path):
        if floor(module) not in TOOLS:
            private = {one for one in (*module.split("."), *names) if one[:1] == "_" and one[:2] != "__"} - {"_accel"}
            assert not private, f"{path}:{line}: {private} of {module}"


def test_only_accel_knows_the_native_modules() -> None:
    for path in SOURCES:
        text = path.read_text()
        strings = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
        named = {one for one in strings if isinstance(one, str) and one.startswith(("portway._native", "._native"))}
        assert not named or path.name == "_accel.py", f"{path}: {named}"


@pytest.mark.parametrize("path", sorted((ROOT / "wire").glob("*.py")), ids=name_of)
def test_wire_is_pure(path: Path) -> None:
    """No clock, no file, no system; of socket only constants and the text form of addresses."""
    tree = ast.parse(path.read_text())
    modules = {one.name for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    impure = {"os", "time", "select", "asyncio", "threading", "subprocess", "io", "fcntl", "signal", "random"}
    assert not {one.split(".")[0] for one in modules} & impure
    allowed = {"AddressFamily", "SocketKind", "inet_ntoa", "inet_ntop", "inet_aton", "inet_pton"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "socket":
            assert node.attr in allowed or node.attr.startswith(("AF_", "SOCK_", "IPPROTO_")), f"socket.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "print", "input")


def test_no_floor_is_unknown() -> None:
    for path in SOURCES:
        assert floor(name_of(path)) in {*ALLOWED, "native"}, path
