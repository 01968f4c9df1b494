"""The registry and the table of settings go together: a new method cannot stay untested."""

from variants import VARIANTS

from tanzaku.methods import METHODS


def pytest_collection_modifyitems():
    missing = METHODS.keys() ^ VARIANTS.keys()
    assert not missing, f"tests/laws/variants.py and the registry differ in {sorted(missing)}"
