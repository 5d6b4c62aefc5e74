"""Data flows one way: a stage imports only from those before it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAYERS = (
    ("posttrain.types",),
    ("posttrain.data",),
    ("data_recipes", "reward_models"),
    ("posttrain.schema", "posttrain.recipe_rules", "posttrain.config"),
    ("posttrain.model",),
    ("posttrain.rollout",),
    ("posttrain.evaluate",),
    ("posttrain.algorithm",),
    ("posttrain.train",),
    ("posttrain.report", "posttrain.publish"),
    (
        "posttrain.doctor",
        "posttrain.quickstart",
        "posttrain.score",
        "posttrain.inspect_rows",
        "posttrain.select_rows",
        "posttrain.eval_suite",
        "posttrain.compare_evals",
    ),
    ("posttrain.cli",),
)


def rank(module: str) -> int | None:
    for i, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return i
    return None


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if rank(name) is not None}


def type_only(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            for child in node.body:
                found.add(child.module)
                found |= {f"{child.module}.{alias.name}" for alias in child.names}
    return found


def test_every_module_has_a_layer_and_imports_downwards() -> None:
    wrong = []
    for package in ("posttrain", "reward_models", "data_recipes"):
        for path in (ROOT / package).rglob("*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            module = module.removesuffix(".__init__")
            if module == "posttrain":
                continue
            own = rank(module)
            assert own is not None, f"{module} has no layer"
            for name in imports(path) - type_only(path):
                if rank(name) > own:  # type: ignore[operator]
                    wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)
