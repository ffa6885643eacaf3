"""A Mac's GPU (MPS) has no float64: who may ask for one, read from the source.

A function may name float64 in what it passes to one of those that know of such devices; where what it makes is on the
CPU by its decorator; or if it is named here, with the reason.
"""

import ast

import pytest
from shared import ROOT

ROOMS = ("randomness", "schedules", "times", "noise", "targets", "process", "training")
KNOW = ("in_float64", "log_snr", "alpha_sigma", "to_unit", "from_unit")
"""Functions that take the wanted dtype, and a tensor on any device."""
TABLES = ("compute_betas", "compute_log_snr_table", "compute_alpha_bars")
"""A schedule's hooks that make a table: on the CPU, within `Schedule`'s kept ones."""
ALLOWED = {
    "randomness/philox.py": {"uniforms": "its callers: points are on the host, or of_points takes them there"},
    "schedules/numbers.py": {"in_float64": "the one that knows", "read_numbers": "of a file, by numpy"},
    "schedules/base.py": {"Schedule.ends": "two numbers on the CPU", "_interpolate": "within in_float64"},
    "schedules/subsets.py": {"Truncated._units": "two numbers on the CPU"},
    "schedules/shifts.py": {"InterpolatedShift.__post_init__": "two numbers on the CPU"},
    "times/densities.py": {"Times.histogram": "of quantiles on the CPU"},
    "times/part_laws.py": {"ContextParts.finish": "one number on the CPU"},
    "times/mixed.py": {"MixedTimes.check": "one number on the CPU", "_cdf": "a table on the CPU"},
    "times/pair_laws.py": {"grid_cell": "of times, which are drawn where float64 is"},
    "times/pair_level_laws.py": dict.fromkeys(("SigmaRatio._stages", "Neighbours.cells"), "of places, likewise"),
    "times/importance.py": {
        "Importance._shares": "where_float64_is",
        "Importance.quantile": "of what _shares gives",
        "Importance.importance_weight": "of what _shares gives",
        "_gather": "between ranks, and MPS has one",
    },
    "process/density.py": dict.fromkeys(
        ("even_times", "trained_on", "_cells", "_shares", "_in_bins"), "on the CPU, for plots"
    ),
    "training/denoiser.py": {"DenoiserBase.sample": "a grid of times on the CPU"},
    "training/loss_by_level.py": {"sum_bins": "asks for the device"},
}


def find_float64(source: str) -> set[str]:
    """Return the functions that name float64 where no rule allows it."""
    found: set[str] = set()

    def visit(node: ast.AST, where: str, allowed: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            where = f"{where}.{node.name}" if where else node.name
            kept = any("keep" in ast.unparse(d) for d in node.decorator_list)
            allowed = kept or node.name in TABLES
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in KNOW:
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                visit(argument, where, allowed or ast.unparse(argument) == "torch.float64")
            visit(node.func, where, allowed)
            return
        if isinstance(node, ast.Attribute) and node.attr in ("float64", "double") and not allowed:
            found.add(where)
        for child in ast.iter_child_nodes(node):
            visit(child, where, allowed)

    visit(ast.parse(source), "", False)
    return found


FILES = sorted(str(p.relative_to(ROOT / "diffaug")) for room in ROOMS for p in (ROOT / "diffaug" / room).glob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_float64_stays_with_the_functions_that_know_of_it(path):
    assert find_float64((ROOT / "diffaug" / path).read_text()) == set(ALLOWED.get(path, {}))


def test_the_rule_finds_what_it_should():
    source = """
def one(x): return x.double()
class A:
    def two(self, x): return x.to(torch.float64)
    def three(self, x): return self.log_snr(x, torch.float64)
@keep
def four(): return torch.ones(3, dtype=torch.float64)
def five(x): return in_float64(lambda x: x.double(), x, torch.float64)
"""
    assert find_float64(source) == {"one", "A.two", "five"}
