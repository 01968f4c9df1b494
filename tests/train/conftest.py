"""For tests of training: jobs train in this process, however many threads there are, unless a test says otherwise."""

from collections.abc import Iterator

import pytest

from tanzaku.train import executor


@pytest.fixture(autouse=True, scope="session")
def _in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "suited", lambda *_: 1)
        yield
