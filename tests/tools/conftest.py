import pytest


class InProcess:
    """Instead of worker processes."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    map = staticmethod(map)


@pytest.fixture(scope="module")
def in_process():
    """Scenes, also those of questions, are built in the process of the test."""
    from zoo.tools.quickstart import scenes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "ProcessPoolExecutor", InProcess)
        yield
