"""The one error that the test bed raises on purpose."""


class TestbedError(Exception):
    """A model, file or package that the test bed needs is missing or is not what it should be."""

    __test__ = False
