"""Nothing in the enclave draws from a generator that is not for cryptography."""

import ast
import pathlib

import pytest

import enclave_runtime


def test_enclave_draws_from_no_other_generator():
    root = pathlib.Path(enclave_runtime.__file__).parent
    for path in root.rglob("*.py"):
        if root / "gramine" in path.parents:
            continue  # builds the enclave and never runs in it
        assert not other_generators(path.read_text()), path


def other_generators(source: str) -> list[str]:
    """Names by which a generator that is not for cryptography could be reached."""
    forbidden = {"random", "numpy.random", "jax.random", "scipy.stats"}
    nodes = list(ast.walk(ast.parse(source)))
    imports = [a for node in nodes if isinstance(node, ast.Import) for a in node.names]
    packages = {a.asname: a.name for a in imports}
    found = []
    for node in nodes:
        names = set()
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = {f"{packages.get(node.value.id, node.value.id)}.{node.attr}"}
        elif isinstance(node, ast.Import):
            names = {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{a.name}" for a in node.names} | {str(node.module)}
        found += [n for n in names for f in forbidden if n == f or n.startswith(f"{f}.")]
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "import random as r",
        "import numpy.random",
        "import jax.random as jr",
        "from numpy import random",
        "from jax import random as jr",
        "from random import SystemRandom",
        "from numpy.random import default_rng",
        "from jax.random import key, bits",
        "np.random.default_rng(0)",
        "f(np.random)",
        "numpy.random.normal()",
        "jax.random.key(0)",
    ],
)
def test_other_generators_are_noticed(source):
    assert other_generators(f"import numpy as np\n{source}")
    assert not other_generators("import secrets\nfrom jax.extend import random_bits\nx.random")
