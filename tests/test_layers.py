"""Imports point one way, heavy libraries stay in their rooms, and what ships to a silo knows nothing of the server."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import foedus

ROOT = Path(foedus.__file__).parent
LAYERS = [
    "errors types tree wire seeds discriminant marginals kernels attention",
    "assets data stages server privacy secure",
    "lm silo algorithms evaluation audit",
    "engines",
    "loop gather governance",
    "treaty methods build sums estimate",
    "report listing",
    "execute progress auditing worker launch study advise sinks dashboard deploy",
    "trainer console cli cli_advise cli_coordinator cli_dashboard cli_ledger cli_privacy cli_registry cli_silo"
    " cli_study cli_treaty",
    "__main__",
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms.split()}
FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def room_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def imports(file: Path) -> tuple[tuple[str, bool], ...]:
    """(module or room of ours, whether it is ours) for every import in a file, those under TYPE_CHECKING included."""
    return tuple(_imports(file))


def _imports(file: Path) -> Iterator[tuple[str, bool]]:
    depth = len(file.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or "", False
        elif isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from (
                (name.split(".")[0], True) for name in ([node.module] if node.module else [a.name for a in node.names])
            )


def test_every_file_has_a_room_and_says_what_it_is_for():
    for file in FILES:
        assert room_of(file) in RANK, f"{file.name} is in no layer"
        assert ast.get_docstring(ast.parse(file.read_text())), f"{file} has no docstring"


def test_imports_point_one_way():
    for file in FILES:
        for name, ours in imports(file):
            if ours and name in RANK and name != room_of(file):
                assert RANK[name] <= RANK[room_of(file)], f"{file.relative_to(ROOT)} imports {name}"


def test_what_ships_to_a_silo_never_imports_the_server():
    for file in FILES:
        if room_of(file) in ("silo", "lm", "stages", "types", "algorithms"):
            for name, ours in imports(file):
                assert not (ours and name in ("server", "loop", "report", "governance", "engines")), file


def test_an_algorithm_cannot_touch_the_noise():
    for file in (ROOT / "algorithms").glob("*.py"):
        assert not {name for name, ours in imports(file) if ours} & {"privacy", "engines", "governance"}, file


def test_only_the_accountant_imports_the_accounting_library():
    for file in FILES:
        libraries = {name.split(".")[0] for name, ours in imports(file) if not ours}
        assert file.name == "accountant.py" or "dp_accounting" not in libraries, file


def test_libraries_that_few_runs_need_are_imported_in_one_file_each():
    for file in FILES:
        libraries = {name.split(".")[0] for name, ours in imports(file) if not ours}
        assert "sklearn" not in libraries or file.name == "probe.py", file
        assert "faiss" not in libraries or file.name == "datastore.py", file


def test_what_a_deployment_needs_is_imported_in_one_place_each():
    homes = {
        "flwr": "engines/flower.py",
        "sqlalchemy": "governance/registry.py governance/shelf.py",
        "psycopg": "",
        "keyring": "governance/vault.py",
    }
    rooms = {
        "starlette": "dashboard",
        "uvicorn": "dashboard engines",
        "prometheus_client": "dashboard",
        "mlflow": "sinks",
    }
    for file in FILES:
        libraries, name = {n.split(".")[0] for n, ours in imports(file) if not ours}, file.relative_to(ROOT).as_posix()
        assert all(library not in libraries or name in home for library, home in homes.items()), name
        assert all(library not in libraries or room_of(file) in room for library, room in rooms.items()), name


def test_only_a_plan_makes_what_bears_on_a_guarantee():
    made = {"PrivateSteps", "Clip", "Grid", "AddNoise", "Gaussian", "DiscreteGaussian", "Correlated", "Bare", "AtSilos",
            "SecretPoisson", "ExpectedMean", "Parts", "Following", "Survey"}  # fmt: skip
    for file in FILES:
        calls = {
            node.func.id for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }  # fmt: skip
        allowed = room_of(file) == "privacy" and file.name in ("plan.py", "steps.py")
        grid = (
            {"Grid"} if file.name == "sums.py" else set()
        )  # rounding for the words; whatever plan there is, it bounds it
        assert allowed or not calls & made - grid, f"{file.relative_to(ROOT)} makes {calls & made}"


def test_an_algorithm_imports_no_sibling():
    for file in (ROOT / "algorithms").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and file.name != "__init__.py":
                assert node.module == "base", f"{file.name} imports {node.module}"


def test_only_build_and_what_stands_above_it_reads_a_treaty():
    above = {
        *("treaty", "methods", "build", "sums", "worker", "estimate", "report", "listing", "execute", "progress"),
        *("auditing", "trainer", "cli", "cli_privacy", "study", "deploy", "dashboard", "advise", "cli_advise"),
        *("cli_treaty", "cli_coordinator", "cli_silo"),
    }
    for file in FILES:
        assert room_of(file) in above or ("treaty", True) not in set(imports(file)), file


def test_torch_stays_in_the_rooms_of_the_model():
    allowed = {"lm", "silo", "audit", "build", "governance"}  # build sets threads, governance names the hardware
    for file in FILES:
        if any(name.split(".")[0] == "torch" for name, ours in imports(file) if not ours):
            assert room_of(file) in allowed, f"{file.relative_to(ROOT)} imports torch"


def test_nothing_that_executes_is_ever_loaded():
    for file in FILES:
        names = {name for name, ours in imports(file) if not ours}
        assert not names & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, file
        text = file.read_text()
        assert "torch.load(" not in text and "trust_remote_code=True" not in text, file


def test_importing_foedus_and_asking_for_help_loads_no_heavy_library():
    heavy = (
        "torch",
        "transformers",
        "datasets",
        "matplotlib",
        "pyarrow",
        "scipy",
        "sklearn",
        "faiss",
        "flwr",
        "sqlalchemy",
        "starlette",
        "uvicorn",
        "prometheus_client",
    )
    code = f"import sys, foedus, foedus.cli; print([m for m in {heavy} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
