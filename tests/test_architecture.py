"""The rules of the code's shape, as tests: who may import whom, who reads the environment, what has a docstring.

Everything is judged from the source text, without importing it, so the rules also hold for files that need a GPU.
CONTRIBUTING.md says why each rule exists.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fp4dist"

# A module imports its own package and packages of a lower level. Equal levels do not see each other.
LEVEL = {
    "errors": 0,
    "env": 1,
    "spec": 2,
    "numerics": 3,
    "cluster": 3,
    "kernels": 4,
    "nn": 5,
    "comm": 5,
    "megatron": 6,
    "train": 7,
    "study": 8,
    "verify": 8,
}
MEGATRON_USERS = {"megatron", "train"}
ENVIRONMENT_BLIND = {"spec", "numerics"}  # noise, seeds and numerics never depend on the environment
PURE = {"errors": set(), "env": set(), "spec": {"yaml"}}  # third-party packages that the lowest packages may import
HOMELESS = {"util", "utils", "common", "helper", "helpers", "misc"}  # such a name shows a missing concept
# Recipes are data: the code knows only their blocks, and asks for no paper. Blocks and formats may bear a technique's
# name, which some recipes share (tests/recipes/test_recipes.py checks that these are nothing else).
NAMES_OF_BLOCKS = {"bf16", "cage", "ue5m3"}
METHODS = {
    "quartet", "tetrajet", "nvidia_nvfp4", "averis", "chon", "luq", "sun2020", "wang", "zhou", "spam", "nemotron",
    "metis", "ufp4", "all_the_way", "as_released", "quest_mxfp4", "chmiel",
}  # fmt: skip
METHOD_NAMES = tuple(sorted(METHODS | {p.stem for p in (ROOT / "configs/recipes").glob("*.yaml")} - NAMES_OF_BLOCKS))
PAPER = re.compile(r"\b\d{4}\.\d{5}\b")  # an arXiv number
LINE_LIMITS = {"launch/pretrain.py": 80, "README.md": 240, "setup.py": 120}

Import = tuple[int, str]  # line, absolute module
Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


SOURCES = python_files("fp4dist")
PROGRAMS = python_files("fp4dist", "launch", "tools")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=name(path))


def package_of(path: Path) -> str:
    """The first part below fp4dist/: 'spec' for fp4dist/spec/run.py, 'errors' for fp4dist/errors.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[Import]:
    """Every import, those inside functions and type-checking blocks included."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(path, node)
            # `from fp4dist import env` imports the module fp4dist.env
            deeper = module == "fp4dist"
            yield from ((node.lineno, f"{module}.{alias.name}" if deeper else module) for alias in node.names)


def absolute(path: Path, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parent = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
    return ".".join([*parent, *([node.module] if node.module else [])])


def direction_faults(path: Path) -> Iterator[str]:
    own = package_of(path)
    for line, module in imports(path):
        parts = module.split(".")
        if parts[0] != "fp4dist" or len(parts) == 1 or parts[1] == own:
            continue
        target = parts[1]
        if target == "__version__":
            continue
        if target not in LEVEL:
            yield f"{name(path)}:{line}: imports {module}, which has no level; import the module that defines it"
        elif LEVEL[target] >= LEVEL[own]:
            yield f"{name(path)}:{line}: {own} (level {LEVEL[own]}) imports {module} (level {LEVEL[target]})"
        elif target == "env" and own in ENVIRONMENT_BLIND:
            yield f"{name(path)}:{line}: {own} must not depend on the environment"


def swallow_faults(path: Path) -> Iterator[str]:
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        broad = [kind for kind in caught if kind is None or getattr(kind, "id", "") in ("Exception", "BaseException")]
        if broad:
            yield f"{name(path)}:{node.lineno}: catches everything; name the exceptions that can happen"


def environment_faults(path: Path) -> Iterator[str]:
    words = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute) and node.attr in words and getattr(node.value, "id", "") == "os":
            yield f"{name(path)}:{node.lineno}: os.{node.attr} outside fp4dist/env.py"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in words:
                    yield f"{name(path)}:{node.lineno}: imports os.{alias.name} outside fp4dist/env.py"


def docstring_faults(path: Path) -> Iterator[str]:
    """Modules, and public classes, functions and methods; overloads share the docstring of what they overload."""
    tree = parse(path)
    if not ast.get_docstring(tree):
        yield f"{name(path)}:1: the module has no docstring"
    public: list[tuple[ast.AST, str]] = [(tree, "")]
    while public:
        parent, prefix = public.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.If | ast.Try):
                public.append((node, prefix))
            elif isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
                if not ast.get_docstring(node) and not is_repetition(node):
                    yield f"{name(path)}:{node.lineno}: {prefix}{node.name} has no docstring"
                if isinstance(node, ast.ClassDef):
                    public.append((node, f"{prefix}{node.name}."))


def is_repetition(node: ast.ClassDef | Function) -> bool:
    """An overload, a property's setter or deleter, or a method marked as an override: documented elsewhere."""
    marks = {getattr(d, "id", getattr(d, "attr", "")) for d in node.decorator_list}
    return bool(marks & {"overload", "setter", "deleter", "override"})


def method_name_faults(path: Path) -> Iterator[str]:
    """Names of methods and papers in identifiers and strings, docstrings left out; comments are not in the tree."""
    tree = parse(path)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        for word in words_of(node) if id(node) not in prose else ():
            found = next((method for method in METHOD_NAMES if method in word.lower()), None) or PAPER.search(word)
            if found:
                yield f"{name(path)}:{getattr(node, 'lineno', 0)}: {word!r} names a method or a paper"


def words_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for field in ("id", "attr", "name", "arg", "asname"):
        word = getattr(node, field, None)
        if isinstance(word, str):
            yield word


def no_faults(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


def test_every_package_has_a_level() -> None:
    found = {package_of(path) for path in SOURCES} - {"__init__"}
    assert found <= LEVEL.keys(), f"give {sorted(found - LEVEL.keys())} a level in tests/test_architecture.py"


def test_imports_point_downwards() -> None:
    no_faults([fault for path in SOURCES if package_of(path) != "__init__" for fault in direction_faults(path)])


def test_the_package_itself_imports_nothing_of_its_own() -> None:
    """`import fp4dist` must stay free: its public names are resolved on first use."""
    tree = parse(PACKAGE / "__init__.py")
    eager = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    heavy = [node.lineno for node in eager if imported_roots(node) - set(sys.stdlib_module_names)]
    assert not heavy, f"fp4dist/__init__.py imports third-party or own modules eagerly on lines {heavy}"


def imported_roots(node: ast.Import | ast.ImportFrom) -> set[str]:
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or "fp4dist"]
    return {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("package", sorted(PURE))
def test_lowest_packages_need_only_the_standard_library(package: str) -> None:
    allowed = PURE[package] | {"fp4dist"} | set(sys.stdlib_module_names)
    no_faults(
        [
            f"{name(path)}:{line}: {package} must not import {module}"
            for path in SOURCES
            if package_of(path) == package
            for line, module in imports(path)
            if module.split(".")[0] not in allowed
        ]
    )


def test_a_recipe_loads_without_torch() -> None:
    """The same rule, seen from outside: a laptop without torch can read and print recipes."""
    code = "import sys; import fp4dist.spec.load as load; load.load_recipe('bf16'); assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_only_megatron_and_train_import_megatron() -> None:
    no_faults(
        [
            f"{name(path)}:{line}: imports {module}; only fp4dist/megatron and fp4dist/train may"
            for path in SOURCES
            if package_of(path) not in MEGATRON_USERS
            for line, module in imports(path)
            if module.split(".")[0] == "megatron"
        ]
    )


def test_no_test_doubles_in_production() -> None:
    no_faults(
        [
            f"{name(path)}:{line}: imports {module}"
            for path in PROGRAMS
            for line, module in imports(path)
            if module.split(".")[0] in ("unittest", "pytest", "mock", "tests")
        ]
    )


def test_only_env_reads_the_environment() -> None:
    readers = [path for path in PROGRAMS if path != PACKAGE / "env.py"]
    no_faults([fault for path in readers for fault in environment_faults(path)])


def test_nothing_catches_everything() -> None:
    no_faults([fault for path in PROGRAMS for fault in swallow_faults(path)])


def test_public_things_have_docstrings() -> None:
    no_faults([fault for path in SOURCES for fault in docstring_faults(path)])


def test_code_names_no_method() -> None:
    no_faults([fault for path in SOURCES for fault in method_name_faults(path)])


def test_no_homeless_files() -> None:
    folders = ("fp4dist", "launch", "tools", "tests", "csrc")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    no_faults([f"{name(path)}: a function without a home; name the concept" for path in files if path.stem in HOMELESS])


@pytest.mark.parametrize("file", sorted(LINE_LIMITS))
def test_short_files_stay_short(file: str) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert len(lines) < LINE_LIMITS[file], f"{file} has {len(lines)} lines, the limit is below {LINE_LIMITS[file]}"


def test_no_machine_paths_or_registry_hosts() -> None:
    """Nothing in the repository knows the machine that it was written on."""
    path_pattern = r"(?<![\w.~$}>-])/(?:work|tmp|root|opt/(?:pypi|wheels)|home/\w+)(?![\w-])"
    host_pattern = r"\b(?:pypi\.org|pythonhosted\.org|registry\.npmjs\.org)\b"
    pattern = re.compile(f"{path_pattern}|{host_pattern}")
    faults: list[str] = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # compressed data
        for line, content in enumerate(text.splitlines(), 1):
            if found := pattern.search(content):
                faults.append(f"{name(path)}:{line}: {found.group()!r}")
    no_faults(faults)


def repository_files() -> list[Path]:
    """What git tracks or would track; in an unpacked source archive, what it holds."""
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        return [ROOT / file for file in listed if file and (ROOT / file).is_file()]
    folders = ("fp4dist", "configs", "csrc", "launch", "tests", "tools")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return [p for p in [*ROOT.glob("*.*"), *found] if p.is_file() and "__pycache__" not in p.parts]


BAD = """
import os
from fp4dist.train import loop
from fp4dist import nn
import megatron.core
def public():
    try:
        return os.environ["RANK"]
    except (ValueError, Exception):
        return "quartet2", "as in arXiv:2601.22813"
"""


def test_the_rules_catch_what_they_forbid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each checker sees its fault in a file that breaks every rule: a rule that cannot fail guards nothing."""
    bad = tmp_path / "fp4dist" / "spec" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text(BAD, encoding="utf-8")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "fp4dist")
    assert [fault.split(": ", 1)[0] for fault in direction_faults(bad)] == [f"{name(bad)}:{line}" for line in (3, 4)]
    assert len(list(environment_faults(bad))) == 1
    assert len(list(swallow_faults(bad))) == 1
    assert len(list(docstring_faults(bad))) == 2
    assert len(list(method_name_faults(bad))) == 2
    assert (5, "megatron.core") in set(imports(bad))
