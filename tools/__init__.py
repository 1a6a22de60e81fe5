"""Training, conversion and measurement: run ``python -m zoo.tools.NAME``."""
