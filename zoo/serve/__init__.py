"""The models behind a web page and a JSON API: `zoo serve`. Needs the extra ``serve``."""

try:
    from zoo.serve.app import create_app
    from zoo.serve.chat import Chat
    from zoo.serve.limits import Limits
    from zoo.serve.models import Models
except ModuleNotFoundError as error:
    raise ImportError(f"Serving needs {error.name}: pip install 'linear-vision-zoo[serve]'.") from error

__all__ = ["Chat", "Limits", "Models", "create_app"]
