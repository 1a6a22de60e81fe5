"""Training recipes, which are data: ``importlib.resources.files("zoo.configs")`` is the folder."""
