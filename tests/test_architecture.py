"""Who may import what: folders import one way, and the enclave imports nothing untrusted."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tempo_jax as tempo
from enclave_runtime.schemes import SCHEMES

ROOT = Path(tempo.__file__).parent.parent

# Every folder, with those that it may import; from the top of the house to its ground.
RULES = {
    "tempo_jax": {
        "cli": {"api", "enclave", "planning", "transport", "attestation"},
        "api": {"reporting", "running", "enclave", "planning", "sealing", "jaxprs"},
        "reporting": {"planning", "jaxprs"},
        "running": {"enclave", "transport", "planning", "sealing", "jaxprs"},
        "enclave": {"transport", "attestation", "sealing", "planning", "jaxprs"},
        "planning": {"families", "equivariance", "jaxprs"},
        "families": {"jaxprs"},
        "equivariance": {"jaxprs"},
        "transport": {"attestation"},
        "sealing": {"jaxprs"},
        "attestation": set(),
        "jaxprs": set(),
    },
    "enclave_runtime": {
        "gramine": {"execution", "serving", "schemes", "protocol", "crypto", "compiled"},
        "serving": {"sessions", "verifying", "protocol", "crypto"},
        "sessions": {"verifying", "execution", "schemes", "protocol", "crypto"},
        "verifying": {"execution", "protocol", "crypto"},
        "execution": {"schemes", "protocol", "crypto"},
        "schemes": {"protocol", "crypto", "compiled"},
        "protocol": {"crypto"},
        "crypto": {"compiled"},
        "compiled": set(),
    },
}
# Modules beside the folders that all may import, and those that pass names on to users.
GROUND = {
    "tempo_jax": {"errors", "cache", "schemes"},
    "enclave_runtime": {"environment"},
}
FACADES = {
    "tempo_jax": {"__init__", "__main__", "testing", "checkpoints"},
    "enclave_runtime": {"__init__", "__main__"},
}
MOST_MODULES = 14  # in a folder; more are a corridor, not a room


def imports_of(path: Path) -> Iterator[tuple[str, str | None]]:
    """(module, name) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                yield node.module or "", alias.name


def modules_of(package: str) -> dict[str, Path]:
    """Modules of a package by their dotted name."""
    out = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


def imported(package: str) -> dict[str, set[str]]:
    """For each module of a package what it imports, submodules named in full."""
    known = {**modules_of("tempo_jax"), **modules_of("enclave_runtime")}
    out: dict[str, set[str]] = {}
    for module, path in modules_of(package).items():
        out[module] = {
            f"{source}.{name}" if f"{source}.{name}" in known else source
            for source, name in imports_of(path)
        }
    return out


@pytest.mark.parametrize("package", RULES)
def test_folders_import_one_way(package):
    rules, ground = RULES[package], GROUND[package]
    for module, sources in imported(package).items():
        room = (module.split(".") + ["__init__"])[1]
        if room in FACADES[package]:
            continue
        assert room in rules or room in ground, f"{module} stands in no folder of the rule"
        used = {s.split(".")[1] for s in sources if s.startswith(f"{package}.")}
        assert used <= {room, *rules.get(room, ()), *ground}, module


@pytest.mark.parametrize("package", RULES)
def test_rule_itself_has_no_cycle(package):
    order: set[str] = set()
    rules = RULES[package]
    while len(order) < len(rules):
        free = {room for room, used in rules.items() if room not in order and used <= order}
        assert free, f"a cycle among {sorted(set(rules) - order)}"
        order |= free


@pytest.mark.parametrize("package", RULES)
def test_imports_have_no_cycle(package):
    graph = imported(package)
    # `from package import module` runs the package's own file too, which imports everything.
    graph = {m: {s for s in sources if s in graph and s != package} for m, sources in graph.items()}
    order: list[str] = []
    while len(order) < len(graph):
        free = [m for m in graph if m not in order and graph[m] <= set(order)]
        assert free, f"a cycle among {sorted(set(graph) - set(order))}"
        order += free


@pytest.mark.parametrize("package", RULES)
def test_folders_are_rooms(package):
    for folder in {path.parent for path in modules_of(package).values()}:
        modules = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert len(modules) <= MOST_MODULES, folder
        assert not [p for p in modules if p.name.startswith("_") and p.name != "__main__.py"], (
            folder
        )


def test_no_module_name_stands_in_both_packages():
    names = [
        {path.stem for path in modules_of(package).values()} - {"__init__", "__main__"}
        for package in RULES
    ]
    assert not names[0] & names[1]


def test_enclave_imports_nothing_of_the_untrusted_side():
    imports = imported("enclave_runtime")
    assert "enclave_runtime.sessions.session" in imports
    for module, sources in imports.items():
        roots = {source.partition(".")[0] for source in sources}
        assert not roots & {"tempo_jax", "tests", "examples", "optax", "flax"}, module
        assert "jax._src" not in {".".join(s.split(".")[:2]) for s in sources}, module
        # The few dependencies that an auditor has to know; what compiles stands in two places.
        foreign = roots - sys.stdlib_module_names - {"enclave_runtime"}
        compiled = ("enclave_runtime.compiled.", "enclave_runtime.gramine.ahead_of_time")
        if module.startswith(compiled):
            foreign -= {"llvmlite", "numba"}
        assert foreign <= {"jax", "numpy", "ml_dtypes", "cryptography"}, module


def test_host_imports_only_what_both_sides_share():
    for module, sources in imported("tempo_jax").items():
        used = {s for s in sources if s.partition(".")[0] == "enclave_runtime"}
        if module == "tempo_jax.schemes":  # the descriptions of schemes, and none of their keys
            public = {scheme.__name__ for scheme in SCHEMES.values()}
            names = {name for name in vars(tempo.schemes) if not name.startswith("_")}
            assert names == {"Group", "SCHEMES", "Scheme", "SchemeCost", *public}
            used -= {"enclave_runtime.schemes.registry"}
        for source in used:
            shared = ("enclave_runtime.protocol.", "enclave_runtime.crypto.encryption")
            ground = {"enclave_runtime", "enclave_runtime.environment"}
            assert source in ground or source.startswith(shared), module


def test_no_two_test_files_have_one_name():
    """Without packages around them pytest takes the second for the first, and refuses it."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(names)


def test_no_two_classes_have_one_name():
    places: dict[str, list[str]] = {}
    for package in RULES:
        for module, path in modules_of(package).items():
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(module)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_jax_internals_are_used_in_one_folder():
    for module, path in modules_of("tempo_jax").items():
        internal = any(source.startswith("jax._src") for source, _ in imports_of(path))
        assert not internal or module.startswith("tempo_jax.jaxprs.")


def test_no_module_unpickles():
    for package in RULES:
        for module, sources in imported(package).items():
            assert not sources & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}, module


def test_documents_name_files_that_exist():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/*.md")]:
        for name in re.findall(
            r"`((?:tests|benchmarks|examples)/[\w/]+\.py)`", document.read_text()
        ):
            assert (ROOT / name).exists(), f"{document.name} names {name}"
