"""The fixture that the tests of all passes share.

Golden files are `golden/<pass>/<case>.txt`; `pytest tests/passes --update-golden` writes them.
`test_all_rules.py` reads them to see that every rule fired and every skip reason occurred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from checking import Checked, Inputs, check_golden, check_numbers, describe, run_pass

from redpass.plan import Pass
from redpass.program import Program

CheckPass = Callable[..., Checked]


@pytest.fixture
def check_pass(request: pytest.FixtureRequest) -> CheckPass:
    """Gives `check_pass(pass_, program, inputs, golden_name=None) -> Checked`.

    It plans, applies and checks: the program given is untouched, a second run plans nothing, the
    result keeps the graph's rules, each of `inputs` (one set of inputs, by name or in order, per
    item) gives what `pass_.exactness` promises, and the text equals the golden file named.
    """
    update = request.config.getoption("--update-golden")

    def check(
        pass_: Pass, program: Program, inputs: Sequence[Inputs], golden_name: str | None = None
    ) -> Checked:
        checked = run_pass(pass_, program)
        for values in inputs:
            check_numbers(pass_.exactness, program, checked.after, values)
        if golden_name is not None:
            check_golden(f"{pass_.name}/{golden_name}", describe(program, checked), update)
        return checked

    return check
